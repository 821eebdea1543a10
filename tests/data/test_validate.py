"""`tap-llm data validate`: every broken record is listed with its place and reason."""

from __future__ import annotations

import numpy as np
import pytest

from tap_llm import cli
from tap_llm.data import RegionSample, write_parquet
from tap_llm.masks import encode_rle

EMPTY = encode_rle(np.zeros((20, 30), dtype=bool))
SMALL = encode_rle(np.ones((10, 10), dtype=bool))


def run(capsys, *args):
    """Exit status, lines of stdout, stderr."""
    status = cli.main(["data", "validate", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_a_good_file(coco_file, capsys):
    status, lines, err = run(capsys, coco_file)
    assert (status, lines) == (0, [])
    assert "left out 1 crowd regions" in err
    assert "2 samples checked, 2 good with 3 regions, 0 broken" in err


CASES = [
    ('{"image": "1.png", ', "not valid JSON"),
    ("[]", "expected a JSON object, got list"),
    ({"image": "missing.png"}, "image: there is no file"),
    ({"image": "damaged.png"}, "damaged"),
    ({"image": "1.png", "regions": [{"box": [50, 5, 60, 9]}]}, "regions[0]: box [50, 5, 60, 9] lies wholly outside"),
    ({"image": "1.png", "regions": [{"box": [9, 5, 9, 8]}]}, "has no area"),
    ({"image": "1.png", "regions": [{"box": [0, 5, float("nan"), 8]}]}, "contains NaN"),
    ({"image": "1.png", "regions": [{"mask": SMALL}]}, "mask is 10x10, but the image is 30x20"),
    ({"image": "1.png", "regions": [{"id": 9, "mask": EMPTY}]}, "regions[0] (id 9): mask is empty"),
    ({"image": "1.png", "boxes": []}, 'unknown key "boxes"'),
    ({"image": "1.png", "regions": [{"bbox": [1, 2, 3, 4]}]}, 'unknown key "bbox"; did you mean "box"'),
    ({"image": "1.png", "regions": {"box": [1, 2, 3, 4]}}, "regions: expected a list"),
    ({"image": "1.png", "regions": [{"box": "1, 2, 3, 4"}]}, "must be four numbers"),
    ({"image": "1.png", "regions": [{"box": [1, 2, 3, 4], "caption": " "}]}, "captions: is empty"),
    ({"image": "1.png", "id": "a"}, "id: 'a' is used twice"),
    ({"image": "1.png", "size": [30, 20]}, "image: is 30x20, but its record states 20x30"),
]


def test_every_broken_line_is_listed(folder, capsys):
    folder.picture("1.png")
    (folder.path / "damaged.png").write_bytes((folder.path / "1.png").read_bytes()[:200])
    good = [{"image": "1.png", "id": "a", "regions": [{"box": [0, 0, 9, 9]}]}, ""]
    path = folder.lines("train.jsonl", [*good, *(record for record, _ in CASES), {"image": "1.png"}])
    status, lines, err = run(capsys, path)
    assert status == 2
    assert len(lines) == len(CASES)
    for number, (line, (_, reason)) in enumerate(zip(lines, CASES, strict=True), 3):
        assert line.startswith(f"line {number}: ")
        assert reason in line
    assert len(err.splitlines()) == 1
    assert f"18 samples checked, 2 good with 1 regions, {len(CASES)} broken" in err
    assert "--image-root" in err


def test_several_faults_of_a_record_and_faults_of_the_file(folder, coco_document, coco_file, capsys):
    coco_document["annotations"][0]["bbox"] = [3, 4, 0, 6]
    coco_document["annotations"][1]["segmentation"] = {"size": [20, 30], "counts": [40, 5]}
    coco_document["annotations"].append({"id": 99, "image_id": 8, "bbox": [0, 0, 1, 1]})
    status, lines, err = run(capsys, folder.json("coco.json", coco_document))
    assert status == 2
    assert [line.split(": ")[:2] for line in lines] == [
        ["annotation 99", "there is no image 8"],
        ["image 1", "regions[0] (id 10)"],
        ["image 1", "regions[1] (id 11)"],
    ]
    assert "1 broken, 1 faults of the file as a whole" in err


def test_limit_and_format(folder, capsys):
    folder.picture("1.png")
    path = folder.lines("lines.txt", ["{broken", {"image": "1.png"}, {"image": "1.png"}])
    status, lines, _ = run(capsys, path, "--format", "jsonl", "--limit", 1)
    assert status == 2
    assert len(lines) == 1
    assert "1 samples checked" not in lines[0]


def test_image_root(folder, capsys):
    folder.picture("photos/1.png")
    path = folder.lines("a.jsonl", [{"image": "1.png"}])
    assert run(capsys, path)[0] == 2
    assert run(capsys, path, "--image-root", folder.path / "photos")[0] == 0


def test_parquet(folder, capsys):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    samples = [RegionSample(pixels, [{"box": [0, 0, x, 9]}]) for x in (9, 0)]
    status, lines, _ = run(capsys, *write_parquet(samples, folder.path / "a.parquet"))
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("row 1: regions[0]: box [0.0, 0.0, 0.0, 9.0] has no area")


@pytest.mark.parametrize(
    ("content", "message"), [("", "there are no samples"), ("just text", "known formats"), ("{", "not valid JSON")]
)
def test_hopeless_files(folder, capsys, content, message):
    (folder.path / "a.json").write_text(content)
    status, lines, err = run(capsys, folder.path / "a.json", *(["--format", "jsonl"] if not content else []))
    assert (status, lines) == (2, [])
    assert message in err


def test_real_sets(shared_data, capsys):
    status, lines, err = run(capsys, shared_data / "composed_sample" / "sample.json", "--limit", 5)
    assert (status, lines) == (0, [])
    assert "5 good" in err
