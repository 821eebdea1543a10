"""Clicks: what is measured, bad input, and that nothing depends on batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco_document, write_coco

from eval.base import cases_path, describe_model, run
from eval.interactive import CLICKS, SHOWN, Interactive, MaskedSamples, main
from eval.overlap import iou
from tap_llm.errors import InputError
from tap_llm.masks import decode_rle, encode_rle, polygons_to_mask
from training.prompts import centre_click

BOXES = [(4, 3, 10, 12), (20, 10, 12, 12), (2, 14, 9, 15)]


def masks():
    return [polygons_to_mask([[x, y, x + w, y, x + w, y + h, x, y + h]], HEIGHT, WIDTH) for x, y, w, h in BOXES]


def records():
    return [annotation(1, 1, BOXES[0]), annotation(1, 2, BOXES[1]), annotation(2, 1, BOXES[2])]


@pytest.fixture
def oracle(monkeypatch):
    """Stands in for a model: one more row of the true mask per click, all of it from the fifth on."""

    class Oracle:
        asked: list = []

        def __init__(self, pipe, images, batch_size):
            self.pictures = len(images)

        def ask(self, regions):
            self.asked.append(regions)
            assert len(regions) == self.pictures
            return [[Shown(prompt) for prompt in of_one] for of_one in regions]

    class Shown:
        def __init__(self, prompt):
            x, y = prompt["points"][0]
            true = next(mask for mask in masks() if mask[y, x])
            rows = np.flatnonzero(true.any(1))[: len(prompt["points"])]
            self.mask = np.zeros_like(true)
            self.mask[rows] = true[rows]
            self.mask = true if len(rows) >= 5 else self.mask

        def rle(self):
            return encode_rle(self.mask)

    monkeypatch.setattr("eval.interactive.EncodedPictures", Oracle)
    Oracle.asked.clear()
    return Oracle


def go(folder, document, pipe=None, model=None, batch_size=2, **options):
    samples = MaskedSamples(write_coco(folder, document), **options)
    return run(
        Interactive(pipe, samples), folder / "r.json", model or {"sha256": "1"}, report=lambda line: None,
        progress=False, fresh=True, batch_size=batch_size,
    )  # fmt: skip


def test_means_by_hand(oracle, tmp_path):
    results = go(tmp_path, coco_document(records())).results
    heights = np.array([12, 12, 15])
    expected = {f"clicks_{count}_miou": float((count / heights).mean()) for count in (1, 3)}
    expected |= {f"clicks_{count}_miou": 1.0 for count in (5, 7, 9)}
    assert results["metrics"] == pytest.approx({"true_regions": 3, **expected})
    assert (results["protocol"], results["regions"], results["faults"]) == ("interactive-v1", 3, [])
    assert SHOWN == (1, 3, 5, 7, 9)
    (group,) = json.loads(cases_path(tmp_path / "r.json").read_text())
    assert "0.07, 0.13" in group["worst"][0]["text"]
    assert decode_rle(group["worst"][0]["truth"][0]["mask"]).sum() == 9 * 15


def test_all_pictures_click_together_and_stop_where_nothing_is_wrong(oracle, tmp_path):
    go(tmp_path, coco_document(records()))
    assert len(oracle.asked) == CLICKS
    assert [len(region["points"]) for picture in oracle.asked[-1] for region in picture] == [5, 5, 5]
    pixels, _ = centre_click(torch.from_numpy(np.stack(masks()[:2])))
    assert [region["points"] for region in oracle.asked[0][0]] == [[pixel] for pixel in pixels.tolist()]


def test_crowds_and_pictures_without_masks(oracle, tmp_path):
    crowd = annotation(3, 1, BOXES[0], iscrowd=1)
    results = go(tmp_path, coco_document([*records(), crowd], images=3)).results
    assert results["metrics"]["true_regions"] == 3
    assert results["examples"] == 3


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"segmentation": {"size": [5, 7], "counts": [0, 35]}}, "image 2: region 3: mask is 7x5"),
        ({"image_id": 9}, "annotation 3: there is no image 9"),
    ],
)
def test_broken_region_counts_as_zero(oracle, tmp_path, more, fault):
    document = coco_document([*records()[:2], {**records()[2], **more}])
    results = go(tmp_path, document).results
    assert len(results["faults"]) == 1
    assert fault in results["faults"][0]
    assert results["metrics"]["true_regions"] == 3
    assert results["metrics"]["clicks_9_miou"] == pytest.approx(2 / 3)


def test_broken_picture_counts_as_zero(oracle, tmp_path):
    (tmp_path / "1.png").write_text("no picture")
    results = go(tmp_path, coco_document(records())).results
    assert len(results["faults"]) == 1
    assert "1.png' is damaged" in results["faults"][0]
    assert results["metrics"]["clicks_9_miou"] == pytest.approx(1 / 3)


def test_broken_line_of_a_file_counts_as_one_region(oracle, tmp_path):
    document = coco_document(records()[:1], images=1)
    write_coco(tmp_path, document)
    good = {"image": "1.png", "regions": [{"mask": encode_rle(masks()[0])}]}
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({"image": "1.png", "regions": 5}) + "\n")
    samples = MaskedSamples(path)
    assert len(samples) == 2
    assert samples[1].problem
    results = run(
        Interactive(None, samples), tmp_path / "r.json", {"sha256": "1"}, report=lambda line: None, progress=False
    ).results
    assert results["metrics"]["true_regions"] == 2
    assert results["metrics"]["clicks_9_miou"] == pytest.approx(0.5)
    assert len(results["faults"]) == 1


def test_every_and_empty_files(tmp_path):
    path = write_coco(tmp_path, coco_document(records(), images=5))
    assert [one.id for one in MaskedSamples(path, every=2)] == ["image 1", "image 3", "image 5"]
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**coco_document([]), "images": []}))
    with pytest.raises(InputError):
        MaskedSamples(empty)


def test_results_do_not_depend_on_batches(pipe, tmp_path):
    """Later clicks follow the masks: with random weights only the first few can be compared."""
    model = describe_model(pipe, "tiny")
    whole, single = (go(tmp_path, coco_document(records()), pipe, model, size).results["metrics"] for size in (2, 1))
    for count in (1, 3):
        assert whole[f"clicks_{count}_miou"] == pytest.approx(single[f"clicks_{count}_miou"], abs=0.01)


def test_command(model_folder, pipe, tmp_path, capsys):
    path, out = write_coco(tmp_path, coco_document(records())), tmp_path / "r.json"
    finished = main(["--model", str(model_folder), "--data", str(path), "--out", str(out), "--device", "cpu"])
    region = finished.predictions[1]["regions"][0]
    assert region["ious"][-1] == pytest.approx(iou(decode_rle(region["mask"]), masks()[2]))
    assert len(region["ious"]) == CLICKS
    first = {"points": region["prompt"]["points"][:1], "labels": [1]}
    alone = pipe(tmp_path / "2.png", [first], captions=False)[0]
    assert iou(alone["mask"], masks()[2]) == pytest.approx(region["ious"][0], abs=0.01)
    assert "clicks_9_miou" in capsys.readouterr().out
