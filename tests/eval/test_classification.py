"""Names of boxes: the multi-label rule by hand, how categories are found, and scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco_document, write_coco

from eval.annotations import Annotations
from eval.average_precision import average_precision
from eval.base import cases_path, describe_model, predictions_path, run
from eval.classification import MOST_DETECTIONS, Classes, Classification, main, multi_label
from eval.prompting import Answer
from tap_llm.concepts import ConceptSpace
from tap_llm.encoded import TightMask
from tap_llm.errors import InputError

FAR = [[0, 0, 10, 10], [20, 0, 30, 10]]
CATEGORIES = {1: "circle", 2: "square", 3: "star"}


# The multi-label rule


def test_score_is_the_root_of_probability_and_overlap():
    found = multi_label(np.array([[0.64, 0.36], [0.001, 0.999]]), np.array([0.25, 1.7]), FAR)
    assert found == [
        (1, 1, pytest.approx(0.999**0.5)),  # overlap is clipped
        (0, 0, pytest.approx(0.4)),
        (0, 1, pytest.approx(0.3)),
    ]  # 0.001 is not above the limit


def test_negative_overlap_counts_as_none():
    assert multi_label(np.array([[0.5]]), np.array([-0.2]), FAR[:1]) == [(0, 0, 0.0)]


def test_of_one_name_the_best_of_overlapping_boxes_stays():
    """Boxes of 10 x 10: shifted by 3, IoU 70 / 130 is above a half; shifted by 4, 60 / 140 is not."""
    boxes = [[0, 0, 10, 10], [3, 0, 13, 10], [4, 0, 14, 10]]
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    found = {(box, kind) for box, kind, _ in multi_label(probabilities, np.ones(3), boxes)}
    assert found == {(0, 0), (2, 0), (2, 1), (0, 1)}


def test_suppressed_boxes_do_not_suppress():
    boxes = [[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]]
    found = multi_label(np.array([[0.9], [0.8], [0.7]]), np.ones(3), boxes)
    assert [box for box, _, _ in found] == [0, 2]


def test_the_best_stay_and_ties_with_the_last():
    boxes = [[20 * place, 0, 20 * place + 10, 10] for place in range(MOST_DETECTIONS + 5)]
    scores = np.linspace(0.9, 0.2, len(boxes))
    scores[MOST_DETECTIONS : MOST_DETECTIONS + 2] = scores[MOST_DETECTIONS - 1]
    found = multi_label(scores[:, None], np.ones(len(boxes)), boxes)
    assert [box for box, _, _ in found] == [*range(MOST_DETECTIONS + 2)]


# Categories in the concept space


def space(*names):
    return ConceptSpace(names, torch.eye(len(names)) * 3)


def test_categories_are_found_by_name():
    classes = Classes(space("Star", "tree", "circle_"), CATEGORIES)
    assert (classes.ids, classes.matched) == ([1, 3], "by name")
    assert classes.faults == ["1 of 3 categories are not in the concept space, and are never found: square"]
    logits = np.array([3.0, 0.0])  # of circle and star alone
    expected = np.exp(logits) / np.exp(logits).sum()
    assert classes.probabilities(torch.tensor([[0.0, 0.0, 2.0]]))[0] == pytest.approx(expected)


def test_space_in_the_files_order_is_taken_as_it_is():
    """Official spaces spell some names in their own way."""
    classes = Classes(space("circle", "a four-sided thing", "star"), CATEGORIES)
    assert (classes.ids, classes.matched, classes.faults) == ([1, 2, 3], "in order", [])
    assert Classes(space("square", "other", "star"), CATEGORIES).ids == [2, 3]  # another order


def test_space_of_other_names():
    with pytest.raises(InputError, match="no category of the file is in the concept space: give --concepts"):
        Classes(space("dog", "cat", "cow"), CATEGORIES)


# Scores


@pytest.fixture
def go(tmp_path, monkeypatch, pipe):
    """Runs the benchmark with a model that sees what is given for each box, and overlaps of 1."""

    def start(document, seen, lvis=False):
        def answer(pipe, images, boxes, batch_size):
            mask = TightMask(None, np.zeros((0, 0), dtype=bool))
            return [
                [Answer((HEIGHT, WIDTH), mask, 1.0, torch.tensor(seen[tuple(box)])) for box in one] for one in boxes
            ]

        monkeypatch.setattr("eval.classification.answer_boxes", answer)
        monkeypatch.setattr(pipe, "_concepts", space("circle", "square", "star"))
        benchmark = Classification(pipe, Annotations(write_coco(tmp_path, document), masks=False))
        quiet = {"report": lambda line: None, "progress": False, "fresh": True}
        return run(benchmark, tmp_path / "r.json", {"sha256": "1"}, **quiet, batch_size=2).results

    return start


BOXES = [(0, 0, 10, 10), (20, 0, 10, 10), (0, 15, 10, 10)]
CIRCLE, SQUARE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]


def test_right_names(go, tmp_path):
    document = coco_document([annotation(1, 1, BOXES[0]), annotation(1, 2, BOXES[1]), annotation(2, 1, BOXES[2])])
    results = go(document, dict(zip(BOXES, [CIRCLE, SQUARE, CIRCLE], strict=True)))
    assert results["protocol"] == "coco-classification-v1"
    assert results["metrics"]["AP"] == pytest.approx(1)
    assert (results["metrics"]["top1"], results["regions"]) == (1, 3)
    (group,) = json.loads(cases_path(tmp_path / "r.json").read_text())
    assert group["worst"][0]["text"].startswith("named ")


def test_wrong_name_is_a_false_alarm_above_the_right_one(go):
    """The square is called a circle: circles come right, wrong; its own name is far down but there."""
    document = coco_document([annotation(1, 1, BOXES[0]), annotation(1, 2, BOXES[1])])
    results = go(document, {BOXES[0]: CIRCLE, BOXES[1]: CIRCLE})
    assert results["metrics"]["top1"] == 0.5
    assert results["metrics"]["AP"] == pytest.approx((1 + 0.5) / 2)  # ties keep the order of boxes


def test_broken_boxes_and_pictures_count_as_wrong(go, tmp_path):
    (tmp_path / "2.png").write_text("no picture")
    records = [
        annotation(1, 1, BOXES[0]), annotation(1, 1, BOXES[1], bbox=[1, 1, 0, 0]), annotation(2, 1, BOXES[2]),
        annotation(1, 77, BOXES[1]),
    ]  # fmt: skip
    results = go(coco_document(records), {BOXES[0]: CIRCLE})
    assert [fault.split(":")[0] for fault in results["faults"]] == ["image 2", "annotation 2", "annotation 4"]
    assert results["metrics"]["top1"] == 0.25
    assert results["metrics"]["AP"] == pytest.approx(34 / 101 / 2)  # one of three circles; the fourth is of no class


def test_lvis(go):
    pytest.importorskip("lvis")
    document = coco_document([annotation(1, 1, BOXES[0]), annotation(2, 3, BOXES[1])], lvis=True)
    results = go(document, {BOXES[0]: CIRCLE, BOXES[1]: SQUARE})
    assert results["protocol"] == "lvis-classification-v1"
    assert results["metrics"]["APr"] == pytest.approx(1)
    assert results["metrics"]["APc"] is None


def test_model_without_concepts(make_pipe, tmp_path):
    file = Annotations(write_coco(tmp_path, coco_document([])))
    with pytest.raises(InputError, match="give --concepts"):
        Classification(make_pipe(words=False), file)


# With a model


@pytest.fixture
def path(tmp_path):
    generator = np.random.default_rng(7)
    boxes = [tuple(int(value) for value in generator.integers(1, 16, 4)) for _ in range(10)]
    return write_coco(
        tmp_path, coco_document([annotation(1 + n % 3, 1 + n % 2, box) for n, box in enumerate(boxes)], 3)
    )


def test_results_do_not_depend_on_batches(pipe, path, tmp_path):
    metrics = []
    for batch, pictures in ((64, 3), (1, 1)):
        finished = run(
            Classification(pipe, Annotations(path, masks=False), batch), tmp_path / f"{batch}.json",
            describe_model(pipe, "tiny"), report=lambda line: None, progress=False, batch_size=pictures,
        )  # fmt: skip
        metrics.append(finished.results["metrics"])
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)


def test_command_equals_pycocotools_on_its_predictions(model_folder, path, tmp_path, capsys):
    out = tmp_path / "r.json"
    main(["--model", str(model_folder), "--data", str(path), "--out", str(out), "--device", "cpu"])
    results = json.loads(out.read_text())
    lines = [json.loads(line)["prediction"] for line in predictions_path(out).read_text().splitlines()[1:]]
    rows = [
        {"image_id": line["image_id"], "category_id": category, "bbox": line["boxes"][box], "score": score}
        for line in lines
        for box, category, score in line["detections"]
    ]
    direct = average_precision(json.loads(path.read_text()), "coco", [1, 2, 3], rows, "bbox")
    assert {key: results["metrics"][key] for key in direct} == direct
    assert results["regions"] == 10
    assert "top1" in capsys.readouterr().out
