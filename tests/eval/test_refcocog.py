"""RefCOCOg's captions in both groupings."""

from __future__ import annotations

import json

import pytest
from judging import Scripted, rectangle, run_quietly, write_picture

from eval.caption_records import CaptionPictures
from eval.captions import java
from eval.refcocog import PROTOCOLS, main
from eval.region_captions import RegionCaptions, TapCaptioner

NAME = "COCO_train2014_1.png"
BOX, OTHER = [4, 5, 20, 10], [1, 1, 8, 9]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(java, "missing_reason", lambda: "no Java")


def write(path, images, annotations):
    """As MDETR lays it out: an image record is one expression, so pictures are listed several times."""
    write_picture(path.parent / "train2014" / NAME)
    known = [{"file_name": NAME, "height": 30, "width": 40, **image} for image in images]
    path.write_text(json.dumps({"images": known, "annotations": annotations}))
    return path


def evaluate(file, answers, protocol):
    how = PROTOCOLS[protocol]
    return run_quietly(RegionCaptions(how, CaptionPictures(file, None, how), answers), file.with_suffix(".out.json"))


def test_references_of_an_image_record_belong_together(tmp_path):
    """Three records, one of which has two captions for its box, and one that points at two boxes."""
    images = [{"id": 1}, {"id": 2, "caption": "the big old dog"}, {"id": 3}]
    annotations = [
        {"id": 1, "image_id": 1, "bbox": BOX, "caption": "a red cup on top"},
        {"id": 2, "image_id": 1, "bbox": BOX, "caption": "the cup"},
        {"id": 3, "image_id": 2, "bbox": OTHER},
        {"id": 4, "image_id": 3, "bbox": BOX, "caption": "a cup"},
        {"id": 5, "image_id": 3, "bbox": OTHER, "caption": "a dog"},
    ]
    scripted = Scripted({"[4, 5, 24, 15]": "a red cup on top", "[1, 1, 9, 10]": "the big old dog"})
    found = evaluate(write(tmp_path / "val.json", images, annotations), scripted, "refcocog-glamm")
    [prediction] = found.predictions  # the picture is read once
    assert [region["references"] for region in prediction["regions"]] == [
        ["a red cup on top", "the cup"], ["the big old dog"], ["a cup", "a dog"],
    ]  # fmt: skip
    assert prediction["answers"] == ["a red cup on top", "the big old dog", None]
    metrics = found.results["metrics"]
    assert metrics["regions"] == 3
    assert metrics["unofficial_rouge_l"] == pytest.approx(2 / 3)
    # the closest reference has five, four and two words (no answer: the shortest); all nine that are said are right
    assert metrics["unofficial_bleu_1"] == pytest.approx(2.718281828 ** (1 - 11 / 9))
    [fault] = found.results["faults"]
    assert "annotation 4 of image 3: another annotation of it points elsewhere" in fault
    assert "marked by region 1 <0>?" in scripted.asked[0]


def test_masks_with_one_reference_each(tmp_path):
    """Osprey: polygons and RLE; a mask of another size is a fault."""
    images = [{"id": 1, "caption": "a red cup on top"}, {"id": 2, "caption": "the big old dog"}, {"id": 3}]
    annotations = [
        {"id": 1, "image_id": 1, "segmentation": [[4, 5, 24, 5, 24, 15, 4, 15]], "bbox": BOX},
        {"id": 2, "image_id": 2, "segmentation": rectangle(1, 1, 9, 10)},
        {"id": 3, "image_id": 3, "segmentation": rectangle(1, 1, 9, 10, width=20), "caption": "a cat"},
        {"id": 4, "image_id": 3, "segmentation": rectangle(1, 1, 9, 10), "caption": "one two three four"},
    ]
    scripted = Scripted({"[4, 5": "a red cup on top", "counts": "the big old dog"})
    found = evaluate(write(tmp_path / "val.json", images, annotations), scripted, "refcocog-osprey")
    [prediction] = found.predictions
    assert [region["references"] for region in prediction["regions"]] == [
        ["a red cup on top"], ["the big old dog"], ["a cat"], ["one two three four"],
    ]  # fmt: skip
    assert prediction["answers"] == ["a red cup on top", "the big old dog", None, "the big old dog"]
    assert prediction["shown"][0] == [{"mask": rectangle(4, 5, 24, 15)}]
    assert found.results["metrics"]["unofficial_cider_d"] == pytest.approx(10 * 2 / 4)
    [fault] = found.results["faults"]
    assert "annotation 3 of image 3: mask is 20x30, but the image is 40x30" in fault


def test_masks_prompt_with_box_and_points(pipe, tmp_path):
    """As the pipeline does it; slot 0 is the box's."""
    mask = rectangle(4, 5, 24, 15)
    file = write(tmp_path / "val.json", [{"id": 1, "caption": "x"}], [{"id": 1, "image_id": 1, "segmentation": mask}])
    [prediction] = evaluate(file, TapCaptioner(pipe), "refcocog-osprey").predictions
    [result] = pipe(tmp_path / "train2014" / NAME, [{"mask": mask}])
    assert prediction["answers"] == [result["caption"]]


def test_command_on_the_bundled_model(tmp_path, capsys):
    images = [{"id": 1, "caption": "a red cup"}, {"id": 2, "caption": "a dog"}]
    annotations = [{"id": n, "image_id": n, "segmentation": rectangle(1, 1, 30, 20 + n)} for n in (1, 2)]
    file = write(tmp_path / "val.json", images, annotations)
    typed = ["--protocol", "refcocog-osprey", "--data", str(file), "--device", "cpu", "--out", str(tmp_path / "r.json")]
    results = main(typed).results
    assert (results["protocol"], results["examples"], results["regions"]) == ("refcocog-osprey-v1", 1, 2)
    assert results["metrics"]["answered"] == 1
    assert "regions/s" in capsys.readouterr().out
