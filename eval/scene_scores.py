"""Metrics of regions from what was predicted for them, by source, by known and novel names, and by kind.

A region is a dict as `Scenes.predict` makes it: `truth` (fields of `Truth`), `baselines`, `box`, `click`,
`click_ious`; see there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from .base import Prediction, Scores
from .caption_metrics import score_captions
from .words import judge_shape, says_colour, says_name

Region = dict[str, Any]
Value = Callable[[Region], float | None]

KINDS = ("shape", "emoji", "grocery", "garment", "object")
ATTRIBUTES = ("colour", "texture", "size")
REFERENCE_METRICS = ("cider_d", "meteor")


def names_object(region: Region) -> bool | None:
    """Whether the caption holds the name; None where the region's own phrase does not, or there is no caption."""
    name, phrase = region["truth"]["name"], region["truth"]["phrase"]
    if not region["captioned"] or not name or (phrase and name not in phrase):
        return None
    return says_name(region["box"]["caption"], name)


def names_colour(region: Region) -> bool | None:
    """Whether the caption holds one of the region's colour words; None where there are none, or no caption."""
    colours = region["truth"]["colours"]
    return says_colour(region["box"]["caption"], colours) if region["captioned"] and colours else None


def shape_verdict(region: Region) -> dict[str, bool | None]:
    """`judge_shape` of the caption of a drawn shape; empty for other regions, and without captions."""
    truth = region["truth"]
    if not region["captioned"] or not truth["shape"]:
        return {}
    return judge_shape(region["box"]["caption"], truth["shape"], truth["colours"])


def colour_and_shape(region: Region) -> bool | None:
    """Whether the caption of a drawn shape has colour and shape, both right."""
    verdict = shape_verdict(region)
    return bool(verdict["colour"] and verdict["shape"]) if verdict else None


def concept_hit(prompt: str, top: int) -> Value:
    """Whether the true name is among the first names for a prompt; None without a name or a concept space."""

    def hit(region: Region) -> float | None:
        name, found = region["truth"]["name"], region[prompt]["concepts"]
        return name in [concept.lower() for concept, _ in found[:top]] if name and found else None

    return hit


def clicks(count: int) -> Value:
    """IoU after so many clicks."""
    return lambda region: region["click_ious"][count - 1] if len(region["click_ious"]) >= count else None


VALUES: dict[str, Value] = {
    "box_miou": lambda region: region["box"]["iou"],
    "box_miou_of_ellipse": lambda region: region["baselines"]["ellipse"],
    "box_miou_of_filled_box": lambda region: region["baselines"]["filled_box"],
    "click_miou": clicks(1),
    "clicks_3_miou": clicks(3),
    "clicks_5_miou": clicks(5),
    "box_concept_top1": concept_hit("box", 1),
    "box_concept_top5": concept_hit("box", 5),
    "click_concept_top1": concept_hit("click", 1),
    "click_concept_top5": concept_hit("click", 5),
    "caption_has_name": names_object,
    "caption_has_colour": names_colour,
    "shape_caption_has_colour_and_shape": colour_and_shape,
}


