"""Backgrounds of scenes: random crops of pictures, or drawn ones that need no files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError
from ..images import load_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_SIDE = 640  # pictures are kept no larger than this
MAX_KEPT = 600  # pictures kept in memory; the rest is read again each time

Size = tuple[int, int]


class Backgrounds:
    """Pictures to crop backgrounds from.

    Args:
        sources: folders (searched deep), picture files, or JSON files with a list `images` of `file_name`s beside
            them (COCO's form), which picks a split out of a folder.

    Raises:
        InputError: a source is missing or names no picture.
    """

    def __init__(self, sources: Sequence[str | Path] = ()) -> None:
        self.paths = [path for source in sources for path in _pictures(Path(source))]
        self._kept: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_kept": {}}  # workers read for themselves

    def crop(self, rng: np.random.Generator, size: Size, least: float = 0.75) -> Image.Image:
        """A random crop of a random picture, mirrored half of the time.

        Args:
            rng: chooses.
            size: (width, height) of the result, whose aspect the crop has.
            least: the crop takes this share or more of the largest possible one.
        """
        dice = rng.random(5).tolist()
        picture = self._picture(int(dice[0] * len(self.paths)))
        scale = min(picture.width / size[0], picture.height / size[1]) * (least + (1 - least) * dice[1])
        width, height = scale * size[0], scale * size[1]
        x, y = dice[2] * (picture.width - width), dice[3] * (picture.height - height)
        part = picture.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + width, y + height), reducing_gap=1.5)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if dice[4] < 0.5 else part

    def _picture(self, index: int) -> Image.Image:
        if index in self._kept:
            return self._kept[index]
        picture = load_image(self.paths[index])
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
        if len(self._kept) < MAX_KEPT:
            self._kept[index] = picture
        return picture


def _pictures(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    elif source.suffix == ".json" and source.is_file():
        found = [source.parent / entry["file_name"] for entry in json.loads(source.read_text("utf-8"))["images"]]
    else:
        found = [source] if source.is_file() else []
    if not found:
        raise InputError(f"backgrounds: {source} is neither a picture nor a folder or JSON file that names pictures")
    return found


# Drawn ones: a grey map, coloured by a ramp through a few colours


@cache
def _axes(size: Size) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    width, height = size
    return (
        np.arange(width, dtype=np.float32)[None] - width / 2,
        np.arange(height, dtype=np.float32)[:, None] - height / 2,
    )


def _ramp(rng: np.random.Generator, size: Size) -> NDArray[np.float32]:
    x, y = _axes(size)
    turn, reach = rng.uniform(0, 2 * math.pi), max(size)
    return x * np.float32(math.cos(turn) / reach) + y * np.float32(math.sin(turn) / reach) + np.float32(0.5)


def _map_of(values: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def _gradient(rng: np.random.Generator, size: Size) -> Image.Image:
    return _map_of(_ramp(rng, size))


def _stripes(rng: np.random.Generator, size: Size) -> Image.Image:
    waves = rng.uniform(3, 24)
    return _map_of(0.5 + np.sin(_ramp(rng, size) * np.float32(2 * math.pi * waves)) * np.float32(rng.uniform(0.4, 2)))


def _checks(rng: np.random.Generator, size: Size) -> Image.Image:
    waves = np.float32(2 * math.pi * rng.uniform(2, 12))
    x, y = (axis * (waves / max(size)) for axis in _axes(size))
    return _map_of(0.5 + np.sin(x) * np.sin(y) * np.float32(rng.uniform(0.5, 6)))


def _blobs(rng: np.random.Generator, size: Size) -> Image.Image:
    cells = int(rng.integers(3, 28))
    noise = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


_LEVELS = np.linspace(-1, 1, 256)
_RAMP = np.stack([np.clip(-_LEVELS, 0, 1), 1 - abs(_LEVELS), np.clip(_LEVELS, 0, 1)], axis=1)  # shares of three colours
_MAPS = (_gradient, _blobs, _blobs, _stripes, _checks)


def _coloured(rng: np.random.Generator, grey: Image.Image) -> Image.Image:
    """Colour a grey map by a ramp through three colours that are near or far from each other."""
    first, spread = rng.uniform(20, 235, 3), 10 + 110 * rng.random() ** 2
    stops = np.clip(first + rng.uniform(-spread, spread, (3, 3)), 0, 255)
    table = _RAMP @ stops
    grey.putpalette(table.round().astype(np.uint8).tobytes())
    return grey.convert("RGB")


def draw_background(rng: np.random.Generator, size: Size) -> Image.Image:
    """A drawn background: gradients, blobs, stripes or checks in a few colours, at times two of them in patches."""
    picture = _coloured(rng, _MAPS[int(rng.random() * len(_MAPS))](rng, size))
    if rng.random() < 0.4:
        other = _coloured(rng, _MAPS[int(rng.random() * len(_MAPS))](rng, size))
        sharp = float(rng.uniform(1, 12))
        mask = Image.blend(Image.new("L", size, 128), _blobs(rng, size), sharp)
        picture.paste(other, (0, 0), mask)
    return picture
