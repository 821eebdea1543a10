"""Semantic segmentation by class names: VOC, Pascal Context, COCO-Object, ADE20K, and label maps of your own.

    python -m eval.semantic --labels voc --data VOCdevkit/VOC2012 --model voc --out voc.json
    python -m eval.semantic --labels context --data VOCdevkit/VOC2010 --model context --out context.json
    python -m eval.semantic --labels coco_object --data coco --model coco_object --out coco_object.json
    python -m eval.semantic --labels ade --data ADEChallengeData2016 --model ade150 --out ade.json
    python -m eval.semantic --data camvid/val.json --out camvid.json          # COCO-style file, its own categories
    python -m eval.semantic --data labels --images pictures --classes names.txt --first-label 0 --out mine.json

Download VOC 2012 (1,449 pictures of ImageSets/Segmentation/val.txt); for Context VOC 2010 with its label maps of 59
classes in SegmentationClassContext and ImageSets/SegmentationContext/val.txt; for COCO-Object COCO's val2017 with label
maps *_instanceTrainIds.png in annotations/val2017, or instances_val2017.json in their place (masks that overlap are
then painted in the file's order); for ADE20K ADEChallengeData2016 with objectInfo150.txt.

One confusion matrix over the whole data set, void pixels left out. `miou` is the mean over the classes that the truth
holds; background is one of them where it has a label. `miou_without_background` leaves row and column 0 of the matrix
out: what is background, or is held for it, does not count. Pixels of pictures without an answer are wrong in both.
Published for CaR with the CRF (with background / without): VOC 67.6 / 91.4, COCO-Object 36.6, Context 30.5 / 39.5;
ADE-150 without 17.7.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tap_llm.errors import InputError
from tap_llm.masks import encode_rle

from .base import Benchmark, Case, Prediction, Run, Scores
from .cases import CaseRegion
from .command import benchmark_parser, cli, evaluate, finish, parse
from .confusion import Counts, add_counts, class_ious, count_labels, mean_iou, without_background
from .label_maps import VOID, LabelFolder, LabelledPicture, LabelledPictures, LabelRecords
from .label_sets import LABEL_SETS, read_classes
from .region_cases import ends
from .segmenters import CarSegmenter, LabelMap, Segmenter, car_arguments, describe_car, load_car
from .tables import metric_table


class Semantic(Benchmark):
    """See the module's head.

    Args:
        segmenter: model under test.
        pictures: pictures with labels.
    """

    protocol = "semantic-v1"

    def __init__(self, segmenter: Segmenter, pictures: LabelledPictures) -> None:
        self.segmenter, self.pictures = segmenter, pictures

    def examples(self) -> LabelledPictures:
        return self.pictures

    def settings(self) -> dict[str, Any]:
        return {**self.segmenter.settings(), "queries": list(self.pictures.queries)}

    def truth(self, example: LabelledPicture) -> Prediction:
        """All pixels as without an answer."""
        nothing = np.full(example.labels.shape, VOID, dtype=np.int32)
        return {"place": example.place, "counts": self._count(example, nothing)}

    def predict(self, example: LabelledPicture) -> Prediction:
        """Pixels by true and predicted label, and the masks of the classes that were found."""
        answer = self.segmenter.segment(example.load(), self.pictures.queries)
        if answer.shape != example.labels.shape:
            raise InputError(f"the model answers with labels of {answer.shape}, the picture is {example.labels.shape}")
        if answer.min() < 0 or answer.max() > len(self.pictures.queries):
            raise InputError(f"the model answers with labels from {answer.min()} to {answer.max()}")
        return {"counts": self._count(example, answer), "masks": _masks(answer)}

    def _count(self, example: LabelledPicture, answer: LabelMap) -> Counts:
        return count_labels(example.labels, answer, len(self.pictures.queries))

    def score(self, predictions: list[Prediction]) -> Scores:
        """Means over the classes of one confusion matrix, and the classes one by one."""
        queries = self.pictures.queries
        table = add_counts((prediction["counts"] for prediction in predictions), len(queries))
        known, right = int(table.sum()), int(np.trace(table))
        by_name = zip(["background", *queries], class_ious(table).tolist(), strict=True)
        metrics = {
            "pictures": len(predictions),
            "miou": mean_iou(table),
            "miou_without_background": mean_iou(without_background(table)),
            "pixel_accuracy": right / known if known else None,
            "unanswered": int(table[:, -1].sum()) / known if known else None,
            "classes": {name: {"iou": None if np.isnan(iou) else iou} for name, iou in by_name},
        }
        return Scores(metrics, cases=self._cases(predictions), faults=self.pictures.faults)

    def _cases(self, predictions: list[Prediction]) -> list[Case]:
        classes = len(self.pictures.queries)
        ranked = [(mean_iou(add_counts([one["counts"]], classes)), one) for one in predictions]
        known = [(score, one) for score, one in ranked if score is not None]
        return [self._case(score, prediction) for score, prediction in ends(known, key=lambda row: row[0])]

    def _case(self, score: float, prediction: Prediction) -> Case:
        """What was found beside what is there."""
        example = self.pictures[prediction["place"]]
        return {
            "score": score,
            "title": example.id,
            "text": prediction.get("fault", ""),
            "image": str(example.path.absolute()),
            "truth": self._named(_masks(example.labels)),
            "answer": self._named(prediction.get("masks", [])),
        }

    def _named(self, masks: Sequence[Any]) -> list[CaseRegion]:
        return [{"mask": mask, "concept": self.pictures.queries[label - 1]} for label, mask in masks]


def _masks(labels: LabelMap) -> list[Any]:
    """Pairs of a class's label and its mask as RLE."""
    return [[label, encode_rle(labels == label)] for label in np.unique(labels[labels > 0]).tolist()]


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    args = parse(_parser(), arguments)
    pictures = _pictures(args)
    car = load_car(args)
    finished = evaluate(Semantic(CarSegmenter(car), pictures), args, describe_car(car, args.model))
    return finish(finished, args, _table(finished.results["metrics"]))


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("semantic", __doc__)
    car_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="folder of the data set, or COCO-style file")
    add("--labels", choices=list(LABEL_SETS), default="own", help="what the labels mean [own]")
    add("--images", type=Path, metavar="DIR", help="folder of the pictures, where it is not in the usual place")
    add("--split", metavar="NAME", help="such as train, where it is not that of validation")
    add("--classes", type=Path, metavar="FILE", help="what to ask for, one a line or a JSON list, by label")
    add("--first-label", type=int, metavar="N", help="label of the first class [1]")
    add("--background", action="store_true", help="of --labels own: label 0, or no mask, is background; else void")
    return parser


def _pictures(args: argparse.Namespace) -> LabelledPictures:
    layout = LABEL_SETS[args.labels].of_split(args.split)
    layout = replace(layout, background=layout.background or args.background)
    layout = layout if args.first_label is None else replace(layout, first=args.first_label)
    queries = layout.queries if args.classes is None else read_classes(args.classes)
    if args.data.is_dir():
        return LabelFolder(args.data, layout, args.images, queries)
    return LabelRecords(args.data, args.images, queries, layout.background)


def _table(metrics: dict[str, Any]) -> str:
    """All numbers, then one line per class that the truth holds."""
    flat = {name: value for name, value in metrics.items() if name != "classes"}
    classes = {name: values["iou"] for name, values in metrics["classes"].items()}
    return f"{metric_table({'all': flat})}\n\n{metric_table({'IoU': classes})}"


if __name__ == "__main__":
    sys.exit(cli(main))
