"""Tokenizers of fresh decoders: ids as TAP's, captions there and back, a pad that no caption needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tap_llm.errors import InputError
from training.tokenizers import train_tokenizer

CAPTIONS = ["a red star behind the blue ring", "the large striped circle", "a t-shirt, 2 sizes too big!"] * 4


def test_captions_there_and_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 400, tmp_path)
    assert len(tokenizer) == 400
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 399
    for caption in [*CAPTIONS, "a wooden chair near the window", "un café ☕"]:  # bytes for what was never seen
        ids = tokenizer(caption).input_ids
        assert ids[0] == 1 and ids[-1] == 2 and 399 not in ids
        assert tokenizer.decode(ids[1:-1]) == caption
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("rare", ["é", "漢", "🙂", "¤"])
def test_rare_characters_do_not_become_the_pad(tmp_path: Path, rare: str) -> None:
    tokenizer = train_tokenizer([*CAPTIONS, f"a naïve {rare}"], 400, tmp_path)
    ids = tokenizer(f"a {rare}").input_ids
    assert tokenizer.pad_token_id == 399 and 399 not in ids and tokenizer.decode(ids[1:-1]) == f"a {rare}"


def test_common_words_become_pieces(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS * 10, 700, tmp_path)
    assert tokenizer.tokenize("a red star behind") == ["▁a", "▁red", "▁star", "▁behind"]


def test_the_same_captions_give_the_same_pieces(tmp_path: Path) -> None:
    first, second = (train_tokenizer(CAPTIONS, 350, tmp_path / name) for name in "ab")
    assert first.get_vocab() == second.get_vocab()


def test_one_that_is_there_is_taken(tmp_path: Path) -> None:
    first = train_tokenizer(CAPTIONS, 400, tmp_path)
    assert train_tokenizer(["something else"], 400, tmp_path).get_vocab() == first.get_vocab()
    again = train_tokenizer(["a zebra crossing"] * 9, 400, tmp_path, again=True)
    assert again.get_vocab() != first.get_vocab()
    with pytest.raises(InputError, match="400 pieces, but the caption decoder has 300"):
        train_tokenizer([], 300, tmp_path)


@pytest.mark.parametrize("size", [100, 5000])
def test_impossible_sizes(tmp_path: Path, size: int) -> None:
    with pytest.raises(InputError, match=rf"no tokenizer of {size} pieces.*vocab_size"):
        train_tokenizer(CAPTIONS, size, tmp_path)
    assert list(tmp_path.iterdir()) == []
