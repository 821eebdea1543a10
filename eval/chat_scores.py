"""Scores of answers about regions, by kind of question and by groups of kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tap_llm.data.instruction_kinds import KINDS
from tap_llm.data.instructions import same_answer

from .words import judge_shape, says_colour, says_name

Answered = dict[str, Any]

CONDITIONS = ("true", "same picture", "other picture", "no region")
GROUPS: dict[str, tuple[str, ...]] = {
    "attributes": ("colour", "shape", "texture", "size"),
    "names": ("name",),
    "relations": ("left_right", "above_below"),
    "size comparison": ("larger",),
    "yes or no": tuple(kind for kind in KINDS if kind.startswith(("is_", "same_"))),
    "counting": ("count",),
    "places": ("place",),
    "multiple choice": ("kind",),
    "descriptions": ("caption", "describe"),
}
_SHAPE_WORDS = ("texture", "size")


def score_answers(questions: Sequence[Answered]) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics of questions as [`RegionChat`] stores them.

    Returns:
        `groups` and `kinds`, each by name: `questions`, how many; `exact`, the share answered with the expected words;
        the same under each control ("same picture", "other picture", "no region"); `chance`, what guessing gives
        that knows only which answers there are, or, for open questions, which is the commonest of the kind. Of names
        also `concept_accuracy`, TAP's own on the same regions, and the `ratio` of the two. Of descriptions the shares
        that hold the name (`says_name`), one of the colours (`says_colour`), and of drawn shapes the shares of words
        about texture and size that are true (`true_texture`, `true_size`).
    """
    chances = _chances(questions)
    rows = [{**question, "chance": chance} for question, chance in zip(questions, chances, strict=True)]
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    groups = {name: [row for kind in kinds for row in by_kind[kind]] for name, kinds in GROUPS.items()}
    return {
        "groups": {name: _metrics(group, name) for name, group in groups.items() if group},
        "kinds": {kind: _metrics(group) for kind, group in by_kind.items() if group},
    }


def _chances(questions: Sequence[Answered]) -> list[float]:
    said = Counter((question["kind"], question["answer"]) for question in questions if not question["choices"])
    totals: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for (kind, _), number in said.items():
        totals[kind] += number
        most[kind] = max(most[kind], number)
    return [
        1 / len(question["choices"]) if question["choices"] else most[question["kind"]] / totals[question["kind"]]
        for question in questions
    ]


def _metrics(rows: Sequence[Answered], group: str = "") -> dict[str, Any]:
    shares = {condition: _mean(is_right(row, condition) for row in rows) for condition in CONDITIONS}
    metrics = {
        "questions": len(rows),
        "exact": shares.pop("true"),
        **shares,
        "chance": _mean(r["chance"] for r in rows),
    }
    extra = {"names": _name_metrics, "descriptions": _description_metrics}.get(group)
    return metrics | (extra(rows) if extra else {})


def is_right(row: Answered, condition: str) -> bool | None:
    """Whether the answer under a condition has the expected words; None where there was none to give."""
    said = row["said"][condition]
    return None if said is None else same_answer(said, row["answer"])


def _name_metrics(rows: Sequence[Answered]) -> dict[str, Any]:
    named = [row for row in rows if row["concept"] is not None]
    concept = _mean(row["concept"].lower() == row["truth"]["name"] for row in named)
    exact = _mean(is_right(row, "true") for row in named)
    return {"concept_accuracy": concept, "ratio": exact / concept if concept and exact is not None else None}


def _description_metrics(rows: Sequence[Answered]) -> dict[str, Any]:
    pairs = [(row["said"]["true"], row["truth"]) for row in rows]
    drawn = [judge_shape(said, truth["shape"], truth["colours"]) for said, truth in pairs if truth["shape"]]
    return {
        "says_name": _mean(says_name(said, truth["name"]) for said, truth in pairs),
        "says_colour": _mean(says_colour(said, truth["colours"]) for said, truth in pairs if truth["colours"]),
        **{f"true_{key}": _mean(judged[key] for judged in drawn) for key in _SHAPE_WORDS},
    }


def _mean(values: Iterable[bool | float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
