"""How well masks overlap, and what trivial answers to a box reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union of two (H, W) masks; 0 where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 0.0


def filled_box(box: Sequence[float], size: tuple[int, int]) -> Mask:
    """The (H, W) mask of all pixels of a box with exclusive right and bottom edges."""
    x0, y0, x1, y1 = (int(edge) for edge in box)
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def ellipse_in_box(box: Sequence[float], size: tuple[int, int]) -> Mask:
    """The (H, W) mask of the pixels whose middle lies within the ellipse that touches the box's edges."""
    x0, y0, x1, y1 = box
    y, x = np.ogrid[: size[0], : size[1]]
    across = (2 * x + 1 - x0 - x1) / (x1 - x0)
    down = (2 * y + 1 - y0 - y1) / (y1 - y0)
    return np.asarray(across**2 + down**2 <= 1)
