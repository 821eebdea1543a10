"""Caption metrics against scores of the original implementation, on its own words and from raw text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.caption_metrics import METRICS, score_captions, score_tokens
from eval.captions import java, ptb

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "caption_golden"
NAMES = dict(
    zip(("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d"),
        ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"), strict=True)
)  # fmt: skip
SETS = ("model", "human600")


def read(name, kind):
    if not GOLDEN.is_dir():
        pytest.skip("the captions with known scores are not here")
    return json.loads((GOLDEN / f"{name}_{kind}.json").read_text())


def tokens(name):
    found = read(name, "tokenized")
    results = found["results"]
    return {key: [text] if isinstance(text, str) else text for key, text in results.items()}, found["references"]


def raw(name):
    """Captions and references of a set, its name in front of the keys."""
    references: dict[str, list[str]] = {}
    for record in read(name, "references")["annotations"]:
        references.setdefault(f"{name}/{record['image_id']}", []).append(record["caption"])
    return {f"{name}/{record['image_id']}": record["caption"] for record in read(name, "results")}, references


def known(name, prefix="", without=()):
    corpus = read(name, "scores")["corpus"]
    return {
        prefix + ours: pytest.approx(corpus[theirs], abs=1e-4) for ours, theirs in NAMES.items() if ours not in without
    }


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("official", [True, False])
def test_scores_of_given_words(name, official):
    if official:
        pytest.importorskip("pycocoevalcap")
    captions, references = tokens(name)
    metrics = [metric for metric in METRICS if metric != "meteor"]
    found = score_tokens(captions, references, {"all": list(captions)}, metrics, official)
    assert found.metrics["all"] == known(name, "" if official else "unofficial_", without=("meteor",))
    expected = {key: scores["CIDEr"] for key, scores in read(name, "scores")["per_image"].items()}
    assert found.each == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", SETS)
def test_deviation_of_our_own_words(name, monkeypatch):
    """From raw text, without Java: on these captions no score is off by more than 1e-4, and hardly a word differs."""
    monkeypatch.setattr(java, "missing_reason", lambda: "no Java")
    found = score_captions(*raw(name))
    assert found.metrics["all"] == known(name, "unofficial_", without=("meteor",))
    captions, references = raw(name)
    words, known_words = tokens(name)
    pairs = [(captions[f"{name}/{key}"], text) for key, [text] in words.items()]
    pairs += [
        pair for key, texts in known_words.items() for pair in zip(references[f"{name}/{key}"], texts, strict=True)
    ]
    differing = [text for text, expected in pairs if ptb.tokenize(text) != expected.split()]
    assert len(differing) <= 0.002 * len(pairs)


@pytest.mark.slow
def test_scores_from_raw_text_with_java():
    """Both sets in one go, each as a part of its own, and empty captions beside them."""
    if java.missing_reason():
        pytest.skip(java.missing_reason())
    captions, references = ({key: value for name in SETS for key, value in raw(name)[side].items()} for side in (0, 1))
    parts = {name: [key for key in captions if key.startswith(f"{name}/")] for name in SETS}
    parts["empty"] = ["first", "last"]
    captions = {"first": "", **captions, "last": " "}
    found = score_captions(captions, references | {"first": ["a"], "last": ["a"]}, parts)
    assert found.not_measured == {}
    for name in SETS:
        assert found.metrics[name] == known(name)
    assert found.metrics["empty"]["meteor"] == 0
    assert found.metrics["empty"]["cider_d"] == 0


def test_parts_have_document_frequencies_of_their_own(monkeypatch):
    """In a part of one caption nothing is rare: CIDEr-D is 0."""
    monkeypatch.setattr(java, "missing_reason", lambda: "no Java")
    captions, references = {"1": "a b", "2": "c d"}, {"1": ["a b"], "2": ["c d"]}
    parts = {"both": ["1", "2"], ("one", 1): ["1"], "same": ["1"]}
    found = score_captions(captions, references, parts, ["cider_d"])
    assert found.metrics == {
        "both": {"unofficial_cider_d": pytest.approx(5)},
        ("one", 1): {"unofficial_cider_d": 0},
        "same": {"unofficial_cider_d": 0},
    }
    assert found.each == {}
