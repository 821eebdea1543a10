"""Detections as they are, and false alarms in place of those that cannot be used."""

from __future__ import annotations

import pytest
from coco_files import annotation, coco_document, write_coco, write_detections

from eval.annotations import Annotations
from eval.boxes import Detections, TrueBoxes
from tap_llm.errors import InputError, MissingFileError

BOX = [4, 3, 10, 8]


@pytest.fixture
def file(tmp_path):
    records = [annotation(1, 2, (4, 3, 10, 8)), annotation(1, 1, (1, 1, 5, 5), segmentation=[])]
    return Annotations(write_coco(tmp_path, coco_document(records)))


def row(**more):
    return {"image_id": 1, "category_id": 2, "bbox": BOX, "score": 0.5, **more}


def test_detections_by_picture(file, tmp_path):
    rows = [row(image_id=2, score=0.25), row(), row(category_id=3)]
    found = Detections(write_detections(tmp_path, rows), file)
    assert found.of(file[0]) == [
        {"category_id": 2, "score": 0.5, "bbox": BOX}, {"category_id": 3, "score": 0.5, "bbox": BOX},
    ]  # fmt: skip
    assert [one["score"] for one in found.of(file[1])] == [0.25]
    assert (found.faults, found.strays) == ([], [])


@pytest.mark.parametrize(
    ("more", "what", "expected"),
    [
        ({"category_id": 9}, "of a category that annotations.json does not list", {"category_id": 4}),
        ({"score": float("nan")}, "have no score", {"score": 1.0}),
        ({"score": "high"}, "have no score", {"score": 1.0}),
        ({"score": True}, "have no score", {"score": 1.0}),
        ({"bbox": None}, "have no box", {"bbox": None}),
        ({"bbox": [90, 0, 5, 5]}, "have no box", {"bbox": None}),
        ({"bbox": [1, 1, -5, 5]}, "have no box", {"bbox": None}),
    ],
)
def test_unusable_detection_is_a_false_alarm(file, tmp_path, more, what, expected):
    found = Detections(write_detections(tmp_path, [row(), row(**more), row(**more)]), file)
    assert len(found.faults) == 1
    assert f"detections.json: 2 detections {what}" in found.faults[0].replace("are of", "of")
    assert "(first: number 1)" in found.faults[0]
    assert found.of(file[0])[1] == {"category_id": 2, "score": 0.5, "bbox": BOX, **expected}


def test_detection_of_an_unknown_picture_goes_to_the_stray_one(file, tmp_path):
    found = Detections(write_detections(tmp_path, [row(image_id=77), row()]), file)
    assert "1 detections are of an image that annotations.json does not list" in found.faults[0]
    assert [(one["image_id"], one["category_id"], one["score"]) for one in found.strays] == [(file.stray_image, 2, 0.5)]


def test_record_that_is_none(file, tmp_path):
    found = Detections(write_detections(tmp_path, [5, row()]), file)
    assert len(found.faults) == 4  # image, category, score and box are missing
    assert len(found.strays) == 1


@pytest.mark.parametrize("content", ["{", '{"a": 1}'])
def test_damaged_file(file, tmp_path, content):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(InputError, match=r"d\.json"):
        Detections(tmp_path / "d.json", file)
    with pytest.raises(MissingFileError):
        Detections(tmp_path / "no.json", file)


def test_true_boxes_leave_broken_annotations_out(file):
    assert TrueBoxes().of(file[0]) == [{"category_id": 2, "score": 1.0, "bbox": BOX}]
    assert TrueBoxes().of(file[1]) == []
