"""Refinement by TAP: the parts of a coarse mask prompt TAP, and its masks replace them where they agree.

In place of the SAM ensemble of CaR (arXiv:2312.07661, section 3.4): prompts instead of a grid, so one decoder call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..encoded import EncodedImage, TightMask, prompt_rows, tight_masks
from ..errors import InputError
from ..masks import BoolArray
from ..regions import Region
from .components import part_points, split_mask
from .outputs import Float32Array

MIN_IOU = 0.7
BATCH_SIZE = 64

_SLOTS = (0, 5, 6, 7)  # of a box row and a points row, four each: TAP answers boxes in slot 0, points in 1 to 3


@torch.no_grad()
def refine_masks(
    pipe: Any,
    image: Any,
    masks: BoolArray,
    soft_masks: Float32Array,
    scores: ArrayLike,
    *,
    min_iou: float = MIN_IOU,
    exclusive: bool = True,
    batch_size: int = BATCH_SIZE,
) -> BoolArray:
    """Replace coarse masks by what TAP sees there.

    Each part of each mask prompts TAP with its box, and with the peak of the soft mask and points spread inside it; of
    TAP's answers the one with the highest IoU with the part is taken. A mask is replaced by the union over its parts
    only if the two agree. The image is encoded once, and up to `batch_size` parts are decoded at once.

    Args:
        pipe: a [`RegionPipeline`].
        image: the picture in any form, or what `pipe.encode` made of it.
        masks: (N, H, W) bool, may be empty.
        soft_masks: (N, H, W) float32.
        scores: (N,); where masks overlap, the pixel goes to the best one.
        min_iou: a refined mask is taken if its IoU with the coarse one is above this.
        exclusive: share out what several masks claim; else they may overlap.
        batch_size: parts decoded at once; bounds memory.

    Returns:
        (N, H, W) bool, a new array.

    Raises:
        InputError: the picture cannot be read, or is of another size.
    """
    parts = [(owner, part) for owner, mask in enumerate(masks) for part in split_mask(mask)]
    if not parts:
        return masks.copy()
    encoded = image if isinstance(image, EncodedImage) else pipe.encode(image)
    if encoded.original_size != masks.shape[1:]:
        raise InputError(f"masks are of size {masks.shape[1:]} (height, width), the picture of {encoded.original_size}")
    prompts = [prompt for owner, part in parts for prompt in _prompts(part, soft_masks[owner])]
    refined = np.zeros_like(masks)
    for (owner, part), candidates in zip(parts, _answers(pipe, encoded, prompts, batch_size), strict=True):
        fits = [_iou(part, candidate, encoded.original_size) for candidate in candidates]
        _paste(refined[owner], candidates[int(np.argmax(fits))])
    for coarse, fine in zip(masks, refined, strict=True):
        if (coarse & fine).sum() <= min_iou * (coarse | fine).sum():
            fine[:] = coarse
    return share_out(refined, scores) if exclusive else refined


def share_out(masks: BoolArray, scores: ArrayLike) -> BoolArray:
    """Masks (N, H, W) without overlaps: each pixel stays with the mask of the highest score (N,), in place."""
    taken = np.zeros(masks.shape[1:], dtype=bool)
    for row in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable"):
        masks[row] &= ~taken
        taken |= masks[row]
    return masks


def _prompts(part: TightMask, soft_mask: Float32Array) -> tuple[Region, Region]:
    return {"box": part.box}, {"points": part_points(part, soft_mask)}


def _answers(pipe: Any, encoded: EncodedImage, prompts: Sequence[Region], batch_size: int) -> Iterator[list[TightMask]]:
    """TAP's candidates for each pair of a box and points."""
    rows = prompt_rows(pipe.processor, prompts, encoded.original_size)
    for points, labels in zip(*(row.split(2 * batch_size) for row in rows), strict=True):
        logits = pipe.model(
            input_points=points.to(pipe.model.device),
            input_labels=labels.to(pipe.model.device),
            image_embeddings=encoded.image_embeddings,
        ).pred_masks
        pairs = logits.unflatten(0, (-1, 2)).flatten(1, 2)[:, _SLOTS]  # (parts, 4, 4G, 4G)
        for candidates in pairs:
            yield list(tight_masks(pipe.processor, candidates, encoded))


def _iou(part: TightMask, candidate: TightMask, size: tuple[int, int]) -> float:
    """IoU of a part that is not empty with a candidate, in a picture of that (height, width)."""
    x0, y0, x1, y1 = part.box or (0, 0, 0, 0)
    shared = np.count_nonzero(part.pixels & candidate.full(*size)[y0:y1, x0:x1])
    return shared / (np.count_nonzero(part.pixels) + np.count_nonzero(candidate.pixels) - shared)


def _paste(canvas: BoolArray, mask: TightMask) -> None:
    if mask.box is not None:
        x0, y0, x1, y1 = mask.box
        canvas[y0:y1, x0:x1] |= mask.pixels


__all__ = ["refine_masks", "share_out"]
