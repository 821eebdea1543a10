"""Readers of sprite folders, one per form (see `SpriteLibrary.from_folders`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ..errors import InputError
from ..images import load_image, open_image
from ..masks import BoolArray, decode_rle, mask_to_box, polygons_to_mask
from .colours import name_colours, words_in
from .sprites import Sprite
from .wording import split_article, with_article

MAX_SIDE = 256  # larger cut-outs are reduced: scenes draw them smaller
MIN_AREA = 0.05  # instances of photos: least share of the picture
_MIN_OPAQUE = 64  # pixels; less is no picture of anything


def read_folder(folder: Path, split: str = "train") -> list[Sprite]:
    """All sprites of a folder; InputError where there are none, or a file is not in the form that its name says."""
    if not folder.is_dir():
        raise InputError(f"sprites: there is no folder {folder}")
    try:
        sprites = list(_read_known_form(folder, split))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"sprites: a JSON file in {folder} lacks something or is in another form ({error!r})"
        ) from error
    if not sprites:
        raise InputError(f"sprites: {folder} holds none; expected sprites.json, COCO JSON with masks, or <name>.png")
    return sprites


def _read_known_form(folder: Path, split: str) -> Iterator[Sprite]:
    coco = [folder / name for name in ("iconic.json", f"{split}.json", f"instances_{split}.json")]
    if (folder / "sprites.json").is_file():
        yield from _read_index(folder / "sprites.json")
    elif (folder / "objects.json").is_file():
        yield from _read_pictograms(folder / "objects.json")
    elif any(path.is_file() for path in coco):
        for path in coco:
            yield from _read_coco(path) if path.is_file() else ()
    else:
        yield from _read_named_files(folder)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"sprites: cannot read {path} ({error})") from error


def _read_index(path: Path) -> Iterator[Sprite]:
    """The library's own form: a list of sprites with their files."""
    for entry in _read_json(path)["sprites"]:
        name, labels = entry["name"].lower(), {"kind": "object", "group": "object", "subgroup": "object"}
        labels |= {key: entry[key] for key in labels if key in entry}
        pixels = _read_cut_out(path.parent / entry["file"])
        phrase = entry.get("phrase", with_article(name)).lower()
        yield Sprite(name, phrase, colours=tuple(entry.get("colours") or _colours(pixels)), pixels=pixels, **labels)


def _read_pictograms(path: Path) -> Iterator[Sprite]:
    """Pictograms with one file per drawing style."""
    for entry in _read_json(path)["objects"]:
        for file in entry["files"].values():
            pixels = _read_cut_out(path.parent / file["file_name"])
            colours = tuple(file.get("colours") or _colours(pixels))
            name, phrase = entry["name"].lower(), entry["phrase"].lower()
            yield Sprite(name, phrase, "emoji", entry["group"], entry["subgroup"], colours, pixels)


def _read_named_files(folder: Path) -> Iterator[Sprite]:
    """`<name>.png` and `<name>/*.png`; pictures without transparency are passed over."""
    for path in sorted([*folder.glob("*.png"), *folder.glob("*/*.png")]):
        pixels = _read_cut_out(path)
        if pixels[..., 3].min() == 255:
            continue
        name = (path.stem if path.parent == folder else path.parent.name).replace("_", " ").strip().lower()
        yield Sprite(name, with_article(name), "object", "object", "object", _colours(pixels), pixels)


def _read_coco(path: Path) -> Iterator[Sprite]:
    """Objects of pictures, cut out by their masks."""
    data = _read_json(path)
    categories = {entry["id"]: entry for entry in data["categories"]}
    images = {entry["id"]: entry for entry in data["images"]}
    in_photos = path.name.startswith("instances")
    open_file, picture = "", Image.new("RGB", (1, 1))
    for entry in data["annotations"]:
        if not entry.get("segmentation") or entry.get("iscrowd"):
            continue
        image = images[entry["image_id"]]
        mask = read_mask(entry["segmentation"], image["height"], image["width"])
        if mask.sum() < _MIN_OPAQUE or (in_photos and not _stands_free(mask)):
            continue
        if open_file != image["file_name"]:
            open_file, picture = image["file_name"], load_image(path.parent / image["file_name"])
        pixels = _cut_out(picture, mask)
        name, phrase, kind, group, subgroup = _coco_words(categories[entry["category_id"]])
        colours = words_in(entry.get("caption", "")) if kind == "garment" else ()
        yield Sprite(name, phrase, kind, group, subgroup, colours or _colours(pixels), pixels)


def _coco_words(category: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Name, phrase, kind, group, subgroup of a category."""
    if "coarse" in category:  # products with a fine and a coarse class; the phrase says more than the name
        phrase = category.get("phrase", category["name"]).lower()
        return split_article(phrase)[1], phrase, "grocery", "grocery", category["coarse"]
    name = category["name"].lower()
    if "source_label" in category:
        return name, with_article(name), "garment", "garment", "garment"
    return name, with_article(name), "object", "object", category.get("supercategory", "object")


def read_mask(segmentation: Any, height: int, width: int) -> BoolArray:
    if isinstance(segmentation, dict):
        return decode_rle(segmentation)
    return polygons_to_mask(segmentation, height, width)


def _stands_free(mask: BoolArray) -> bool:
    """Large enough, and not cut by the picture's frame."""
    frame = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    return bool(mask.mean() > MIN_AREA and not frame)


def _cut_out(picture: Image.Image, mask: BoolArray) -> NDArray[np.uint8]:
    box = mask_to_box(mask)
    assert box is not None
    x0, y0, x1, y1 = box
    inside = np.pad(mask[y0:y1, x0:x1], 1)
    alpha = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(0.5))
    cut = picture.crop((x0 - 1, y0 - 1, x1 + 1, y1 + 1))
    cut.putalpha(alpha)
    return _premultiplied(cut)


def _read_cut_out(path: Path) -> NDArray[np.uint8]:
    return _premultiplied(open_image(path, "sprite"))


def _premultiplied(picture: Image.Image) -> NDArray[np.uint8]:
    """(h, w, 4) uint8, colours times alpha, longest side at most `MAX_SIDE`."""
    picture = picture.convert("RGBA").convert("RGBa")
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    return np.frombuffer(picture.tobytes(), dtype=np.uint8).reshape(picture.height, picture.width, 4)


def _colours(pixels: NDArray[np.uint8]) -> tuple[str, ...]:
    """Colour words of the opaque pixels, which premultiplied colours show as they are."""
    return name_colours(pixels[..., :3][pixels[..., 3] > 250])
