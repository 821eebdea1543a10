"""v: shows a classifier what a mask means, on the picture itself (arXiv:2312.07661, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..masks import BoolArray
from .configuration_car import PROMPTS, Prompt
from .drawing import contour_outline, ellipse_outline, rectangle_outline

Pixels = NDArray[np.uint8]

BLUR_SIZE = 15
BLUR_SIGMA = 0.3 * ((BLUR_SIZE - 1) * 0.5 - 1) + 0.8  # 2.6, what a kernel of this size is given by convention
LUMINANCE = (0.299, 0.587, 0.114)
RED = (255, 0, 0)
MIN_SUM = 1.0  # soft masks that sum to no more than this show nothing


class PromptPainter:
    """Draws visual prompts on one picture; what lies outside the masks is computed once.

    Effects are drawn in one order, whatever order the names have: blur, gray, black, circle, rectangle, contour.

    Args:
        image: (H, W, 3) uint8, RGB.
        prompts: names of the effects.
        swap_gray: see `Compat.gray_weights`.
    """

    def __init__(self, image: Pixels, prompts: Sequence[Prompt], swap_gray: bool = False) -> None:
        self.image = image
        self._outlines = [name for name in PROMPTS if name in prompts and name in ("circle", "rectangle", "contour")]
        self._outside = outside_picture(image, prompts, swap_gray)

    def paint(self, mask: BoolArray) -> Pixels:
        """The picture with a mask shown on it: (H, W) bool -> (H, W, 3); unchanged where the mask is empty."""
        if not mask.any():
            return self.image
        painted = np.where(mask[..., None], self.image, self._outside)
        for name in self._outlines:
            painted[outline(mask, name)] = RED
        return painted


def outside_picture(image: Pixels, prompts: Sequence[Prompt], swap_gray: bool = False) -> Pixels:
    """What a picture looks like wherever the mask is not: blurred, gray, black, or as it is."""
    if "black" in prompts:
        return np.zeros_like(image)
    if "blur" in prompts:
        image = blurred(image)
    return gray(image, swap_gray) if "gray" in prompts else image


def blur_kernel() -> NDArray[np.float64]:
    """(15,) weights of a Gaussian, summing to 1."""
    places = np.arange(BLUR_SIZE) - BLUR_SIZE // 2
    weights = np.exp(-(places**2) / (2 * BLUR_SIGMA**2))
    return weights / weights.sum()


def blurred(image: Pixels) -> Pixels:
    """Gaussian blur, the picture mirrored at its border (the border pixel itself once)."""
    kernel = blur_kernel()
    smooth = image.astype(np.float32)
    for axis in (0, 1):
        smooth = ndimage.correlate1d(smooth, kernel, axis=axis, mode="mirror")
    return np.rint(smooth).astype(np.uint8)


def gray(image: Pixels, swapped: bool = False) -> Pixels:
    """Luminance in all three channels; `swapped` takes the weights of red and blue for each other."""
    weights = np.array(LUMINANCE[::-1] if swapped else LUMINANCE, dtype=np.float32)
    return np.repeat(np.rint(image @ weights).astype(np.uint8)[..., None], 3, axis=2)


def outline(mask: BoolArray, name: str) -> BoolArray:
    """Pixels (H, W) that an outline around a non-empty mask lights: "circle", "rectangle" or "contour".

    Circle (an ellipse) and rectangle share centre and size: the mean of the mask's pixels, and half the sides of the
    box around all of them. So they are no tight fit, and one for several parts.
    """
    if name == "contour":
        return contour_outline(mask)
    rows, columns = np.nonzero(mask)
    centre = int(columns.mean()), int(rows.mean())
    axes = int(np.ptp(columns) + 1) // 2, int(np.ptp(rows) + 1) // 2
    draw = ellipse_outline if name == "circle" else rectangle_outline
    return draw((mask.shape[0], mask.shape[1]), centre, axes)


def prompt_mask(soft_mask: NDArray[np.float32], threshold: float) -> BoolArray:
    """What of a soft mask (H, W) a visual prompt shows; nothing where its sum is at most 1."""
    if soft_mask.sum(dtype=np.float64) <= MIN_SUM:
        return np.zeros(soft_mask.shape, dtype=bool)
    return soft_mask > threshold


__all__ = ["PromptPainter", "blurred", "gray", "outline", "outside_picture", "prompt_mask"]
