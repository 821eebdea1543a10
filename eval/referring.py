"""Referring segmentation: the mask of what expressions mean; RefCOCO, RefCOCO+, RefCOCOg.

    python -m eval.referring --model refcoco --data finetune_refcoco_val.json --images coco/train2014 --out refcoco.json
    python -m eval.referring --protocol per-sentence --model refcocog --data finetune_refcocog_val.json --images … \\
        --out refcocog.json

Download MDETR's mdetr_annotations.tar.gz (finetune_refcoco_{val,testA,testB}.json, finetune_refcoco+_…,
finetune_refcocog_{val,test}.json; with masks) and the pictures of COCO train2014. Any other file of samples whose
regions have masks and captions will do; refer's own refs(….p) are pickles, which are not opened.

    released       all sentences of an object are one list of queries, merged to one mask, as CaR's authors evaluate
    per-sentence   each sentence alone, as other papers count

`miou` is the mean over objects (released) or sentences, `overall_iou` the sum of intersections over that of unions.
What cannot be asked for, or has no mask, counts as 0; objects without a sentence are left out.
Published for CaR, released, mIoU val/testA/testB: RefCOCO 33.57/35.36/30.51, RefCOCO+ 34.22/36.03/31.02;
RefCOCOg val-U/test-U/val-G 36.67/36.57/36.63.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tap_llm.errors import InputError
from tap_llm.masks import encode_rle
from tap_llm.regions import read_mask

from .base import Benchmark, Case, Prediction, Run, Scores
from .cases import picture_of_case
from .command import benchmark_parser, cli, evaluate, finish, parse
from .interactive import Masked, MaskedSamples
from .overlap import Mask
from .region_cases import ends
from .segmenters import CarSegmenter, Referrer, car_arguments, describe_car, load_car


class Referring(Benchmark):
    """All sentences of an object at once; see the module's head.

    Args:
        referrer: model under test.
        samples: pictures with regions that have masks and captions.
    """

    protocol: ClassVar[str] = "referring-released-v1"
    unit = "expressions"

    def __init__(self, referrer: Referrer, samples: MaskedSamples) -> None:
        self.referrer, self.samples = referrer, samples

    def examples(self) -> MaskedSamples:
        return self.samples

    def settings(self) -> dict[str, Any]:
        return self.referrer.settings()

    def count(self, prediction: Prediction) -> int:
        return sum(len(answer["sentences"]) for answer in prediction["answers"])

    def lists(self, sentences: list[str]) -> list[list[str]]:
        """What the sentences of one object are asked as."""
        return [sentences]

    def truth(self, example: Masked) -> Prediction:
        """How much is asked, and of how many pixels; a sample that cannot be read counts as one question."""
        asked = [] if example.problem else self._asked(example)
        pixels = sum(_pixels(example, place) for place, _ in asked)
        return {"place": example.place, "asked": 1 if example.problem else len(asked), "pixels": pixels}

    def _asked(self, example: Masked) -> list[tuple[int, list[str]]]:
        """Number of the region and the texts, of each list that is asked."""
        return [
            (place, texts)
            for place, region in enumerate(example.sample.regions)
            if region.get("captions")
            for texts in self.lists(region["captions"])
        ]

    def predict(self, example: Masked) -> Prediction:
        """Pixels of intersection and union, and the mask, of each list of sentences that has a true mask."""
        image, masks, faults = example.load()
        asked = self._asked(example)
        spoken = dict.fromkeys(place for place, _ in asked)
        faults += [
            f"{example.id}: region {example.sample.regions[place].get('id', place)}: there is no mask"
            for place in spoken
            if not example.sample.has_mask[place]
        ]
        usable = [(place, texts) for place, texts in asked if place in masks]
        found = self.referrer.refer(image, [texts for _, texts in usable]) if usable else []
        answers = [
            {"place": place, "sentences": texts, **_overlap(mask, masks[place]), "mask": encode_rle(mask)}
            for (place, texts), mask in zip(usable, found, strict=True)
        ]
        return {"answers": answers, "faults": faults}

    def score(self, predictions: list[Prediction]) -> Scores:
        """Means over all that was to be asked."""
        answers = [answer for prediction in predictions for answer in prediction.get("answers", [])]
        asked = sum(prediction["asked"] for prediction in predictions) + len(self.samples.faults)
        missed = sum(prediction["pixels"] for prediction in predictions if "answers" not in prediction)
        union = missed + sum(answer["union"] for answer in answers)
        metrics = {
            "asked": asked,
            "miou": sum(map(_iou, answers)) / asked if asked else None,
            "overall_iou": sum(answer["intersection"] for answer in answers) / union if union else None,
            "precision_at_0.5": sum(_iou(answer) > 0.5 for answer in answers) / asked if asked else None,
        }
        broken = [fault for prediction in predictions for fault in prediction.get("faults", [])]
        return Scores(metrics, cases=self._cases(predictions), faults=[*self.samples.faults, *broken])

    def _cases(self, predictions: list[Prediction]) -> list[Case]:
        rows = [(one["place"], answer) for one in predictions for answer in one.get("answers", [])]
        return [self._case(*row) for row in ends(rows, key=lambda row: _iou(row[1]))]

    def _case(self, place: int, answer: dict[str, Any]) -> Case:
        """The mask found beside the true one."""
        example = self.samples[place]
        image, masks, _ = example.load()
        return {
            "score": _iou(answer),
            "title": f"{example.id}: region {answer['place']}",
            "text": "\n".join(answer["sentences"]),
            "image": picture_of_case(image, example.sample.image),
            "truth": [{"mask": encode_rle(masks[answer["place"]])}],
            "answer": [{"mask": answer["mask"]}],
        }


class ReferringPerSentence(Referring):
    """Each sentence alone; see the module's head."""

    protocol = "referring-per-sentence-v1"

    def lists(self, sentences: list[str]) -> list[list[str]]:
        return [[sentence] for sentence in sentences]


PROTOCOLS = {"released": Referring, "per-sentence": ReferringPerSentence}


def _pixels(example: Masked, place: int) -> int:
    """Of the true mask of a region; 0 where it cannot be read."""
    size, mask = example.sample.size, example.sample.regions[place].get("mask")
    try:
        return 0 if size is None or mask is None else int(np.count_nonzero(read_mask(mask, *size)))
    except InputError:
        return 0


def _overlap(mask: Mask, true: Mask) -> dict[str, int]:
    if mask.shape != true.shape:
        raise InputError(f"the model answers with a mask of {mask.shape}, the picture is {true.shape}")
    return {"intersection": int(np.count_nonzero(mask & true)), "union": int(np.count_nonzero(mask | true))}


def _iou(answer: dict[str, Any]) -> float:
    return answer["intersection"] / answer["union"] if answer["union"] else 0.0


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser("referring", __doc__)
    car_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="such as finetune_refcoco_val.json")
    add("--images", type=Path, metavar="DIR", help="folder of the pictures, or the one above")
    add("--protocol", choices=list(PROTOCOLS), default="released", help="how sentences are asked [released]")
    args = parse(parser, arguments)
    samples = MaskedSamples(args.data, args.images)
    car = load_car(args)
    benchmark = PROTOCOLS[args.protocol](CarSegmenter(car), samples)
    return finish(evaluate(benchmark, args, describe_car(car, args.model)), args)


if __name__ == "__main__":
    sys.exit(cli(main))
