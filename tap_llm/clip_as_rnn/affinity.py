"""Refines CAMs by the attention of the image encoder (arXiv:2312.07661, equation 8; after CLIP-ES)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

from ..masks import BoolArray

SINKHORN_ROUNDS = 3
_MIN_RANGE = 1e-15
_ROUNDING = 1e-6  # range of a map, as share of its largest value, that is nothing but rounding


def min_max(maps: Tensor) -> Tensor:
    """Stretch each map of (..., n) to 0..1; constant ones become zeros."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low + _MIN_RANGE)


def attention_affinity(attention: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """How much patches belong together.

    Args:
        attention: (n, n), mean over heads and blocks of the attention between patches, without the CLS token.
        rounds: of Sinkhorn normalisation, columns first.

    Returns:
        (n, n), symmetric; rows and columns sum to 1 up to what `rounds` left.
    """
    balanced = attention
    smallest = torch.finfo(attention.dtype).tiny  # patches that attend to nothing but CLS
    for _ in range(rounds):
        balanced = balanced / balanced.sum(dim=0, keepdim=True).clamp_min(smallest)
        balanced = balanced / balanced.sum(dim=1, keepdim=True).clamp_min(smallest)
    symmetric = (balanced + balanced.T) / 2
    return symmetric @ symmetric


def cam_boxes(cam: NDArray[np.floating], threshold: float, clip: bool = False) -> list[tuple[int, int, int, int]]:
    """Boxes around the 8-connected parts of a CAM that lie strictly above `threshold` of its maximum.

    Args:
        cam: (h, w) in 0..1.
        threshold: lambda, 0..1.
        clip: end boxes before the last column and row, as the authors' code does (`Compat.box_clip`).

    Returns:
        (x0, y0, x1, y1) in cells, right and bottom edges exclusive; with `clip` some may be empty.
    """
    levels = np.floor(255 * cam).astype(np.uint8)
    parts, _ = ndimage.label(levels > math.floor(threshold * int(levels.max())), structure=np.ones((3, 3)))
    right, bottom = (cam.shape[1] - 1, cam.shape[0] - 1) if clip else (cam.shape[1], cam.shape[0])
    return [(x.start, y.start, min(x.stop, right), min(y.stop, bottom)) for y, x in ndimage.find_objects(parts)]


def box_mask(cam: NDArray[np.floating], threshold: float, clip: bool = False) -> BoolArray:
    """Union (h, w) of the boxes of [`cam_boxes`]."""
    inside = np.zeros(cam.shape, dtype=bool)
    for x0, y0, x1, y1 in cam_boxes(cam, threshold, clip):
        inside[y0:y1, x0:x1] = True
    return inside


def refine_cams(affinity: Tensor, cams: Tensor, threshold: float, clip: bool = False) -> Tensor:
    """Spread what lies in the boxes of each CAM over the patches that belong to it.

    The boxes mask where activation comes from, not where it goes.

    Args:
        affinity: (n, n) of [`attention_affinity`].
        cams: (N, h, w) in 0..1 with h * w = n.
        threshold: lambda.
        clip: see [`cam_boxes`].

    Returns:
        (N, h, w) in 0..1; zeros where nothing but rounding is left of a map.
    """
    boxes = np.stack([box_mask(cam, threshold, clip) for cam in cams.cpu().numpy()])
    sources = cams * torch.from_numpy(boxes).to(cams)
    spread = sources.flatten(1) @ affinity.T
    ranges = spread.amax(-1) - spread.amin(-1)
    real = ranges > _ROUNDING * spread.abs().amax(-1)
    return (min_max(spread) * real[:, None]).reshape(cams.shape)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) in 0..1 at a picture's (height, width): bilinear, pixel centres at halves, not stretched again."""
    return interpolate(maps[None], size, mode="bilinear", align_corners=False)[0].clamp(0, 1)  # rounding overshoots


__all__ = ["attention_affinity", "box_mask", "cam_boxes", "min_max", "refine_cams", "upsample"]
