"""Cases for people to look at: the worst and the best of a run, which `eval.report` draws."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from PIL import Image

KEPT = 20  # of each group, the worst and the best


class CaseRegion(TypedDict, total=False):
    """A region to draw: results of [`RegionPipeline`], of which all is optional.

    Attributes:
        mask: RLE dict, of the picture's size.
        region: what the user pointed with, such as `{"box": [x0, y0, x1, y1]}`.
        concept: name.
        concept_score: its probability.
        caption: text.
    """

    mask: dict[str, Any]
    region: dict[str, Any]
    concept: str
    concept_score: float
    caption: str


class Case(TypedDict):
    """One thing to look at, as JSON values.

    Attributes:
        score: ranks the cases of a group; higher is better.
        title: one line, such as the example's id.
        text: any number of lines: what was asked, expected and answered.
        image: path, or `data:` URI (see `embedded`); None where there is no picture.
        group: cases are ranked within groups; by default all are in one.
        truth: what is right, drawn on one picture.
        answer: what the model said, drawn on another one beside it.
    """

    score: float
    title: str
    text: NotRequired[str]
    image: NotRequired[str | None]
    group: NotRequired[str]
    truth: NotRequired[list[CaseRegion]]
    answer: NotRequired[list[CaseRegion]]


def embedded(image: Image.Image) -> str:
    """A picture that is in no file, such as a composed scene, as a `data:` URI (JPEG)."""
    packed = io.BytesIO()
    image.convert("RGB").save(packed, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


def picture_of_case(image: Image.Image, path: Any) -> str:
    """For `Case.image`: the path where the picture is a file, else the picture itself."""
    return str(Path(path).absolute()) if isinstance(path, (str, Path)) else embedded(image)


def extremes(cases: Iterable[Case], kept: int = KEPT) -> list[dict[str, Any]]:
    """The worst and the best cases of each group.

    Returns:
        A dict per group: `group`, `cases` (how many there are), `worst` and `best`, most extreme first; no case is
        in both.
    """
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.get("group", ""), []).append(case)
    return [{"group": name, "cases": len(members), **_ends(members, kept)} for name, members in groups.items()]


def _ends(cases: Sequence[Case], kept: int) -> dict[str, list[Case]]:
    """Of few cases the better half is the best."""
    number = min(kept, (len(cases) + 1) // 2)
    worst = heapq.nsmallest(number, cases, key=lambda case: case["score"])
    best = heapq.nlargest(min(kept, len(cases) - number), cases, key=lambda case: case["score"])
    return {"worst": worst, "best": best}
