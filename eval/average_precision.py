"""Average precision by the reference implementations: pycocotools for COCO, the LVIS API for LVIS."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any, Literal

import numpy as np

from tap_llm.errors import InputError

Row = dict[str, Any]
Style = Literal["coco", "lvis"]
IouType = Literal["segm", "bbox"]

# The names that the LVIS API gives, for the twelve numbers of pycocotools in their order.
_COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100")


def average_precision(
    document: dict[str, Any], style: Style, image_ids: Sequence[int], rows: Iterable[Row], iou_type: IouType
) -> dict[str, float | None]:
    """AP and AR as the reference implementation gives them, from 0 to 1.

    Args:
        document: annotations in COCO's or LVIS's form: "images", "annotations" and "categories". Not changed.
        style: which implementation: "coco" (at most 100 detections per image and class) or "lvis" (300 per image,
            classes that were not looked for in an image do not count there).
        image_ids: images to evaluate on.
        rows: detections: "image_id", "category_id", "score", and "segmentation" (RLE) or "bbox" (x, y, w, h). They are
            written into.
        iou_type: what is compared: masks or boxes.

    Returns:
        Metrics by the LVIS API's names, such as "AP50", "APs" and "AR@100"; None where nothing was to be found.

    Raises:
        InputError: the package is missing.
    """
    # Copies, as both implementations write into what they are given; of the rows there may be too many for that.
    own = {
        **document,
        "images": [dict(image) for image in document["images"]],
        "annotations": [dict(annotation) for annotation in document["annotations"]],
    }
    answers = list(rows) or [_false_alarm(own, iou_type)]
    evaluate = _lvis_metrics if style == "lvis" else _coco_metrics
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = evaluate(own, list(image_ids), answers, iou_type)
    return {name: None if value < 0 else float(value) for name, value in metrics.items()}


def _false_alarm(document: dict[str, Any], iou_type: IouType) -> Row:
    """In place of no detection at all, which neither implementation takes; as wrong as none."""
    row = {"image_id": document["images"][0]["id"], "category_id": document["categories"][0]["id"], "score": 0.0}
    segmentation = {"size": [1, 1], "counts": "01"}
    return {**row, "segmentation": segmentation} if iou_type == "segm" else {**row, "bbox": [-2, -2, 1, 1]}


def _coco_metrics(
    document: dict[str, Any], image_ids: list[int], rows: list[Row], iou_type: IouType
) -> dict[str, float]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise _missing("pycocotools", error) from error
    truth = COCO()
    truth.dataset = document
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(rows), iou_type)
    evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(_COCO_NAMES, evaluation.stats, strict=True))


def _lvis_metrics(
    document: dict[str, Any], image_ids: list[int], rows: list[Row], iou_type: IouType
) -> dict[str, float]:
    try:
        from lvis import LVIS, LVISEval
    except ImportError as error:  # or a library that OpenCV, which it imports, lacks on this machine
        raise _missing("lvis", error) from error

    logging.getLogger("lvis").setLevel(logging.ERROR)  # it warns of rows that are in no file

    class Parsed(LVIS):
        """Takes the document in place of a path."""

        def _load_json(self, document: dict[str, Any]) -> dict[str, Any]:
            return document

    class Sparse(LVISEval):
        """Judges the pairs of image and class that have anything: of the 24 million of LVIS's val about one percent."""

        def evaluate(self) -> None:
            params = self.params
            self._prepare()
            pairs = [*dict.fromkeys([*self._gts, *self._dts])]
            self.ious = {pair: self.compute_iou(*pair) for pair in pairs}
            images, classes = _places(params.img_ids), _places(params.cat_ids)
            self.eval_imgs = _NoneElsewhere()
            for image, kind in pairs:
                for area, limits in enumerate(params.area_rng):
                    place = (classes[kind] * len(params.area_rng) + area) * len(images) + images[image]
                    self.eval_imgs[place] = self.evaluate_img(image, kind, limits)

    evaluation = Sparse(Parsed(document), rows, iou_type)
    evaluation.params.img_ids = sorted(image_ids)
    evaluation.evaluate()
    _with_old_numpy(LVISEval.accumulate)(evaluation)
    evaluation.summarize()
    return dict(evaluation.get_results())


def _places(ids: Iterable[int]) -> dict[int, int]:
    return {number: place for place, number in enumerate(ids)}


class _NoneElsewhere(dict[int, Any]):
    """A long list of which little is filled in."""

    def __missing__(self, place: int) -> None:
        return None


class _OldNumpy:
    """numpy with the name `float`, which lvis 0.5.3 uses and numpy 1.24 took away."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _with_old_numpy(function: Any) -> Any:
    """The same function with that numpy as its "np"; nothing else sees it."""
    return FunctionType(function.__code__, {**function.__globals__, "np": _OldNumpy()})


def _missing(package: str, error: ImportError) -> InputError:
    return InputError(
        f"average precision needs {package}, which cannot be imported ({error}): pip install 'tap-llm[eval]'"
    )
