"""Sentence embeddings against a computation by hand, with a tiny random BERT."""

from __future__ import annotations

import pytest
import torch
from judging import write_bert

from eval.sentence_similarity import SentenceEncoder
from tap_llm.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert") / "tiny-bert")


def test_mean_over_words_and_length_one(folder):
    encoder = SentenceEncoder.from_pretrained(str(folder))
    assert encoder.name == "tiny-bert"
    texts = ["red dog", "a small blue cup", "red dog"]
    found = encoder.encode(texts)
    for text, row in zip(texts, found, strict=True):
        inputs = encoder.tokenizer(text, return_tensors="pt")  # alone, so without any padding
        with torch.no_grad():
            hidden = encoder.model(**inputs).last_hidden_state[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(row, mean / mean.norm())
    torch.testing.assert_close(encoder.encode(texts, batch_size=1), found)
    cosines = encoder.similarity(["red dog", "cup"], ["red dog", "dog"])
    assert cosines[0] == pytest.approx(1) and -1 < cosines[1] < 0.999
    assert encoder.similarity([], []) == []


def test_bare_names_are_sentence_transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = []
    from transformers import AutoTokenizer

    def refuse(name, **options):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    for name in ("all-MiniLM-L6-v2", "me/mine"):
        with pytest.raises(InputError, match=f"the embedding model {name} cannot be loaded: offline"):
            SentenceEncoder.from_pretrained(name)
    assert asked == ["sentence-transformers/all-MiniLM-L6-v2", "me/mine"]
