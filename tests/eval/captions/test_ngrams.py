"""BLEU, ROUGE-L and CIDEr-D by hand, and as pycocoevalcap computes them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.captions import java, ngrams


def words(*texts):
    return [text.split() for text in texts]


def test_right_and_missing():
    """Four of eight words are there, all right: precision 1, brevity exp(1 - 8 / 4)."""
    captions, references = words("a b c d", ""), [words("a b c d"), words("e f g h")]
    assert ngrams.bleu(captions, references) == pytest.approx([math.exp(-1)] * 4)
    assert ngrams.rouge_l(captions, references) == [1, 0]
    assert ngrams.cider_d(captions, references) == pytest.approx([10, 0])


def test_bleu_clips_and_takes_the_closest_length():
    """Of six words three are right ("the" counts twice, as in the first reference), and no pair but one of five."""
    captions, references = words("the the the cat sat the"), [words("the cat is on the mat", "a cat")]
    bleus = ngrams.bleu(captions, references)
    assert bleus[:2] == pytest.approx([3 / 6, math.sqrt(3 / 6 * 1 / 5)])
    assert ngrams.bleu(words("a b"), [words("a b c", "x")])[0] == pytest.approx(1)  # of 3 and 1 the shorter is closest


def test_rouge_takes_best_precision_and_best_recall():
    """Common words in order: 2 of the caption's 3 with the first reference, all of the second."""
    precision, recall = 2 / 3, 1.0
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert ngrams.rouge_l(words("a x b"), [words("a b c d", "x")]) == pytest.approx([expected])
    assert ngrams.common_length("abcbdab", "bdcaba") == 4


def test_cider_by_hand():
    """ "red" is in two of three references, "cup" and "hat" in one; no pair of words is right."""
    references = [words("red cup"), words("red hat"), words("dog")]
    red, rare = math.log(3 / 2), math.log(3)
    cosine = red**2 / (red**2 + rare**2)
    scores = ngrams.cider_d(words("red hat", "red hat", "cat"), references)
    assert scores == pytest.approx([10 * cosine / 4, 5, 0])  # no runs of three words: their cosine is 0


def test_cider_punishes_length():
    """Three words more: exp(-9 / 72). The cosine is that of one rare word among four."""
    references = [words("cup"), words("dog")]
    [score, _] = ngrams.cider_d(words("cup x y z", "dog"), references)
    assert score == pytest.approx(10 * (1 / math.sqrt(4)) / 4 * math.exp(-9 / 72))


def test_as_the_original():
    pytest.importorskip("pycocoevalcap")
    rng = np.random.default_rng(0)
    draw = lambda: " ".join(rng.choice(list("abcdefgh"), rng.integers(1, 12)))  # noqa: E731
    captions = {str(key): [draw() if key else ""] for key in range(40)}
    references = {key: [draw() for _ in range(rng.integers(1, 5))] for key in captions}
    expected, each = java.ngram_scores(captions, references)
    said = words(*(text for [text] in captions.values()))
    known = [words(*texts) for texts in references.values()]
    assert ngrams.cider_d(said, known) == pytest.approx(each, abs=1e-9)
    assert ngrams.bleu(said, known) == pytest.approx([expected[f"bleu_{n}"] for n in range(1, 5)], abs=1e-9)
    assert np.mean(ngrams.rouge_l(said, known)) == pytest.approx(expected["rouge_l"], abs=1e-9)
