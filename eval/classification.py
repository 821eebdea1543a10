"""Region classification, zero-shot: names of true boxes, judged by box average precision (TAP, section 4).

    python -m eval.classification --model tap_vit_l_v1_1 --concepts lvis_1203 --data lvis_v1_val.json --images coco \\
        --batch-size 256 --out lvis.json
    python -m eval.classification --data coco_open/instances_train.json --every 5 --out coco.json

Needs `lvis_v1_val.json` with COCO's train2017 and val2017, and the concept space of LVIS. Published, on 244,707 boxes:
AP (rare, common, frequent) 57.4 (58.6, 56.8, 57.5) for TAP-B v1.1, 59.1 (61.7, 58.9, 58.3) for L, 59.6 (61.6, 60.0,
58.2) for H.

Each true box (crowds left out) is answered by slot 0. Its probabilities over the file's categories become detections:
every category above 0.001, with the score sqrt(p * predicted IoU, clipped to 0..1). Of detections of one category
whose boxes overlap by more than 0.5 IoU the best is kept, and of a picture the 300 best (ties stay). pycocotools or the
LVIS API, whichever the file is for, compare the boxes. Giving a box many names is what the budget of 300 is for: with
its best name alone AP is far lower.

Categories are found in the concept space by name, whatever the case and the signs between words; a space of as many
names in the file's order is taken as it is. A category without a concept is named, and is never found.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tap_llm.concepts import ConceptSpace
from tap_llm.data.readers.base import box_from_xywh
from tap_llm.errors import InputError
from tap_llm.masks import FloatArray, box_iou
from tap_llm.pipelines import RegionPipeline

from .annotations import AnnotatedPicture, Annotations, annotation_arguments
from .average_precision import average_precision
from .base import Benchmark, Case, Prediction, Run, Scores, describe_model
from .command import benchmark_parser, cli, common_arguments, evaluate, finish, load_pipeline, parse
from .prompting import Answer, answer_boxes
from .region_cases import ends

LEAST_PROBABILITY = 0.001
NMS_IOU = 0.5
MOST_DETECTIONS = 300


class Classes:
    """The concepts of a file's categories.

    Args:
        concepts: the concept space.
        categories: names by id.

    Attributes:
        ids: of the categories that have a concept.
        faults: which have none, in one line.
        matched: how they were found.

    Raises:
        InputError: no category has a concept.
    """

    def __init__(self, concepts: ConceptSpace, categories: dict[int, str]) -> None:
        places = {_plain(name): place for place, name in reversed([*enumerate(concepts.names)])}
        by_name = {number: places.get(_plain(name)) for number, name in categories.items()}
        named = {number: place for number, place in by_name.items() if place is not None}
        if not named:
            raise InputError("no category of the file is in the concept space: give --concepts")
        in_order = dict(zip(categories, range(len(concepts)), strict=False))
        fits = len(concepts) == len(categories) and named.items() <= in_order.items()
        found = in_order if fits else named
        self.ids, self._columns, self._concepts = list(found), list(found.values()), concepts
        self.matched = "in order" if fits else "by name"
        missing = [name for number, name in categories.items() if number not in found]
        what = f"{len(missing)} of {len(categories)} categories are not in the concept space, and are never found"
        self.faults = [f"{what}: {', '.join(missing)}"] if missing else []

    def probabilities(self, embeds: Tensor) -> FloatArray:
        """(N, E) -> (N, K) float64, over the categories of `ids` alone."""
        logits = self._concepts.logits(embeds)[..., self._columns]
        return logits.softmax(dim=-1).cpu().double().numpy()


def _plain(name: str) -> str:
    """Words alone, lower-case: names are spelt with "_", "-" or spaces."""
    return " ".join(re.findall(r"[^\W_]+", name.lower()))


def multi_label(probabilities: FloatArray, ious: FloatArray, boxes: ArrayLike) -> list[tuple[int, int, float]]:
    """Detections of one picture, where a box may have several names; see the module's head.

    Args:
        probabilities: (N, K).
        ious: (N,) predicted.
        boxes: (N, 4) xyxy.

    Returns:
        (box, class, score), best first.
    """
    box, kind = np.nonzero(probabilities > LEAST_PROBABILITY)
    scores = np.sqrt(probabilities[box, kind] * np.clip(ious, 0, 1)[box])
    overlaps = box_iou(boxes, boxes) > NMS_IOU
    taken: dict[int, list[int]] = defaultdict(list)  # boxes by class
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if len(kept) >= MOST_DETECTIONS and scores[index] < scores[kept[MOST_DETECTIONS - 1]]:
            break
        others = taken[int(kind[index])]
        if not overlaps[box[index], others].any():
            others.append(int(box[index]))
            kept.append(int(index))
    return [(int(box[index]), int(kind[index]), float(scores[index])) for index in kept]


class Classification(Benchmark):
    """See the module's head.

    Args:
        pipe: model under test, with a concept space.
        annotations: pictures with boxes.
        batch_size: regions decoded at once.

    Raises:
        InputError: no concept space, or one without any of the categories.
    """

    unit = "regions"

    def __init__(self, pipe: RegionPipeline, annotations: Annotations, batch_size: int = 64) -> None:
        if pipe.concepts is None:
            raise InputError("the model has no concept space: give --concepts")
        self.pipe, self.annotations, self.batch_size = pipe, annotations, batch_size
        self.classes = Classes(pipe.concepts, annotations.categories)
        self.protocol = f"{annotations.style}-classification-v1"  # type: ignore[misc]

    def examples(self) -> Annotations:
        return self.annotations

    def settings(self) -> dict[str, Any]:
        return {"classes": self.classes.ids, "matched": self.classes.matched}

    def count(self, prediction: Prediction) -> int:
        return len(prediction["named"])

    def truth(self, example: AnnotatedPicture) -> Prediction:
        return {
            "image_id": example.image_id,
            "true_regions": len(example.records),
            "boxes": [record["bbox"] for record in example.sound],
            "categories": [record["category_id"] for record in example.sound],
        }

    def predict(self, example: AnnotatedPicture) -> Prediction:
        return next(iter(self.predict_batch([example])))

    def predict_batch(self, examples: list[AnnotatedPicture]) -> Iterable[Prediction]:
        """The best category of each box, and the picture's detections: box, category and score."""
        boxes = [[record["bbox"] for record in example.sound] for example in examples]
        answers = answer_boxes(self.pipe, [example.load() for example in examples], boxes, self.batch_size)
        return [self._classify(*pair) for pair in zip(examples, answers, strict=True)]

    def _classify(self, example: AnnotatedPicture, answers: list[Answer]) -> Prediction:
        if not answers:
            return {"named": [], "detections": []}
        boxes = [box_from_xywh(record["bbox"]) for record in example.sound]
        probabilities = self.classes.probabilities(torch.stack([answer.embed for answer in answers]))
        ious = np.array([answer.iou for answer in answers])
        ids = self.classes.ids
        found = multi_label(probabilities, ious, boxes)
        return {
            "named": [[ids[row.argmax()], row.max()] for row in probabilities],
            "detections": [[box, ids[kind], score] for box, kind, score in found],
        }

    def score(self, predictions: list[Prediction]) -> Scores:
        """Box AP by the names of the LVIS API, and the share of boxes whose best category is the true one."""
        file = self.annotations
        images = [*(prediction["image_id"] for prediction in predictions), file.stray_image]
        rows = [
            {
                "image_id": prediction["image_id"],
                "category_id": category,
                "bbox": prediction["boxes"][box],
                "score": score,
            }
            for prediction in predictions
            for box, category, score in prediction.get("detections", [])
        ]
        metrics: dict[str, Any] = average_precision(file.document, file.style, images, rows, "bbox")
        regions = sum(prediction["true_regions"] for prediction in predictions) + file.strays
        named = [(prediction, *row) for prediction in predictions for row in _named(prediction)]
        right = sum(best == true for _, _, best, _, true in named)
        metrics |= {"top1": right / regions if regions else None, "true_regions": regions}
        cases = [self._case(*row) for row in ends(named, key=_certainty)]
        return Scores(metrics, cases=cases, faults=[*file.faults, *self.classes.faults])

    def _case(self, prediction: Prediction, place: int, best: int, probability: float, true: int) -> Case:
        names, box = self.annotations.categories, box_from_xywh(prediction["boxes"][place])
        return {
            "score": _certainty((prediction, place, best, probability, true)),
            "title": f"{prediction['id']}: {names[true]}",
            "text": f"named {names[best]} ({probability:.2f})",
            "image": str(self.annotations.picture(prediction["image_id"]).path.absolute()),
            "truth": [{"region": {"box": box}, "concept": names[true]}],
            "answer": [{"region": {"box": box}, "concept": names[best], "concept_score": probability}],
        }


def _named(prediction: Prediction) -> Iterator[tuple[int, int, float, int]]:
    """(box, best category, its probability, true category) of each box."""
    pairs = zip(prediction.get("named", []), prediction["categories"], strict=False)
    return ((place, *named, true) for place, (named, true) in enumerate(pairs))


def _certainty(row: tuple[Any, ...]) -> float:
    """The probability of the name; the same below zero where it is wrong."""
    _, _, best, probability, true = row
    return float(probability if best == true else -probability)


def main(arguments: Sequence[str] | None = None) -> Run | None:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser("classification", __doc__)
    common_arguments(parser, batch="regions decoded at once")
    annotation_arguments(parser)
    args = parse(parser, arguments)
    annotations = Annotations(args.data, args.images, args.every, masks=False)
    pipe = load_pipeline(args)
    benchmark = Classification(pipe, annotations, args.batch_size)
    return finish(evaluate(benchmark, args, describe_model(pipe, args.model), args.pictures), args)


if __name__ == "__main__":
    sys.exit(cli(main))
