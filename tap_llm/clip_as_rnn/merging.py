"""Merging of masks: of expressions that mean one thing, and of a mask with the segments of another model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..masks import BoolArray
from .affinity import upsample
from .outputs import Float32Array

_HALF = 0.5
SMALL_AREA = 0.05
MIN_IOM = MIN_IOU = 0.7


def merge_expressions(masks: BoolArray, scores: Float32Array, size: tuple[int, int] | None = None) -> BoolArray:
    """One mask for expressions that mean the same thing: the mean weighted by score, at least one half.

    Where that covers no more than 5 % of the picture, the union of all masks stands instead.

    Args:
        masks: (M, h, w) bool.
        scores: (M,) at least 0.
        size: (H, W) of the result; by default that of the masks.

    Returns:
        (H, W) bool; empty without masks.
    """
    size = masks.shape[1:] if size is None else size
    if not len(masks):
        return np.zeros(size, dtype=bool)
    weights = torch.from_numpy(scores.astype(np.float32))
    planes = torch.from_numpy(masks.astype(np.float32))
    total = weights.sum()
    mean = torch.einsum("m,mhw->hw", weights / total if total > 0 else weights, planes)
    merged = _resized(mean, size) >= _HALF
    if merged.mean() <= SMALL_AREA:
        merged = _resized(planes.amax(dim=0), size) > _HALF
    return merged


def _resized(plane: Tensor, size: tuple[int, int]) -> Float32Array:
    return upsample(plane[None], size)[0].numpy()


def intersection_over_minimum(mask: BoolArray, candidates: BoolArray, min_share: float = 0.0) -> Float32Array:
    """How much of a candidate lies in a mask, or of the mask in it, whichever is more.

    Args:
        mask: (H, W) bool, not empty.
        candidates: (K, H, W) bool.
        min_share: beta: candidates that cover less of the mask than this do not count by what of them lies in it.

    Returns:
        (K,) float32 in 0..1; 0 for empty candidates.
    """
    shared = (candidates & mask).sum(axis=(1, 2))
    of_candidate = shared / np.maximum(candidates.sum(axis=(1, 2)), 1)
    of_mask = shared / max(int(mask.sum()), 1)
    of_candidate[of_mask < min_share] = 0
    return np.maximum(of_candidate, of_mask).astype(np.float32)


def ensemble_segments(
    mask: BoolArray,
    candidates: BoolArray,
    min_iom: float = MIN_IOM,
    min_iou: float | None = MIN_IOU,
    min_share: float = 0.0,
) -> BoolArray:
    """Put a mask together from the segments of another model that it shares most with (paper, appendix: with SAM).

    Args:
        mask: (H, W) bool.
        candidates: (K, H, W) bool segments.
        min_iom: phi_iom: segments above it are united; where none is, the best one stands.
        min_iou: phi_iou: the union replaces the mask only if their IoU is above it; None: always.
        min_share: beta of [`intersection_over_minimum`].

    Returns:
        (H, W) bool; the mask itself where it is empty, there is no segment, or the union is too different.
    """
    if not mask.any() or not len(candidates):
        return mask
    shares = intersection_over_minimum(mask, candidates, min_share)
    chosen = shares > min_iom
    if not chosen.any():
        chosen[shares.argmax()] = True
    union: BoolArray = np.asarray(candidates[chosen].any(axis=0))
    iou = (union & mask).sum() / (union | mask).sum()
    return union if min_iou is None or iou > min_iou else mask


__all__ = ["ensemble_segments", "intersection_over_minimum", "merge_expressions"]
