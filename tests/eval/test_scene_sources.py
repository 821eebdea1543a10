"""What pictures hold, and what their regions are called."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.scene_sources import FileSource, SceneSource, truth_of
from tap_llm.data.scenes import SceneComposer
from tap_llm.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_coco(folder, images=5, area_sides=(8, 2)):
    """Pictures of 20 x 30 pixels with squares of some sides, a region without a mask and a crowd."""
    annotations = []
    for image in range(images):
        Image.fromarray(np.full((20, 30, 3), image * 20, dtype=np.uint8)).save(folder / f"{image}.png")
        for side in area_sides:
            x, y = 2, 3
            square = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            annotations.append(
                {"image_id": image, "category_id": 1, "bbox": [x, y, side, side], "segmentation": square}
            )
        annotations.append({"image_id": image, "category_id": 1, "bbox": [0, 0, 9, 9]})
        crowd = {"size": [20, 30], "counts": [0, 600]}
        annotations.append(
            {"image_id": image, "category_id": 1, "bbox": [0, 0, 30, 20], "segmentation": crowd, "iscrowd": 1}
        )
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(images)],
        "annotations": [{"id": i, **record} for i, record in enumerate(annotations)],
        "categories": [{"id": 1, "name": "Square"}],
    }
    path = folder / "boxes.json"
    path.write_text(json.dumps(document))
    return path


def test_file_gives_large_regions_with_masks(tmp_path):
    source = FileSource(write_coco(tmp_path))
    picture = source[1]
    assert len(source) == 5
    assert source.name == f"{tmp_path.name}/boxes"
    assert picture.id == source.ids[1] == f"{source.name}/image 1"
    assert picture.masks.shape == (1, 20, 30)
    assert picture.masks.sum() == 64
    assert picture.left_out == 1  # 4 of 600 pixels
    assert [truth.name for truth in picture.truths] == ["square"]
    assert len(FileSource(write_coco(tmp_path), least_area=0)[1].truths) == 2


def test_every_and_limit(tmp_path):
    path = write_coco(tmp_path)
    assert [name[-1] for name in FileSource(path, every=2).ids] == ["0", "2", "4"]
    assert [name[-1] for name in FileSource(path, every=2, limit=2).ids] == ["0", "2"]


def test_picture_without_regions(tmp_path):
    picture = FileSource(write_coco(tmp_path, area_sides=()))[0]
    assert picture.masks.shape == (0, 20, 30)
    assert picture.truths == []


def test_fingerprint_follows_pixels_and_masks(tmp_path):
    path = write_coco(tmp_path)
    before = [FileSource(path)[index].fingerprint for index in range(2)]
    assert [FileSource(path)[index].fingerprint for index in range(2)] == before
    Image.fromarray(np.full((20, 30, 3), 99, dtype=np.uint8)).save(tmp_path / "0.png")
    assert FileSource(path)[0].fingerprint != before[0]
    path.write_text(path.read_text().replace("Square", "Box"))
    assert FileSource(path)[1].fingerprint != before[1]


def test_regions_of_a_missing_picture_are_known(tmp_path):
    path = write_coco(tmp_path)
    (tmp_path / "3.png").unlink()
    picture = FileSource(path)[3]
    assert picture.masks.sum() == 64
    with pytest.raises(InputError, match=r"there is no file .*3\.png"):
        picture.load()


def test_broken_record_is_named(tmp_path):
    path = write_coco(tmp_path)
    document = json.loads(path.read_text())
    document["annotations"][0]["segmentation"] = {"size": [19, 30], "counts": [0, 570]}
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"boxes/image 0: .*19"):
        FileSource(path)[0]


def test_scenes_are_what_the_composer_makes():
    composer = SceneComposer()
    source = SceneSource("shapes", "drawn", composer, 3, seed=70, size=(96, 64))
    scene, picture = composer.scene(71, (96, 64)), source[1]
    assert source.ids == ["shapes/drawn/70", "shapes/drawn/71", "shapes/drawn/72"]
    assert (np.asarray(picture.image) == scene.image).all()
    assert (picture.masks == scene.masks).all()
    assert [truth.name for truth in picture.truths] == scene.names
    assert [truth.colours for truth in picture.truths] == scene.colours
    assert [truth.captions for truth in picture.truths] == scene.captions
    assert {truth.kind for truth in picture.truths} == {"shape"}
    assert [truth.shape["texture"] for truth in picture.truths] == [about["texture"] for about in scene.attributes]
    assert {truth.shape["size"] for truth in picture.truths} <= {"small", "medium", "large"}


@pytest.mark.parametrize(
    ("category", "attributes", "expected"),
    [
        ("Zany Face", {"kind": "pictogram fluent", "phrase": "a zany face"}, ("zany face", "emoji", [])),
        ("Bravo Juice", {"kind": "grocery", "phrase": "a carton of Bravo Juice", "colours": ["green"]},
         ("carton of bravo juice", "grocery", ["green"])),
        ("shorts", {"kind": "garment", "phrase": "a black shorts", "colours": []}, ("shorts", "garment", ["black"])),
        ("star", {"kind": "shape", "phrase": "a star", "texture": "solid"}, ("star", "shape", [])),
        ("Horse", None, ("horse", "object", [])),
        (None, None, (None, "object", [])),
    ],
)  # fmt: skip
def test_words_of_a_region(category, attributes, expected):
    truth = truth_of({"category": category, "attributes": attributes, "captions": ["A b"]}, 4)
    assert (truth.name, truth.kind, truth.colours) == expected
    assert truth.captions == ["a b"]
    assert truth.id == "4"


def test_long_captions_are_references_too():
    region = {"category": "cat", "captions": ["a cat"], "attributes": {"caption_long": "a cat on the left"}}
    assert truth_of(region, 0).captions == ["a cat", "a cat on the left"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not here")
def test_composed_sample():
    pictures = list(FileSource(SHARED / "composed_sample" / "sample.json"))
    kinds = Counter(truth.kind for picture in pictures for truth in picture.truths)
    assert set(kinds) == {"emoji", "grocery", "garment"}
    assert kinds.total() + sum(picture.left_out for picture in pictures) == 290
    names = {truth.name for picture in pictures for truth in picture.truths}
    assert {"carton of bravo apple juice", "lemon", "shorts", "zany face"} <= names
    assert all(truth.captions for picture in pictures for truth in picture.truths)
