"""The picture in the making: patches, pasted back to front over a background, with an exact id map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter
from scipy import ndimage

MIN_INSIDE = 0.6  # share of an object that must lie within the picture
MIN_VISIBLE = 0.5  # share of an earlier object that must stay uncovered
MIN_HIDDEN = 0.035  # share of an object that another one must take to count as hiding it
OPAQUE = 127  # alpha above it belongs to the mask

Size = tuple[int, int]

_KERNELS = (Image.Resampling.BILINEAR, Image.Resampling.HAMMING, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Shadow:
    """A soft contact shadow.

    Attributes:
        offset: right and down, in pixels.
        blur: radius in pixels.
        darkness: 0..1.
    """

    offset: tuple[int, int]
    blur: int
    darkness: float


@dataclass(frozen=True)
class Patch:
    """An object to paste.

    Attributes:
        colour: RGB picture, premultiplied by alpha.
        alpha: L picture of the same size.
    """

    colour: Image.Image
    alpha: Image.Image

    @property
    def size(self) -> Size:
        """(width, height)."""
        return self.alpha.size


def to_picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """(h, w, 4) uint8 premultiplied pixels without a copy; mode RGBX, so that Pillow leaves the colours alone."""
    height, width = pixels.shape[:2]
    return Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)


def to_patch(picture: Image.Image, brightness: float = 1.0) -> Patch:
    """Split an RGBX picture, its colours times `brightness`."""
    colour = picture.convert("RGB")
    if brightness != 1:
        colour = Image.blend(Image.new("RGB", colour.size), colour, brightness)
    return Patch(colour, picture.getchannel(3))


def scale_and_turn(
    rng: np.random.Generator, picture: Image.Image, side: float, degrees: float, room: Size | None = None
) -> Image.Image:
    """Scale so that the longest side is `side`, then turn; smaller where the result would not fit into `room`."""
    scale = side / max(picture.size)
    if room is not None:
        cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
        across = picture.width * cos + picture.height * sin, picture.width * sin + picture.height * cos
        scale = min(scale, *((free - 2) / length for free, length in zip(room, across, strict=True)))
    kernel = _KERNELS[int(rng.random() * len(_KERNELS))]
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, kernel, reducing_gap=1.5)
    if not degrees:
        return picture
    turning = Image.Resampling.BICUBIC if kernel == Image.Resampling.BICUBIC else Image.Resampling.BILINEAR
    return picture.rotate(degrees, turning, expand=True)


class Canvas:
    """A background that takes patches.

    Args:
        background: RGB picture; the canvas draws on it.

    Attributes:
        picture: what was drawn so far.
        ids: (H, W) uint8, 0 = background, i + 1 = the i-th object.
        areas: pixels of each object within the picture when it was pasted.
        visible: how many of them later objects left uncovered.
        hidden_by: for each object, which later ones took how many of its pixels.
    """

    def __init__(self, background: Image.Image) -> None:
        self.picture = background
        self.ids = np.zeros((background.height, background.width), dtype=np.uint8)
        self.areas: list[int] = []
        self.visible: list[int] = []
        self.hidden_by: list[dict[int, int]] = []

    def place(self, patch: Patch, left: int, top: int, shadow: Shadow | None = None) -> bool:
        """Paste a patch; False, with nothing done, where the place is bad.

        Bad is a place that lies mostly outside, or that leaves an earlier object less than half visible.
        """
        cover = np.asarray(patch.alpha) > OPAQUE
        height, width = self.ids.shape
        rows = slice(max(-top, 0), max(min(height - top, cover.shape[0]), 0))
        columns = slice(max(-left, 0), max(min(width - left, cover.shape[1]), 0))
        inside = cover[rows, columns]
        ids = self.ids[max(top, 0) : max(top, 0) + inside.shape[0], max(left, 0) : max(left, 0) + inside.shape[1]]
        area = int(np.count_nonzero(inside))
        if area == 0 or area < MIN_INSIDE * np.count_nonzero(cover):
            return False
        taken = np.bincount(ids[inside], minlength=len(self.areas) + 1)[1:].tolist()
        left_over = [seen - lost for seen, lost in zip(self.visible, taken, strict=True)]
        if any(seen < MIN_VISIBLE * full for seen, full in zip(left_over, self.areas, strict=True)):
            return False
        if shadow is not None:
            self._darken(patch.alpha, left, top, shadow)
        self._paint(patch, left, top)
        self._note(taken, left_over, area)
        ids[inside] = len(self.areas)
        return True

    def _note(self, taken: list[int], left_over: list[int], area: int) -> None:
        new = len(self.areas)
        for index, lost in enumerate(taken):
            if lost > MIN_HIDDEN * self.areas[index]:
                self.hidden_by[index][new] = lost
        self.visible = [*left_over, area]
        self.areas.append(area)
        self.hidden_by.append({})

    def _paint(self, patch: Patch, left: int, top: int) -> None:
        """What is there times (1 - alpha), plus the patch; parts outside fall away."""
        width, height = patch.size
        window = self.picture.crop((left, top, left + width, top + height))
        window.paste((0, 0, 0), (0, 0), patch.alpha)
        self.picture.paste(ImageChops.add(window, patch.colour), (left, top))

    def _darken(self, alpha: Image.Image, left: int, top: int, shadow: Shadow) -> None:
        margin = 2 * shadow.blur
        soft = Image.new("L", (alpha.width + 2 * margin, alpha.height + 2 * margin))
        soft.paste(Image.blend(Image.new("L", alpha.size), alpha, shadow.darkness), (margin, margin))
        soft = soft.filter(ImageFilter.BoxBlur(shadow.blur))
        dx, dy = shadow.offset
        self.picture.paste((8, 8, 12), (left - margin + dx, top - margin + dy), soft)

    def masks(self, keep: list[int]) -> NDArray[np.bool_]:
        """(len(keep), H, W) visible pixels of the objects `keep`."""
        labels = np.array(keep, dtype=np.uint8)[:, None, None] + np.uint8(1)
        return np.asarray(self.ids[None] == labels)

    def middles(self) -> list[tuple[float, float]]:
        """(x, y) of the mean visible pixel of each object, in shares of the picture."""
        height, width = self.ids.shape
        middles = []
        for label, part in enumerate(ndimage.find_objects(self.ids, max_label=len(self.areas)), start=1):
            rows, columns = part or (slice(0, 0), slice(0, 0))
            inside = self.ids[rows, columns] == label
            total = max(1, np.count_nonzero(inside))
            x = inside.sum(axis=0) @ np.arange(columns.start, columns.stop) / total
            y = inside.sum(axis=1) @ np.arange(rows.start, rows.stop) / total
            middles.append((x / width, y / height))
        return middles


def random_shadow(rng: np.random.Generator, side: float, share: float = 0.75) -> Shadow | None:
    """A shadow that suits an object of that size; None in the rest of the cases."""
    dice = rng.random(5).tolist()
    if dice[0] > share:
        return None
    reach = max(1.0, 0.05 * side)
    angle = math.pi * (0.1 + 0.8 * dice[1])  # light comes from above
    offset = round(reach * math.cos(angle) * dice[2]), round(reach * math.sin(angle) * dice[2])
    return Shadow(offset, max(1, round(0.06 * side * (0.5 + dice[3]))), 0.25 + 0.35 * dice[4])
