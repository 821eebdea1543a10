"""`RegionSample`: pictures of every kind, masks and boxes, what `check` finds, rows there and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tap_llm.data import RegionSample
from tap_llm.data.features import FEATURES
from tap_llm.data.samples import REGION_COLUMNS
from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import encode_rle

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
POLYGON = [[3, 4, 8, 4, 8, 10, 3, 10]]  # columns 3..7, rows 4..9


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, format="PNG")
    return stream.getvalue()


def square() -> np.ndarray:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:10, 3:8] = True
    return mask


@pytest.mark.parametrize("kind", ["array", "pil", "bytes", "path", "text"])
def test_every_kind_of_picture_gives_the_same_pixels(kind, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes())
    images = {"array": PIXELS, "pil": Image.fromarray(PIXELS), "bytes": png_bytes(), "path": path, "text": str(path)}
    sample = RegionSample(images[kind])
    assert (np.asarray(sample.load_image()) == PIXELS).all()
    assert sample.image_size() == (20, 30)


RUNS = {"size": [20, 30], "counts": [64, 6, 14, 6, 14, 6, 14, 6, 14, 6, 450]}


@pytest.mark.parametrize("mask", [square(), POLYGON, encode_rle(square()), RUNS])
def test_masks_of_every_form(mask):
    sample = RegionSample(PIXELS, [{"box": [0, 0, 2, 2]}, {"mask": mask}])
    assert sample.has_mask.tolist() == [False, True]
    assert (sample.masks() == square()[None]).all()
    assert sample.boxes().tolist() == [[0, 0, 2, 2], [3, 4, 8, 10]]


def test_a_stated_size_serves_without_reading_the_picture(tmp_path):
    sample = RegionSample(tmp_path / "missing.png", [{"mask": POLYGON}], size=(20, 30))
    assert sample.masks().sum() == 30
    with pytest.raises(MissingFileError, match="missing.png"):
        sample.load_image()


def test_points_alone_have_no_box_and_no_regions_give_empty_arrays():
    assert np.isnan(RegionSample(PIXELS, [{"points": [[1, 2]]}]).boxes()).all()
    assert RegionSample(PIXELS).masks().shape == (0, 20, 30)
    assert RegionSample(PIXELS).boxes().shape == (0, 4)


def test_a_single_caption_becomes_captions_and_the_input_stays():
    region = {"box": [0, 0, 2, 2], "caption": "a cat"}
    assert RegionSample(PIXELS, [region]).regions == [{"box": [0, 0, 2, 2], "captions": ["a cat"]}]
    assert region["caption"] == "a cat"


GOOD = {
    "regions": [
        {"id": "12", "box": [0, 0, 9, 9], "mask": POLYGON, "category": "cat", "captions": ["a cat", "it"]},
        {"id": 12, "points": [[1, 2], [3, 4]], "labels": [1, 0], "attributes": {"depth": 3, "colours": ["red"]}},
        {"sketch": [[1, 1], [5, 5]]},
    ],
    "captions": ["a picture"],
    "conversations": [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "region", "index": 2}]},
        {"role": "assistant", "content": "a line"},
    ],
    "id": "7",
    "source": "made up",
    "license": "CC0-1.0",
}


CHAT = GOOD["conversations"]
RECORD = {"question": "Which?", "answer": "this", "regions": [0, 1]}


def talk(part):
    return {"role": "user", "content": [{"type": "image"}, part]}


@pytest.mark.parametrize("turns", [CHAT, [RECORD], [talk({"type": "region", "box": [1, 1, 5, 9]}), CHAT[1]], []])
def test_a_good_sample_passes(turns):
    sample = RegionSample(PIXELS, **{**GOOD, "conversations": turns})
    assert list(sample.problems()) == []
    sample.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": b"no picture"}, "image: .*damaged"),
        ({"image": None}, "image: cannot read a NoneType"),
        ({"size": (30, 20)}, "image: is 30x20, but its record states 20x30"),
        ({"id": 7}, "id: expected text, got int 7"),
        ({"captions": "a picture"}, "captions: expected a list"),
        ({"captions": [" "]}, "captions: is empty"),
        ({"regions": {"box": [0, 0, 1, 1]}}, "regions: expected a list"),
        ({"regions": [[0, 0, 1, 1]]}, r"regions\[0\]: expected one of the dicts"),
        ({"regions": [{}]}, r"regions\[0\]: a region needs one of"),
        ({"regions": [{"bbox": [0, 0, 1, 1]}]}, r'regions\[0\]: unknown key "bbox"; did you mean "box"'),
        ({"regions": [{"box": [5, 5, 5, 9]}]}, r"regions\[0\]: box .* has no area"),
        ({"regions": [{"box": [5, 5, float("nan"), 9]}]}, r"regions\[0\]: box .* NaN"),
        ({"regions": [{"box": [40, 5, 50, 9]}]}, r"regions\[0\]: box .* outside the image \(30x20\)"),
        ({"regions": [{"id": 4, "mask": np.zeros((20, 30), bool)}]}, r"regions\[0\] \(id 4\): mask is empty"),
        ({"regions": [{"mask": np.ones((9, 9), bool)}]}, "mask is 9x9, but the image is 30x20"),
        ({"regions": [{"mask": {"size": [20, 30], "counts": "abc~"}}]}, "RLE"),
        ({"regions": [{"mask": POLYGON, "labels": [1]}]}, '"labels" need "points"'),
        ({"regions": [{"mask": POLYGON, "box": [1, 1, 1, 1]}]}, "has no area"),
        ({"regions": [{"box": [0, 0, 1, 1], "captions": [""]}]}, r"regions\[0\]: captions: is empty"),
        ({"regions": [{"box": [0, 0, 1, 1], "caption": 3}]}, "caption: expected text, got int 3"),
        ({"regions": [{"box": [0, 0, 1, 1], "category": 3}]}, "category: expected text, got int 3"),
        ({"regions": [{"box": [0, 0, 1, 1], "attributes": "red"}]}, "attributes: expected a dict"),
        ({"regions": [{"box": [0, 0, 1, 1], "id": 4}] * 2}, r"regions\[1\] \(id 4\): another region has the same id"),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"conversations\[0\]: expected .*got keys from, value"),
        ({"conversations": [{"question": "x", "answer": ""}]}, r"conversations\[0\]: answer: is empty"),
        ({"conversations": [{"question": "x", "answer": "y", "regions": [3]}]}, "region index 3: there are 3 regions"),
        ({"conversations": [CHAT[0] | {"role": "bot"}]}, "message 0: unknown role 'bot'; roles are system"),
        ({"conversations": [CHAT[0]]}, "conversations: no message of the assistant"),
        ({"conversations": [*CHAT, RECORD]}, r"conversations\[2\]: messages and questions with answers are mixed"),
        ({"conversations": [talk({"type": "region", "index": 3}), CHAT[1]]}, "message 0: region part 3 has no region"),
        ({"conversations": [talk({"type": "region", "box": [5, 5, 5, 9]}), CHAT[1]]}, "conversations: box .* no area"),
        ({"conversations": [RECORD | {"question": "Is it <Prompt2>?"}]}, "<Prompt2> stands for no region: there are 2"),
        ({"conversations": [{"role": "user", "content": 5}]}, "content: expected text or a list of parts"),
    ],
)  # fmt: skip
def test_check_names_the_field(change, message):
    with pytest.raises(InputError, match=message):
        RegionSample(**{"image": PIXELS, **GOOD, **change}).check()


def test_problems_lists_all_of_them():
    regions = [{"box": [5, 5, 5, 9], "captions": [""]}, {"box": [0, 0, 1, 1]}, {"mask": [[1, 2]]}]
    problems = list(RegionSample(PIXELS, regions, captions=[""]).problems())
    assert [problem.split(":")[0] for problem in problems] == ["captions", "regions[0]", "regions[0]", "regions[2]"]


def test_rows_there_and_back():
    sample = RegionSample(PIXELS, **GOOD)
    row = sample.to_row()
    assert row.keys() == FEATURES.keys()
    assert tuple(FEATURES["regions"].feature) == REGION_COLUMNS
    stored = FEATURES.decode_example(FEATURES.encode_example(row))
    back = RegionSample.from_row(stored)
    assert (np.asarray(back.load_image()) == PIXELS).all()
    assert (back.masks() == sample.masks()).all()
    expected = [dict(region) for region in sample.regions]
    expected[0]["mask"] = encode_rle(square())
    assert back.regions == expected
    assert [region.get("id") for region in back.regions] == ["12", 12, None]
    for name in ("captions", "conversations", "id", "source", "license"):
        assert getattr(back, name) == getattr(sample, name)


def test_a_row_keeps_the_bytes_of_a_file(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, quality=60)
    assert RegionSample(path).to_row()["image"] == {"bytes": path.read_bytes(), "path": None}