class SceneScores:
    """Turns predictions into metrics.

    Args:
        concepts: names of the concept space, lower-case; None without one.
        novel: names that were held out of training, lower-case.
        known: names that training showed; None for all that are not novel.
        references: compute CIDEr-D and METEOR.
    """

    def __init__(
        self,
        concepts: Collection[str] | None,
        novel: Collection[str] = (),
        known: Collection[str] | None = None,
        references: bool = True,
    ) -> None:
        self.concepts = None if concepts is None else set(concepts)
        self.novel, self.known = set(novel), None if known is None else set(known)
        self.references = references

    def is_known(self, name: str | None) -> bool | None:
        """In the concept space and not held out; None where that cannot be said."""
        if name is None or self.concepts is None:
            return None
        return name in self.concepts and name not in self.novel and (self.known is None or name in self.known)

    def __call__(self, predictions: Sequence[Prediction]) -> Scores:
        """Metrics by source and group: "all", "known", "novel", and each of them by kind ("known/emoji")."""
        scores = Scores({}, self._missing(predictions))
        groups = {source: self._groups(regions) for source, regions in _by_source(predictions).items()}
        for source, members in groups.items():
            scores.metrics[source] = {name: self._measure(regions) for name, regions in members.items()}
        if self.references:
            _add_reference_metrics(scores, groups)
        return scores

    def _missing(self, predictions: Sequence[Prediction]) -> dict[str, str]:
        reasons = {}
        if self.concepts is None:
            reasons["concepts, known and novel names"] = "the model has no concept space"
        if not any(region["captioned"] for prediction in predictions for region in prediction["regions"]):
            reasons["captions"] = "the model has no tokenizer"
        elif not self.references:
            reasons |= dict.fromkeys(REFERENCE_METRICS, "left out on request")
        return reasons

    def _groups(self, regions: Sequence[Region]) -> dict[str, list[Region]]:
        splits: dict[str, list[Region]] = {"all": list(regions), "known": [], "novel": []}
        for region in regions:
            known = self.is_known(region["truth"]["name"])
            if known is not None:
                splits["known" if known else "novel"].append(region)
        by_kind = {
            f"{split}/{kind}": [region for region in members if region["truth"]["kind"] == kind]
            for split, members in splits.items()
            for kind in KINDS
        }
        return {name: members for name, members in (splits | by_kind).items() if members}

    def _measure(self, regions: Sequence[Region]) -> dict[str, Any]:
        judged = {key: [value(region) for region in regions] for key, value in VALUES.items()}
        metrics: dict[str, Any] = {"regions": len(regions)}
        for key, values in judged.items():
            metrics[key] = mean(values)
            if key.startswith("caption"):
                metrics[f"{key}_regions"] = sum(value is not None for value in values)
        if self.concepts is not None:
            names = [region["truth"]["name"] for region in regions]
            metrics["name_in_concept_space"] = mean(name in self.concepts for name in names if name)
        return metrics | _attribute_metrics(regions)


def _by_source(predictions: Sequence[Prediction]) -> dict[str, list[Region]]:
    regions: dict[str, list[Region]] = {}
    for prediction in predictions:
        regions.setdefault(prediction["source"], []).extend(prediction["regions"])
    return regions


def _add_reference_metrics(scores: Scores, groups: dict[str, dict[str, list[Region]]]) -> None:
    """CIDEr-D and METEOR of the groups that are not by kind; Java starts once for all of them."""
    captioned = {
        (source, name): [region for region in regions if region["captioned"] and region["truth"]["captions"]]
        for source, members in groups.items()
        for name, regions in members.items()
        if "/" not in name
    }
    parts = {name: [str(id(region)) for region in regions] for name, regions in captioned.items() if regions}
    texts = {str(id(region)): region for regions in captioned.values() for region in regions}
    if not texts:
        return
    found = score_captions(
        {key: region["box"]["caption"] for key, region in texts.items()},
        {key: region["truth"]["captions"] for key, region in texts.items()},
        parts,
        REFERENCE_METRICS,
    )
    for (source, name), metrics in found.metrics.items():
        scores.metrics[source][name] |= metrics
    scores.not_measured |= found.not_measured


def _attribute_metrics(regions: Sequence[Region]) -> dict[str, Any]:
    """Of the attributes that captions of drawn shapes mention, the share that is right: each, and all together."""
    verdicts = [verdict for region in regions if (verdict := shape_verdict(region))]
    if not verdicts:
        return {}
    said = {key: [verdict[key] for verdict in verdicts if verdict[key] is not None] for key in ATTRIBUTES}
    metrics: dict[str, Any] = {"shape_attributes_right": mean(value for values in said.values() for value in values)}
    for key, values in said.items():
        metrics |= {f"shape_{key}_right": mean(values), f"shape_{key}_said": len(values) / len(verdicts)}
    return metrics


def mean(values: Iterable[float | None]) -> float | None:
    """Of what is not None; None where nothing is left."""
    known = [float(value) for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None
