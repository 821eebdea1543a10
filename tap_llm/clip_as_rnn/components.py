"""The connected parts of a mask, and points that stand for a part."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from ..encoded import TightMask
from ..masks import BoolArray, IntArray, mask_to_box
from .outputs import Float32Array

_GRID = 128  # cells per side that points of large parts are chosen on


def split_mask(mask: BoolArray, min_share: float = 0.05, max_parts: int = 10) -> list[TightMask]:
    """The parts of a mask that hang together, corners included; the largest first.

    Args:
        mask: (H, W) bool.
        min_share: parts with less than this share of the mask's pixels are left out.
        max_parts: at most so many.
    """
    box = mask_to_box(mask)
    if box is None:
        return []
    x0, y0, x1, y1 = box
    labels, _ = ndimage.label(mask[y0:y1, x0:x1], structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    places = ndimage.find_objects(labels)
    parts = []
    for index in np.argsort(-areas, kind="stable")[:max_parts]:
        if areas[index] >= min_share * areas.sum():
            rows, columns = places[index]
            place = (columns.start, rows.start, columns.stop, rows.stop)
            parts.append(TightMask(place, labels[rows, columns] == index + 1).shifted(x0, y0))
    return parts


def part_points(part: TightMask, soft_mask: Float32Array, spread: int = 3) -> list[list[int]]:
    """Points [x, y] inside a part: the peak of the soft mask, then others far from it and from each other.

    Args:
        part: a part that is not empty.
        soft_mask: (H, W), of the whole picture.
        spread: at most so many further points, from the inner half of the part.
    """
    x0, y0, x1, y1 = part.box or (0, 0, 0, 0)
    inside = np.where(part.pixels, soft_mask[y0:y1, x0:x1], -1)
    peak = np.array(np.unravel_index(int(inside.argmax()), inside.shape))
    points = [peak, *_farthest(_core(part.pixels), peak, spread)]
    return [[x0 + int(x), y0 + int(y)] for y, x in points]


def _core(pixels: BoolArray) -> IntArray:
    """Rows and columns (k, 2) of pixels at least half as deep inside as the deepest one; judged on a coarse grid."""
    step = math.ceil(max(pixels.shape) / _GRID)
    coarse = pixels[::step, ::step]
    depth = ndimage.distance_transform_edt(np.pad(coarse, 1))[1:-1, 1:-1]
    return np.argwhere(coarse & (depth >= depth.max() / 2)) * step


def _farthest(cells: IntArray, start: IntArray, count: int) -> list[IntArray]:
    """Up to `count` cells, each as far as can be from the start and from those before it."""
    chosen: list[IntArray] = []
    distance = np.hypot(*(cells - start).T)
    while len(chosen) < count and distance.size and distance.max() > 0:
        chosen.append(cells[distance.argmax()])
        distance = np.minimum(distance, np.hypot(*(cells - chosen[-1]).T))
    return chosen


__all__ = ["part_points", "split_mask"]
