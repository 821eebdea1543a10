"""BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE of captions against references.

    found = score_captions({"1": "a dog"}, {"1": ["the dog", "a dog"]})
    found.metrics["all"]["cider_d"]

The official numbers come from pycocoevalcap 1.2 and need Java. Where it is missing, BLEU, ROUGE-L and CIDEr-D are
computed in plain Python, from words that another tokenizer found: near, but not the official number, and so their
names begin with "unofficial_". What COCO's evaluation and most papers call CIDEr is CIDEr-D.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .captions import java, ngrams, ptb
from .captions.java import Part, Tokens

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d")
UNOFFICIAL = "unofficial_"
WHOLE = "all"

_JAVA_METRICS: dict[str, Callable[[Sequence[Part]], list[float]]] = {"meteor": java.meteor, "spice": java.spice}


@dataclass
class CaptionScores:
    """What was measured.

    Attributes:
        metrics: by part and metric; metrics of the plain-Python path have names that begin with `UNOFFICIAL`.
        not_measured: reason by metric.
        each: CIDEr-D of every caption of the part `WHOLE`, by key; empty without that part.
    """

    metrics: dict[Any, dict[str, float]]
    not_measured: dict[str, str] = field(default_factory=dict)
    each: dict[str, float] = field(default_factory=dict)


def score_captions(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    parts: Mapping[Any, Sequence[str]] | None = None,
    metrics: Collection[str] = METRICS,
) -> CaptionScores:
    """Compare captions with references.

    Args:
        captions: by key; an empty one counts as such.
        references: by key, one or more for each caption.
        parts: keys by name of a part, at least one each; each part is measured as if there was no other. By default
            one part, `WHOLE`.
        metrics: which of `METRICS`; "spice" is left out unless it is named, see [`java.spice`].
    """
    parts = {WHOLE: list(captions)} if parts is None else parts
    reason = java.missing_reason()
    if reason is None:
        try:
            tokens = _tokenize(captions, references, java.tokenize)
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        tokens = _tokenize(captions, references, lambda texts: [" ".join(ptb.tokenize(text)) for text in texts])
        found = score_tokens(*tokens, parts, metrics, official=False)
        note = f"{reason}; {UNOFFICIAL}… is not the official number"
        return CaptionScores(found.metrics, dict.fromkeys(metrics, note), found.each)
    return score_tokens(*tokens, parts, metrics)


def score_tokens(
    captions: Tokens,
    references: Tokens,
    parts: Mapping[Any, Sequence[str]],
    metrics: Collection[str] = METRICS,
    official: bool = True,
) -> CaptionScores:
    """As `score_captions`, of texts that are tokenized already.

    Args:
        captions: by key one text, its words separated by spaces.
        references: by key one or more.
        parts: keys by name.
        metrics: which.
        official: by pycocoevalcap; else in plain Python, without METEOR and SPICE.
    """
    keys = {name: tuple(members) for name, members in parts.items()}
    distinct = {
        members: ({key: captions[key] for key in members}, {key: references[key] for key in members})
        for members in keys.values()
    }
    scores, not_measured, each = {}, {}, {}
    prefix = "" if official else UNOFFICIAL
    for members, part in distinct.items():
        values, each[members] = (java.ngram_scores if official else _python_scores)(*part)
        scores[members] = {prefix + metric: values[metric] for metric in metrics if metric in values}
    for metric in [name for name in _JAVA_METRICS if name in metrics and official]:
        try:
            for members, value in zip(distinct, _JAVA_METRICS[metric](list(distinct.values())), strict=True):
                scores[members][metric] = value
        except RuntimeError as error:
            not_measured[metric] = str(error)
    named = {name: [(prefix + metric, scores[members]) for metric in metrics] for name, members in keys.items()}
    found = {name: {key: values[key] for key, values in rows if key in values} for name, rows in named.items()}
    whole = keys.get(WHOLE, ())
    return CaptionScores(found, not_measured, dict(zip(whole, each.get(whole, ()), strict=False)))


def _tokenize(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: Callable[[list[str]], list[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Both sides at once."""
    groups = [[caption] for caption in captions.values()] + [list(references[key]) for key in captions]
    words = iter(tokenizer([text for group in groups for text in group]))
    tokens = [[next(words) for _ in group] for group in groups]
    return dict(zip(captions, tokens, strict=False)), dict(zip(captions, tokens[len(captions) :], strict=True))


def _python_scores(captions: Tokens, references: Tokens) -> tuple[dict[str, float], list[float]]:
    said = [text.split() for [text] in captions.values()]
    known = [[text.split() for text in references[key]] for key in captions]
    rouge, cider = ngrams.rouge_l(said, known), ngrams.cider_d(said, known)
    scores = {f"bleu_{n}": value for n, value in enumerate(ngrams.bleu(said, known), 1)}
    return {**scores, "rouge_l": sum(rouge) / len(rouge), "cider_d": sum(cider) / len(cider)}, cider
