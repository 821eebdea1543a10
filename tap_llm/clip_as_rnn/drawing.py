"""Outlines of visual prompts, one pixel thick, as masks of the pixels that they light."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ..masks import BoolArray, FloatArray

_FULL_TURN = 360
_STEP_BY_RADIUS = ((3, 90), (10, 30), (15, 18))  # below a radius: degrees between the corners of the polygon
_FINEST_STEP = 5


def ellipse_outline(shape: tuple[int, int], centre: tuple[int, int], axes: tuple[int, int]) -> BoolArray:
    """Upright ellipse, drawn as a polygon whose corners lie the closer the larger it is.

    Args:
        shape: (H, W) of the picture; what lies outside is cut off.
        centre: (x, y).
        axes: half axes (x, y) in pixels.

    Returns:
        (H, W) bool.
    """
    radius = max(axes)
    step = next((degrees for limit, degrees in _STEP_BY_RADIUS if radius < limit), _FINEST_STEP)
    angles = np.deg2rad(np.arange(0, _FULL_TURN + step, step))
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1) * axes + centre
    return polygon_outline(shape, corners)


def rectangle_outline(shape: tuple[int, int], centre: tuple[int, int], axes: tuple[int, int]) -> BoolArray:
    """Rectangle around a centre (x, y) with half sides `axes`; (H, W) bool."""
    signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)])
    return polygon_outline(shape, (signs * axes + centre).astype(np.float64))


def polygon_outline(shape: tuple[int, int], corners: FloatArray) -> BoolArray:
    """Straight lines between successive corners (k, 2), x and y; (H, W) bool."""
    lines = [_line(start, stop) for start, stop in zip(corners[:-1], corners[1:], strict=True)]
    pixels = np.rint(np.concatenate(lines)).astype(np.int64)
    inside = ((pixels >= 0) & (pixels < (shape[1], shape[0]))).all(axis=1)
    outline = np.zeros(shape, dtype=bool)
    outline[pixels[inside, 1], pixels[inside, 0]] = True
    return outline


def _line(start: FloatArray, stop: FloatArray) -> FloatArray:
    """Points (k, 2) at most one pixel apart along the longer axis, both ends included."""
    steps = int(np.ceil(np.abs(stop - start).max()))
    return start + (stop - start) * np.linspace(0, 1, steps + 1)[:, None]


def contour_outline(mask: BoolArray) -> BoolArray:
    """Border pixels of every part of a mask, holes filled; (H, W) bool."""
    filled = ndimage.binary_fill_holes(mask)
    return filled & ~ndimage.binary_erosion(filled)


__all__ = ["contour_outline", "ellipse_outline", "polygon_outline", "rectangle_outline"]
