"""From soft masks at the resolution of the patches to masks of the picture (arXiv:2312.07661, section 3.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..masks import BoolArray
from .affinity import upsample
from .configuration_car import CarConfig
from .outputs import Float32Array
from .visual_prompts import Pixels

_MEAN_BGR = (104.008, 116.669, 122.675)


def with_background(soft_masks: Float32Array, factor: float = 1.0) -> Float32Array:
    """(M, H, W) in 0..1 -> (1 + M, H, W), the background first: (1 - max)^factor; they need not sum to 1."""
    return np.concatenate([(1 - soft_masks.max(axis=0, keepdims=True)) ** np.float32(factor), soft_masks])


def against_background(soft_masks: Float32Array, factor: float) -> Float32Array:
    """(M, H, W) in 0..1 -> what each mask holds against the background alone; the same at a factor of 1."""
    background: Float32Array = (1 - soft_masks) ** np.float32(factor)
    return np.asarray(soft_masks / (soft_masks + background), dtype=np.float32)


def refined_masks(image: Image.Image, maps: Tensor, config: CarConfig) -> tuple[Float32Array, BoolArray]:
    """Soft masks of the kept queries at the size of the picture, and what they are decided to be.

    In the semantic mode the masks compete for the pixels with each other and the background, and do not overlap; in
    the referring mode each competes with its own background alone.

    Args:
        image: RGB picture of H x W.
        maps: (M, h, w) float32 in 0..1 on the CPU.
        config: mode, refine ("none" takes the likeliest class as it is), bg_factor and compat matter.

    Returns:
        (M, H, W) float32, and (M, H, W) bool.
    """
    size = image.height, image.width
    soft = upsample(maps, size).numpy() if len(maps) else np.zeros((0, *size), dtype=np.float32)
    masks = np.zeros(soft.shape, dtype=bool)
    shown = [row for row in range(len(soft)) if soft[row].any()]
    if not shown:
        return soft, masks
    refine = _refiner(image, config)
    groups = [[row] for row in shown] if config.mode == "referring" else [shown]
    for rows in groups:
        labels = refine(with_background(soft[rows], config.bg_factor)).argmax(axis=0)
        for number, row in enumerate(rows, start=1):
            masks[row] = labels == number
    return soft, masks


def _refiner(image: Image.Image, config: CarConfig) -> Any:
    """What turns class probabilities (C, H, W) into better ones."""
    if config.refine == "none":
        return lambda probabilities: probabilities
    from .crf import DenseCrf

    pixels = np.asarray(image)
    return DenseCrf(wrapped_bgr(pixels) if config.compat.crf_image else pixels)


def wrapped_bgr(pixels: Pixels) -> Pixels:
    """What the authors' CRF sees: BGR minus the mean colour, whole numbers that wrap around at 0."""
    return np.trunc(pixels[..., ::-1] - np.array(_MEAN_BGR)).astype(np.int64).astype(np.uint8)


def drop_large(masks: BoolArray, max_area: float) -> BoolArray:
    """(M,) bool: which masks (M, H, W) cover more than `max_area` of the picture."""
    if max_area >= 1 or not len(masks):
        return np.zeros(len(masks), dtype=bool)
    return masks.mean(axis=(1, 2)) > max_area


__all__ = ["against_background", "drop_large", "refined_masks", "with_background", "wrapped_bgr"]
