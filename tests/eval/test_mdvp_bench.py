"""MDVP-Bench: ratios by file, and the picture that the judge sees."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from judging import Scripted, completion, judge_of, pictures_of, run_quietly, text_of, write_picture
from PIL import Image
from torch.utils.data import ConcatDataset

from eval.mdvp_bench import MdvpBench, read_files
from tap_llm.errors import InputError


@pytest.fixture
def folder(tmp_path):
    write_picture(tmp_path / "images" / "0.png", 320, 240)
    boxes = [
        {
            "image_name": "0.png", "question_id": number, "question": "What about <Region 2>?", "dataset_name": "d",
            "gt_answers": "<Region 1>: a dog\n<Region 2>: a cat", "bbox": [[10, 20, 100, 90], [150, 120, 80, 60]],
        }
        for number in range(2)
    ]  # fmt: skip
    points = {key: value for key, value in boxes[0].items() if key != "bbox"} | {"question": "Describe each point."}
    files = {
        "natural_caption_box": [*boxes, {**boxes[0], "question_id": 2, "bbox": [[500, 0, 5, 5], [1, 1, 5, 5]]}],
        "natural_caption_point": [{**points, "points": [[30, 40], [200, 100]], "gt_answers": ["one", "two"]}],
    }
    for name, records in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return tmp_path


def test_scores_by_hand(folder):
    scripted = Scripted({"points": "two points", "box": "a thing"})
    ratings = {"two points": "4 8", "a thing": "5 6"}

    def reply(text):
        return completion(next(rating for key, rating in ratings.items() if key in text), "judge")

    with judge_of(folder, reply) as (judge, server):
        examples = ConcatDataset(read_files([folder], folder / "images"))
        found = run_quietly(MdvpBench(examples, scripted, judge), folder / "out" / "r.json").results
    # boxes: 6 of 5 twice, 1 of 10 for the box outside; points: 8 of 4
    expected = {"natural_caption_box": 100 * 13 / 20, "natural_caption_point": 200.0, "mean of all": 132.5}
    assert {name: group["score"] for name, group in found["metrics"]["judge judge"].items()} == expected
    assert found["faults"] == ["natural_caption_box/2: box [500, 0, 505, 5] lies wholly outside the image (320x240)"]
    assert scripted.asked[0] == "<image>region 1: <0>\nWhat about region 2 <1>?"
    assert scripted.asked[2] == "<image>region 1: <0>\nregion 2: <1>\nDescribe each point."
    assert len(server.bodies) == 2  # the two questions about boxes are the same
    shown = next(body for body in server.bodies if "two points" in text_of(body))
    assert "The picture shows 2 region(s), marked and numbered" in text_of(shown) and "one\ntwo" in text_of(shown)
    [url] = pictures_of(shown)
    painted = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    scale = painted.width // 320
    plain = np.asarray(
        Image.open(folder / "images" / "0.png").resize(painted.size, Image.Resampling.BICUBIC), dtype=int
    )
    changed = np.abs(np.asarray(painted, dtype=int) - plain).max(2) > 30
    assert changed[40 * scale, 30 * scale] and changed[100 * scale, 200 * scale] and changed.mean() < 0.1


def test_no_files(tmp_path):
    with pytest.raises(InputError, match="there are no JSON files"):
        read_files([tmp_path], None)
