"""Masks of boxes: scores by hand, bad input, and that nothing depends on batches."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco_document, write_coco, write_detections

from eval.annotations import Annotations
from eval.average_precision import average_precision
from eval.base import cases_path, describe_model, predictions_path, run
from eval.boxes import Detections, TrueBoxes
from eval.instances import Instances, cli, main
from eval.prompting import Answer
from tap_llm.encoded import TightMask

BOXES = [(4, 3, 10, 8), (20, 10, 12, 12), (2, 14, 9, 9)]


def records():
    return [annotation(1, 1, BOXES[0]), annotation(1, 2, BOXES[1]), annotation(2, 1, BOXES[2])]


def detection(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": [*box], "score": score}


@pytest.fixture
def oracle(monkeypatch):
    """Stands in for a model: it fills each box."""

    def answer(pipe, images, boxes, batch_size):
        return [[filled(*map(int, box)) for box in of_one] for of_one in boxes]

    def filled(x, y, width, height):
        mask = TightMask((x, y, x + width, y + height), np.ones((height, width), dtype=bool))
        return Answer((HEIGHT, WIDTH), mask, 0.5, torch.zeros(1))

    monkeypatch.setattr("eval.instances.answer_boxes", answer)


@pytest.fixture
def go(tmp_path, oracle):
    """Runs the benchmark with the oracle; by default on true boxes."""

    def start(document, detections=None, **options):
        file = Annotations(write_coco(tmp_path, document), **options)
        boxes = TrueBoxes() if detections is None else Detections(write_detections(tmp_path, detections), file)
        quiet = {"report": lambda line: None, "progress": False, "fresh": True}
        return run(Instances(None, file, boxes), tmp_path / "r.json", {"sha256": "1"}, **quiet, batch_size=2).results

    return start


def test_true_boxes_of_rectangles_are_right(go, tmp_path):
    results = go(coco_document(records()))
    assert results["protocol"] == "coco-instances-true-boxes-v1"
    assert results["metrics"]["AP"] == results["metrics"]["AP75"] == pytest.approx(1)
    assert (results["metrics"]["miou"], results["metrics"]["true_regions"]) == (1, 3)
    assert (results["regions"], results["faults"]) == (3, [])
    (group,) = json.loads(cases_path(tmp_path / "r.json").read_text())
    assert group["cases"] == 3
    assert group["worst"][0]["truth"][0]["mask"] == group["worst"][0]["answer"][0]["mask"]


def test_lvis_file_is_scored_by_lvis(go):
    pytest.importorskip("lvis")
    results = go(coco_document(records(), lvis=True))
    assert results["protocol"] == "lvis-instances-true-boxes-v1"
    assert results["metrics"]["AP"] == results["metrics"]["APr"] == pytest.approx(1)
    assert results["metrics"]["APf"] is None


def test_detections_by_hand(go):
    """Circles: right, wrong, right (see test_average_precision.test_by_hand); squares: none."""
    rows = [detection(1, 1, BOXES[0], 0.9), detection(2, 1, (30, 20, 5, 5), 0.8), detection(2, 1, BOXES[2], 0.7)]
    results = go(coco_document(records()), rows)
    assert results["protocol"] == "coco-instances-v1"
    assert results["metrics"]["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101 / 2)
    assert "miou" not in results["metrics"]
    assert results["regions"] == 3


def test_scores_are_the_detectors_and_masks_are_compared(go):
    """The mask of a box of 12 x 12 where 10 x 8 is true: IoU 80 / 144 passes two thresholds."""
    results = go(coco_document([annotation(1, 1, BOXES[0])]), [detection(1, 1, (4, 3, 12, 12), 0.3)])
    assert results["metrics"]["AP"] == pytest.approx(0.2)


@pytest.mark.parametrize("rows", [[], [detection(1, 2, BOXES[0], 0.5)]])
def test_nothing_right_is_zero(go, rows):
    assert go(coco_document(records()), rows)["metrics"]["AP"] == 0


def test_damaged_picture_counts_as_missed(go, tmp_path):
    (tmp_path / "2.png").write_text("no picture")
    results = go(coco_document(records(), images=3))
    assert len(results["faults"]) == 1
    assert results["faults"][0].startswith("image 2: ")
    assert "2.png' is damaged" in results["faults"][0]
    assert results["metrics"]["miou"] == pytest.approx(2 / 3)
    assert results["metrics"]["AP"] == pytest.approx((51 / 101 + 1) / 2)  # of two circles one is found
    assert results["examples"] == 3


@pytest.mark.parametrize(
    "more",
    [
        {"image_id": 9},
        {"category_id": 9},
        {"segmentation": {"size": [5, 7], "counts": [0, 35]}},
        {"bbox": [0, 0, 0, 0]},
    ],
)
def test_broken_annotation_counts_as_missed(go, more):
    """Of two circles one cannot be found."""
    document = coco_document([annotation(1, 1, BOXES[0]), {**annotation(2, 1, BOXES[2]), **more}])
    results = go(document)
    assert len(results["faults"]) == 1
    assert results["faults"][0].startswith("annotation 2: ")
    half = 0.5 if "category_id" in more else 51 / 101  # a circle and one of no class, or two circles
    assert results["metrics"]["AP"] == pytest.approx(half)
    assert results["metrics"]["miou"] == pytest.approx(0.5)


@pytest.mark.parametrize("more", [{"image_id": 9}, {"bbox": [90, 90, 5, 5]}])
@pytest.mark.parametrize("lvis", [False, True])
def test_unusable_detection_is_a_false_alarm(go, more, lvis):
    """It comes first: precision is 1/2 at the only true circle."""
    if lvis:
        pytest.importorskip("lvis")
    rows = [detection(1, 1, BOXES[0], 0.5), {**detection(1, 1, BOXES[1], 0.9), **more}]
    results = go(coco_document([annotation(1, 1, BOXES[0])], lvis=lvis), rows)
    assert len(results["faults"]) == 1
    assert results["metrics"]["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("more", [{"image_id": 9, "bbox": None}, {"bbox": None}])
@pytest.mark.parametrize("lvis", [False, True])
def test_only_unusable_detections_find_nothing(go, more, lvis):
    if lvis:
        pytest.importorskip("lvis")
    rows = [{**detection(1, 1, BOXES[0], 0.5), **more}]
    assert go(coco_document([annotation(1, 1, BOXES[0])], lvis=lvis), rows)["metrics"]["AP"] == 0


def test_double_ids_are_two_regions(go):
    document = coco_document([annotation(1, 1, BOXES[0], id=1), annotation(1, 1, BOXES[1], id=1)])
    results = go(document)
    assert "this id is used twice" in results["faults"][0]
    assert results["metrics"]["AP"] == pytest.approx(1)
    assert results["metrics"]["true_regions"] == 2


# With a model


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(5)
    boxes = [(int(generator.integers(0, 20)), int(generator.integers(0, 12)), 18, 15) for _ in range(9)]
    document = coco_document([annotation(1 + place % 3, 1 + place % 2, box) for place, box in enumerate(boxes)], 3)
    rows = [detection(1 + place % 3, 1 + place % 2, box, 0.1 * place) for place, box in enumerate(boxes)]
    return write_coco(tmp_path, document), write_detections(tmp_path, rows)


def test_results_do_not_depend_on_batches(pipe, files, tmp_path):
    annotations = Annotations(files[0])
    metrics = []
    for batch, pictures in ((64, 3), (2, 2), (1, 1)):
        benchmark = Instances(pipe, annotations, TrueBoxes(), batch)
        finished = run(
            benchmark, tmp_path / f"{batch}.json", describe_model(pipe, "tiny"), report=lambda line: None,
            progress=False, batch_size=pictures,
        )  # fmt: skip
        metrics.append(finished.results["metrics"])
    assert metrics[0]["miou"] == pytest.approx(metrics[1]["miou"], abs=1e-4)
    assert metrics[0] == pytest.approx(metrics[2], abs=1e-4)


def test_command_equals_pycocotools_on_its_predictions(model_folder, files, tmp_path, capsys):
    out = tmp_path / "out" / "r.json"
    main(
        ["--model", str(model_folder), "--data", str(files[0]), "--detections", str(files[1]), "--out", str(out),
         "--device", "cpu", "--pictures", "2"]
    )  # fmt: skip
    results = json.loads(out.read_text())
    lines = [json.loads(line) for line in predictions_path(out).read_text().splitlines()[1:]]
    rows = [
        {"image_id": line["prediction"]["image_id"], **{key: row[key] for key in row if key != "bbox"}}
        for line in lines
        for row in line["prediction"]["regions"]
    ]
    assert len(rows) == results["regions"] == 9
    direct = average_precision(json.loads(files[0].read_text()), "coco", [1, 2, 3], copy.deepcopy(rows), "segm")
    assert {key: results["metrics"][key] for key in direct} == direct
    assert 0 <= direct["AP50"] <= 1
    assert "AP50" in capsys.readouterr().out


def test_command_names_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["instances", "--data", str(tmp_path / "no.json"), "--out", str(tmp_path / "r.json")]
    )
    assert cli(main) == 2
    assert "no.json" in capsys.readouterr().err
