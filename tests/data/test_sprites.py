"""Sprites: every folder form, names, sampling, and the split into known and novel names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tap_llm.data.shapes import SHAPE_NAMES
from tap_llm.data.sprites import BUNDLED, KIND_WEIGHTS, Sprite, SpriteLibrary
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle

BOX = (slice(4, 16), slice(3, 23))  # rows and columns of the object in the made-up pictures


def sprite(name: str, kind: str = "emoji", subgroup: str = "any") -> Sprite:
    return Sprite(name, f"a {name}", kind, "group", subgroup, (), np.zeros((4, 4, 4), dtype=np.uint8))


def cut_out(colour: tuple[int, int, int]) -> Image.Image:
    """A block of colour on transparent ground whose hidden colour is green."""
    pixels = np.full((20, 30, 4), (0, 255, 0, 0), dtype=np.uint8)
    pixels[BOX] = (*colour, 255)
    return Image.fromarray(pixels)


def coco_folder(folder: Path, file: str, category: dict, **extra: object) -> Path:
    """One picture, one blue object on white, as COCO JSON."""
    picture = np.full((20, 30, 3), 255, dtype=np.uint8)
    picture[BOX] = (26, 93, 191)
    mask = (picture[..., 0] == 26).astype(np.uint8)
    Image.fromarray(picture).save(folder / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": encode_rle(mask), **extra}
    image = {"id": 1, "file_name": "a.png", "width": 30, "height": 20}
    data = {"images": [image], "categories": [{"id": 1, **category}], "annotations": [annotation]}
    (folder / file).write_text(json.dumps(data))
    return folder


# Folders


def test_named_files(tmp_path: Path) -> None:
    cut_out((200, 20, 30)).save(tmp_path / "Fire_truck.png")
    (tmp_path / "owl").mkdir()
    cut_out((120, 70, 50)).save(tmp_path / "owl" / "7.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "opaque.png")
    library = SpriteLibrary.from_folders([tmp_path])
    assert library.names == ["fire truck", "owl"]
    assert [s.phrase for s in library.sprites] == ["a fire truck", "an owl"]
    assert [s.colours[0] for s in library.sprites] == ["red", "brown"]


def test_pixels_are_premultiplied(tmp_path: Path) -> None:
    cut_out((200, 20, 30)).save(tmp_path / "block.png")
    pixels = SpriteLibrary.from_folders([tmp_path]).sprites[0].pixels
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 30, 4)
    assert pixels[0, 0].tolist() == [0, 0, 0, 0] and pixels[10, 10].tolist() == [200, 20, 30, 255]


def test_large_files_are_reduced(tmp_path: Path) -> None:
    cut_out((200, 20, 30)).resize((1200, 800)).save(tmp_path / "block.png")
    assert SpriteLibrary.from_folders([tmp_path]).sprites[0].pixels.shape == (171, 256, 4)


def test_coco_products_take_their_phrase(tmp_path: Path) -> None:
    category = {"name": "Granny Smith", "phrase": "a Granny Smith apple", "coarse": "Apple"}
    only = SpriteLibrary.from_folders([coco_folder(tmp_path, "iconic.json", category)]).sprites[0]
    assert (only.name, only.phrase, only.kind) == ("granny smith apple", "a granny smith apple", "grocery")
    assert only.subgroup == "Apple" and only.colours == ("blue",)
    assert only.pixels.shape == (14, 22, 4)  # the mask's box with a margin of one pixel
    assert (only.pixels[..., 3] > 127).sum() == 12 * 20


def test_coco_garments_take_their_captions_colour(tmp_path: Path) -> None:
    category = {"name": "shorts", "source_label": "Shorts"}
    folder = coco_folder(tmp_path, "train.json", category, caption="a grey and light blue shorts")
    only = SpriteLibrary.from_folders([folder]).sprites[0]
    assert (only.name, only.phrase, only.kind) == ("shorts", "shorts", "garment")
    assert only.colours == ("grey", "light blue")
    with pytest.raises(InputError):
        SpriteLibrary.from_folders([folder], split="val")


def test_coco_instances_must_stand_free_and_be_large(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path, "instances_train.json", {"name": "zebra"})
    assert SpriteLibrary.from_folders([folder]).names == ["zebra"]
    data = json.loads((folder / "instances_train.json").read_text())
    cut = np.zeros((20, 30), dtype=np.uint8)
    cut[5:15, 0:20] = 1
    data["annotations"][0]["segmentation"] = encode_rle(cut)
    (folder / "instances_train.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="holds none"):
        SpriteLibrary.from_folders([folder])


def test_own_index(tmp_path: Path) -> None:
    cut_out((200, 20, 30)).save(tmp_path / "x.png")
    entries = [{"file": "x.png", "name": "Bus", "kind": "toy"}, {"file": "x.png", "name": "keys", "phrase": "Keys"}]
    (tmp_path / "sprites.json").write_text(json.dumps({"sprites": entries}))
    first, second = SpriteLibrary.from_folders([tmp_path]).sprites
    assert (first.name, first.phrase, first.kind, first.group) == ("bus", "a bus", "toy", "object")
    assert (second.phrase, second.colours) == ("keys", ("red",))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"sprites": [{"name": "x"}]}', '{"sprites": [{"file": "no", "name": "x"}]}']
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sprites.json").write_text(text)
    with pytest.raises(InputError, match="sprite"):
        SpriteLibrary.from_folders([tmp_path])


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    for folder in (tmp_path / "no", tmp_path):
        with pytest.raises(InputError, match=folder.name):
            SpriteLibrary.from_folders([folder])


def test_bundled_sprites_are_small_free_and_known() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 300_000
    assert "MIT License" in (BUNDLED / "LICENSE").read_text("utf-8")
    library = SpriteLibrary.bundled()
    assert 40 <= len(library.names) == len(library) <= 60
    assert all(s.name in s.phrase and s.colours and s.group for s in library.sprites)


def test_names_of_the_real_sets(shared_data: Path) -> None:
    names = SpriteLibrary.from_folders([shared_data / "grocery", shared_data / "coco_open"]).names
    assert {"golden delicious apple", "carton of bravo apple juice", "satsumas", "zebra"} & set(names)
    assert all(name == name.lower() for name in names)
    assert len(json.loads((shared_data / "emoji" / "objects.json").read_text())["objects"]) == 1059


# Sampling


def test_kinds_by_weight_then_names_alike() -> None:
    library = SpriteLibrary(
        [sprite("cat"), sprite("owl")] + [sprite("owl")] * 8 + [sprite("kiwi", "grocery")] * 50 + [sprite("x", "toy")]
    )
    rng = np.random.default_rng(0)
    drawn = Counter(library.sample(rng).name for _ in range(6000))
    total = KIND_WEIGHTS["emoji"] + KIND_WEIGHTS["grocery"] + KIND_WEIGHTS["object"]
    for name, share in {"cat": 0.3, "owl": 0.3, "kiwi": 0.17, "x": 0.06}.items():
        assert drawn[name] / 6000 == pytest.approx(share / total, abs=0.025)


# Known and novel names


def test_split_holds_out_a_share_of_each_subgroup() -> None:
    sprites = [sprite(f"{group}{i}", subgroup=group) for group in "ab" for i in range(50)]
    known, novel = SpriteLibrary(sprites).split_names(0.12)
    assert not set(known.names) & set(novel.names) and len(known.names) + len(novel.names) == 100
    assert {Counter(s.subgroup for s in novel.sprites)[group] for group in "ab"} == {6}
    again, other = (SpriteLibrary(sprites).split_names(0.12, seed)[1].names for seed in (0, 1))
    assert again == novel.names != other


def test_split_takes_fair_shares_of_small_subgroups() -> None:
    sprites = [sprite(f"{i}", subgroup=str(i // 2)) for i in range(400)]
    assert 25 < len(SpriteLibrary(sprites).split_names(0.12)[1].names) < 75


def test_a_name_of_two_kinds_stays_on_one_side_and_shapes_stay_known() -> None:
    shared = [sprite(f"n{i}", kind, kind) for i in range(30) for kind in ("emoji", "garment")]
    known, novel = SpriteLibrary([*shared, *map(sprite, SHAPE_NAMES)]).split_names(0.5)
    assert not set(known.names) & set(novel.names)
    assert set(SHAPE_NAMES) <= set(known.names) and len(novel.names) == 15
    with pytest.raises(InputError, match="empty"):
        SpriteLibrary([sprite("star")]).split_names(0.5)
