"""The numbers are those of pycocotools and of the LVIS API, called directly."""

from __future__ import annotations

import copy
import json
import logging
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from coco_files import annotation, coco_document

from eval.average_precision import average_precision
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle, polygons_to_mask

SIDE = 64


def box_row(image: int, category: int, box: tuple[int, int, int, int], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [*box], "score": score}


def crowded(lvis: bool, images: int = 12, seed: int = 1) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random true boxes, and detections that are shifted, missing, of a wrong class or made up."""
    generator = np.random.default_rng(seed)
    regions, rows = [], []
    for image in range(1, images + 1):
        for _ in range(generator.integers(1, 6)):
            x, y, w, h = (int(value) for value in generator.integers(4, 28, 4))
            category = int(generator.integers(1, 4))
            regions.append(
                annotation(image, category, (x, y, w, h), iscrowd=int(not lvis and generator.random() < 0.1))
            )
            for _ in range(generator.integers(1, 3)):
                shifted = [max(1, int(value)) for value in (x, y, w, h) + generator.integers(-2, 3, 4)]
                answer = category if generator.random() < 0.8 else int(generator.integers(1, 4))
                rows.append(box_row(image, answer, tuple(shifted), round(float(generator.random()), 2)))
    document = coco_document(regions, images, lvis)
    for image in document["images"]:
        image |= {"height": SIDE, "width": SIDE}
        if lvis:
            image |= {"neg_category_ids": [int(generator.integers(1, 4))], "not_exhaustive_category_ids": [1]}
    return document, rows


def as_masks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        x, y, w, h = row["bbox"]
        mask = polygons_to_mask([[x, y, x + w, y, x + w, y + h, x, y + h]], SIDE, SIDE)
        found.append(
            {key: row[key] for key in ("image_id", "category_id", "score")} | {"segmentation": encode_rle(mask)}
        )
    return found


def by_pycocotools(document: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = copy.deepcopy(document)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(rows)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [value if value >= 0 else None for value in evaluation.stats.tolist()]


@pytest.fixture
def lvis_package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    package = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # which the package needs when it is called directly
    logging.getLogger("lvis").setLevel(logging.ERROR)
    return package


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco_equals_a_direct_call(kind):
    document, boxes = crowded(lvis=False)
    rows = boxes if kind == "bbox" else as_masks(boxes)
    direct = by_pycocotools(document, rows, kind)
    ours = average_precision(document, "coco", range(1, 13), copy.deepcopy(rows), kind)
    assert list(ours.values()) == direct
    assert 0.1 < ours["AP"] < 0.9
    assert [*ours][:6] == ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_lvis_equals_a_direct_call(kind, lvis_package, tmp_path):
    document, boxes = crowded(lvis=True)
    rows = boxes if kind == "bbox" else as_masks(boxes)
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(document))
    direct = lvis_package.LVISEval(lvis_package.LVIS(str(path)), copy.deepcopy(rows), kind)
    direct.run()
    ours = average_precision(document, "lvis", range(1, 13), copy.deepcopy(rows), kind)
    assert ours == {name: None if value < 0 else value for name, value in direct.get_results().items()}
    assert 0.1 < ours["AP"] < 0.9
    assert {"APr", "APc", "APf", "AR@300"} <= ours.keys()


def test_lvis_leaves_numpy_alone():
    pytest.importorskip("lvis")
    document, rows = crowded(lvis=True, images=2)
    average_precision(document, "lvis", [1, 2], rows, "bbox")
    assert not hasattr(np, "float")


def test_by_hand():
    """Right, wrong, right: precision 1 up to half of the recall, then 2/3."""
    document = coco_document([annotation(1, 1, (0, 0, 10, 10)), annotation(2, 1, (5, 5, 10, 10))])
    rows = [
        box_row(1, 1, (0, 0, 10, 10), 0.9), box_row(1, 1, (30, 20, 5, 5), 0.8), box_row(2, 1, (5, 5, 10, 10), 0.7),
    ]  # fmt: skip
    metrics = average_precision(document, "coco", [1, 2], rows, "bbox")
    assert metrics["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-12)
    assert metrics["AR@1"] == 1
    assert metrics["APm"] is None


def test_overlap_decides():
    """Boxes of 10 x 10, shifted by 2: IoU 80 / 120 passes 0.5, 0.55, 0.6 and 0.65 of the ten thresholds."""
    document = coco_document([annotation(1, 1, (0, 0, 10, 10))])
    metrics = average_precision(document, "coco", [1], [box_row(1, 1, (2, 0, 10, 10), 1.0)], "bbox")
    assert (metrics["AP50"], metrics["AP75"]) == (pytest.approx(1), 0)
    assert metrics["AP"] == pytest.approx(0.4)


def test_lvis_counts_false_alarms_only_where_it_looked():
    pytest.importorskip("lvis")
    document = coco_document([annotation(1, 2, (0, 0, 10, 10))], images=3, lvis=True)
    right, wrong = box_row(1, 2, (0, 0, 10, 10), 0.5), box_row(2, 2, (0, 0, 10, 10), 0.9)
    metrics = average_precision(document, "lvis", [1, 2, 3], [dict(right), dict(wrong)], "bbox")
    assert (metrics["AP"], metrics["APr"]) == (pytest.approx(1), None)
    document["images"][1]["neg_category_ids"] = [2]
    metrics = average_precision(document, "lvis", [1, 2, 3], [dict(right), dict(wrong)], "bbox")
    assert metrics["AP"] == pytest.approx(0.5)


def test_other_images_do_not_count():
    document = coco_document([annotation(1, 1, (0, 0, 10, 10)), annotation(2, 1, (0, 0, 10, 10))])
    rows = [box_row(1, 1, (0, 0, 10, 10), 1.0)]
    assert average_precision(document, "coco", [1], [dict(row) for row in rows], "bbox")["AP"] == pytest.approx(1)
    assert average_precision(document, "coco", [1, 2], rows, "bbox")["AP"] == pytest.approx(51 / 101)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("style", ["coco", "lvis"])
def test_no_detection_at_all_is_zero(style, kind):
    pytest.importorskip("lvis")
    document = coco_document([annotation(1, 1, (0, 0, 10, 10))], lvis=style == "lvis")
    before = copy.deepcopy(document)
    metrics = average_precision(document, style, [1, 2], [], kind)
    assert metrics["AP"] == metrics["AP50"] == metrics["APs"] == 0
    assert metrics["APl"] is None
    assert document == before


def test_nothing_to_find():
    assert average_precision(coco_document([]), "coco", [1], [box_row(1, 1, (0, 0, 5, 5), 1)], "bbox")["AP"] is None


@pytest.mark.parametrize(("style", "package"), [("coco", "pycocotools.coco"), ("lvis", "lvis")])
def test_missing_package_is_named(style, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{style.replace('coco', 'pycoco')}.*tap-llm\[eval\]"):
        average_precision(coco_document([], lvis=True), style, [1], [], "bbox")
