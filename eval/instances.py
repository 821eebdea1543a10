"""Instance segmentation, zero-shot: boxes become masks, and average precision judges them (TAP, section 4).

    python -m eval.instances --model tap_vit_l_v1_1 --data annotations/instances_val2017.json --images coco \\
        --detections coco_instances_val2017.json --out coco.json
    python -m eval.instances --data lvis_v1_val.json --images coco --detections lvis_detections.json --out lvis.json
    python -m eval.instances --data instances_val2017.json --out r.json        # true boxes, where there is no detector

Needs COCO's val2017 (for LVIS train2017 too) and `instances_val2017.json` or `lvis_v1_val.json`. Published: detections
of ViTDet-H with cascade heads, 92,857 on COCO and 3,293,288 on LVIS, which are not distributed; TAP-L v1.1 then has AP
46.0 on COCO and 43.0 on LVIS.

Every box is answered by mask slot 0, cut at 0; category and score stay the detector's. pycocotools or the LVIS API,
whichever the file is for, score the masks. True boxes all have the score 1, and give a mean IoU too. What cannot be
predicted counts as wrong: its regions are missed, a box that cannot be used is a false alarm.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tap_llm.data.readers.base import box_from_xywh
from tap_llm.masks import decode_rle, encode_rle
from tap_llm.pipelines import RegionPipeline
from tap_llm.regions import read_mask

from .annotations import AnnotatedPicture, Annotations, annotation_arguments
from .average_precision import Row, average_precision
from .base import Benchmark, Case, Prediction, Run, Scores, describe_model
from .boxes import BoxSource, Detections, TrueBoxes, false_alarm
from .command import benchmark_parser, cli, common_arguments, evaluate, finish, load_pipeline, parse
from .overlap import iou
from .prompting import Answer, answer_boxes
from .region_cases import ends


class Instances(Benchmark):
    """See the module's head.

    Args:
        pipe: model under test.
        annotations: the pictures.
        boxes: where boxes come from.
        batch_size: regions decoded at once.
    """

    unit = "regions"

    def __init__(self, pipe: RegionPipeline, annotations: Annotations, boxes: BoxSource, batch_size: int = 64) -> None:
        self.pipe, self.annotations, self.boxes, self.batch_size = pipe, annotations, boxes, batch_size
        self.measures_iou = isinstance(boxes, TrueBoxes)
        kind = "instances-true-boxes" if self.measures_iou else "instances"
        self.protocol = f"{annotations.style}-{kind}-v1"  # type: ignore[misc]

    def examples(self) -> Annotations:
        return self.annotations

    def settings(self) -> dict[str, Any]:
        return {"boxes": self.boxes.identity}

    def count(self, prediction: Prediction) -> int:
        return len(prediction["regions"])

    def truth(self, example: AnnotatedPicture) -> Prediction:
        return {"image_id": example.image_id, "true_regions": len(example.records)}

    def predict(self, example: AnnotatedPicture) -> Prediction:
        return next(iter(self.predict_batch([example])))

    def predict_batch(self, examples: list[AnnotatedPicture]) -> Iterable[Prediction]:
        """Masks as rows for average precision, which lack the picture's id."""
        rows = [self.boxes.of(example) for example in examples]
        boxes = [[row["bbox"] for row in of_one if row["bbox"]] for of_one in rows]
        answers = answer_boxes(self.pipe, [example.load() for example in examples], boxes, self.batch_size)
        return [
            {"regions": self._regions(example, of_one, iter(found))}
            for example, of_one, found in zip(examples, rows, answers, strict=True)
        ]

    def _regions(self, example: AnnotatedPicture, rows: list[Row], answers: Iterator[Answer]) -> list[Row]:
        found = [
            {**row, "segmentation": next(answers).rle() if row["bbox"] else false_alarm(*example.size)} for row in rows
        ]
        truths = example.sound if self.measures_iou else []
        for row, record in zip(found, truths, strict=False):
            row["iou"] = iou(decode_rle(row["segmentation"]), read_mask(record["segmentation"], *example.size))
        return found

    def score(self, predictions: list[Prediction]) -> Scores:
        """AP by the names of the LVIS API; with true boxes also the mean IoU over regions."""
        file = self.annotations
        images = [*(prediction["image_id"] for prediction in predictions), file.stray_image]
        rows = [
            {key: row[key] for key in ("category_id", "score", "segmentation")} | {"image_id": prediction["image_id"]}
            for prediction in predictions
            for row in prediction.get("regions", [])
        ]
        metrics: dict[str, Any] = average_precision(
            file.document, file.style, images, [*rows, *self.boxes.strays], "segm"
        )
        if self.measures_iou:
            metrics |= self._mean_iou(predictions)
        return Scores(metrics, cases=self._cases(predictions), faults=[*file.faults, *self.boxes.faults])

    def _mean_iou(self, predictions: list[Prediction]) -> dict[str, Any]:
        """Over all annotations; those that could not be asked for count as 0."""
        regions = sum(prediction["true_regions"] for prediction in predictions) + self.annotations.strays
        found = [row["iou"] for prediction in predictions for row in prediction.get("regions", [])]
        return {"miou": sum(found) / regions if regions else None, "true_regions": regions}

    def _cases(self, predictions: list[Prediction]) -> list[Case]:
        """Masks of true boxes beside the true ones."""
        rows = [(one, place, row) for one in predictions for place, row in enumerate(one.get("regions", []))]
        ranked = ends([entry for entry in rows if "iou" in entry[2]], key=lambda entry: entry[2]["iou"])
        return [self._case(*entry) for entry in ranked]

    def _case(self, prediction: Prediction, place: int, row: Row) -> Case:
        picture = self.annotations.picture(prediction["image_id"])
        name = self.annotations.categories[row["category_id"]]
        mask = read_mask(picture.sound[place]["segmentation"], *picture.size)
        return {
            "score": row["iou"],
            "title": f"{prediction['id']}: {name}",
            "image": str(picture.path.absolute()),
            "truth": [{"mask": encode_rle(mask), "concept": name}],
            "answer": [{"mask": row["segmentation"], "region": {"box": box_from_xywh(row["bbox"])}}],
        }


def main(arguments: Sequence[str] | None = None) -> Run | None:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser("instances", __doc__)
    common_arguments(parser, batch="regions decoded at once")
    annotation_arguments(parser)
    parser.add_argument("--detections", type=Path, metavar="FILE", help="COCO results; without, true boxes")
    args = parse(parser, arguments)
    annotations = Annotations(args.data, args.images, args.every)
    boxes = Detections(args.detections, annotations) if args.detections else TrueBoxes()
    pipe = load_pipeline(args)
    benchmark = Instances(pipe, annotations, boxes, args.batch_size)
    return finish(evaluate(benchmark, args, describe_model(pipe, args.model), args.pictures), args)


if __name__ == "__main__":
    sys.exit(cli(main))
