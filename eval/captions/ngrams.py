"""BLEU, ROUGE-L and CIDEr-D in plain Python, with the definitions and constants of pycocoevalcap 1.2.

Every function takes N captions as lists of words, and for each of them one or more references as lists of words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

Words = Sequence[str]

LONGEST = 4  # words of an n-gram
_SMALL, _TINY = 1e-9, 1e-15  # keep BLEU from dividing by zero, and from multiplying by it
_BETA = 1.2  # of ROUGE-L: weight of recall
_SIGMA = 6.0  # of CIDEr-D: words of difference in length that are forgiven

Vector = dict[tuple[str, ...], float]


def ngrams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    """Counts of all runs of n words."""
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole set (Papineni et al. 2002); of each caption the closest reference length counts."""
    right, said = [0] * LONGEST, [0] * LONGEST
    length = wanted = 0
    for caption, known in zip(captions, references, strict=True):
        length += len(caption)
        wanted += min((abs(len(words) - len(caption)), len(words)) for words in known)[1]
        for n in range(1, LONGEST + 1):
            counts = ngrams(caption, n)
            most = _union(ngrams(words, n) for words in known)
            right[n - 1] += sum(min(count, most[gram]) for gram, count in counts.items())
            said[n - 1] += sum(counts.values())
    ratio = (length + _TINY) / (wanted + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(hits + _TINY) / (total + _SMALL) for hits, total in zip(right, said, strict=True)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, LONGEST + 1)]


def _union(counts: Iterable[Counter[tuple[str, ...]]]) -> Counter[tuple[str, ...]]:
    most: Counter[tuple[str, ...]] = Counter()
    for count in counts:
        most |= count
    return most


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """ROUGE-L of each caption (Lin 2004), with best precision and best recall over its references."""
    return [_rouge_l(caption, known) for caption, known in zip(captions, references, strict=True)]


def _rouge_l(caption: Words, references: Sequence[Words]) -> float:
    common = [(common_length(words, caption), len(words)) for words in references]
    precision = max(length for length, _ in common) / max(len(caption), 1)
    recall = max(length / max(total, 1) for length, total in common)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_length(first: Words, second: Words) -> int:
    """Words of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10 (Vedantam et al. 2015; pycocoevalcap calls it CIDEr).

    Document frequencies are those of these very references, so values of different sets are not comparable.
    """
    documents: Counter[tuple[str, ...]] = Counter()
    for known in references:
        documents.update({gram for words in known for n in range(1, LONGEST + 1) for gram in ngrams(words, n)})
    total = math.log(max(len(references), 1))
    rarity = {gram: total - math.log(count) for gram, count in documents.items()}
    scores = []
    for caption, known in zip(captions, references, strict=True):
        said = _vectors(caption, rarity, total)
        alike = [_similarity(said, _vectors(words, rarity, total), len(caption), len(words)) for words in known]
        scores.append(10 * sum(alike) / len(alike))
    return scores


def _vectors(words: Words, rarity: Vector, unknown: float) -> list[Vector]:
    """Of each n: counts of n-grams times how rare they are."""
    return [
        {gram: count * rarity.get(gram, unknown) for gram, count in ngrams(words, n).items()}
        for n in range(1, LONGEST + 1)
    ]


def _similarity(caption: list[Vector], reference: list[Vector], length: int, wanted: int) -> float:
    """Mean over n of the clipped cosine, less for another length."""
    difference = max(length - 1, 0) - max(wanted - 1, 0)  # pycocoevalcap counts pairs of words
    cosines = map(_clipped_cosine, caption, reference)
    return sum(cosines) / LONGEST * math.exp(-(difference**2) / (2 * _SIGMA**2))


def _clipped_cosine(said: Vector, known: Vector) -> float:
    norms = math.sqrt(sum(value**2 for value in said.values())) * math.sqrt(sum(value**2 for value in known.values()))
    common = sum(min(value, known[gram]) * known[gram] for gram, value in said.items() if gram in known)
    return common / norms if norms else common
