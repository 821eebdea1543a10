"""Refinement by TAP: the parts of a coarse mask prompt TAP, and its masks replace them where they agree.

In place of the SAM ensemble of CaR (arXiv:2312.07661, section 3.4): prompts instead of a grid, so one decoder call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..encoded import EncodedImage, TightMask, prompt_rows, tight_masks
from ..errors import InputError
from ..masks import BoolArray
from ..regions import Region
from .components import part_points, split_mask
from .crf import DenseCrf
from .outputs import Float32Array
from .postprocess import with_background

Choice = Literal["each", "agreeing"]

MIN_IOU = 0.7
BATCH_SIZE = 64

_SLOTS = (0, 5, 6, 7)  # of a box row and a points row, four each: TAP answers boxes in slot 0, points in 1 to 3
_GROWTH = 1.25  # a further answer must raise the agreement by a quarter
_NOTHING = 1e-6  # in place of a union without pixels
_CERTAINTY = 0.6  # how sure sharpening is of a mask before it looks at the edges


@dataclass(eq=False)
class _Answer:
    """One of TAP's masks for one part, with the IoU that TAP expects of it."""

    mask: TightMask
    iou: float


@torch.no_grad()
def refine_masks(
    pipe: Any,
    image: Any,
    masks: BoolArray,
    soft_masks: Float32Array,
    scores: ArrayLike,
    *,
    min_iou: float = MIN_IOU,
    choice: Choice = "each",
    sharpen: bool = False,
    exclusive: bool = True,
    batch_size: int = BATCH_SIZE,
) -> BoolArray:
    """Replace coarse masks by what TAP sees there.

    Each part of each mask prompts TAP with its box, and with the peak of the soft mask and points spread inside it. A
    mask is replaced by the union of the answers chosen only if the two agree. The image is encoded once, and up to
    `batch_size` parts are decoded at once.

    Args:
        pipe: a [`RegionPipeline`].
        image: the picture in any form, or what `pipe.encode` made of it.
        masks: (N, H, W) bool, may be empty.
        soft_masks: (N, H, W) float32.
        scores: (N,); where masks overlap, the pixel goes to the best one.
        min_iou: a refined mask is taken if its IoU with the coarse one is above this; below 0: always.
        choice: "each": for each part the answer with the highest IoU with it. "agreeing": of all answers the one that
            agrees best with the soft mask and is expected to be good, and others only if they raise the agreement by a
            quarter: parts that are there by mistake are dropped.
        sharpen: at the end move the edges to those of the picture with a dense CRF, for models with small masks.
        exclusive: share out what several masks claim; else they may overlap.
        batch_size: parts decoded at once; bounds memory.

    Returns:
        (N, H, W) bool, a new array.

    Raises:
        InputError: the picture cannot be read, or is of another size; an unknown choice.
    """
    if choice not in get_args(Choice):
        raise InputError(f"choice must be one of {', '.join(get_args(Choice))}, got {choice!r}")
    parts = [(owner, part) for owner, mask in enumerate(masks) for part in split_mask(mask)]
    if not parts:
        return masks.copy()
    encoded = image if isinstance(image, EncodedImage) else pipe.encode(image)
    if encoded.original_size != masks.shape[1:]:
        raise InputError(f"masks are of size {masks.shape[1:]} (height, width), the picture of {encoded.original_size}")
    prompts = [prompt for owner, part in parts for prompt in _prompts(part, soft_masks[owner])]
    answers = list(_answers(pipe, encoded, prompts, batch_size))
    refined = masks.copy()
    for owner in dict.fromkeys(owner for owner, _ in parts):
        own = [(part, found) for (other, part), found in zip(parts, answers, strict=True) if other == owner]
        coarse = masks[owner]
        fine = _best_of_each(own, coarse) if choice == "each" else _agreeing(own, soft_masks[owner] * coarse)
        if (coarse & fine).sum() > min_iou * (coarse | fine).sum():
            refined[owner] = fine
    if exclusive:
        share_out(refined, scores)
    return _sharpened(np.asarray(encoded.image), refined, exclusive) if sharpen else refined


def share_out(masks: BoolArray, scores: ArrayLike) -> BoolArray:
    """Masks (N, H, W) without overlaps: each pixel stays with the mask of the highest score (N,), in place."""
    taken = np.zeros(masks.shape[1:], dtype=bool)
    for row in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable"):
        masks[row] &= ~taken
        taken |= masks[row]
    return masks


def _prompts(part: TightMask, soft_mask: Float32Array) -> tuple[Region, Region]:
    return {"box": part.box}, {"points": part_points(part, soft_mask)}


def _answers(pipe: Any, encoded: EncodedImage, prompts: Sequence[Region], batch_size: int) -> Iterator[list[_Answer]]:
    """TAP's answers for each pair of a box and points."""
    rows = prompt_rows(pipe.processor, prompts, encoded.original_size)
    for points, labels in zip(*(row.split(2 * batch_size) for row in rows), strict=True):
        out = pipe.model(
            input_points=points.to(pipe.model.device),
            input_labels=labels.to(pipe.model.device),
            image_embeddings=encoded.image_embeddings,
        )
        logits, ious = (
            slots.unflatten(0, (-1, 2)).flatten(1, 2)[:, _SLOTS] for slots in (out.pred_masks, out.iou_scores)
        )
        for candidates, expected in zip(logits, ious.tolist(), strict=True):
            masks = tight_masks(pipe.processor, candidates, encoded)
            yield [_Answer(mask, iou) for mask, iou in zip(masks, expected, strict=True)]


def _best_of_each(parts: Sequence[tuple[TightMask, list[_Answer]]], coarse: BoolArray) -> BoolArray:
    """Union over the parts of the answer with the highest IoU with the part."""
    union = np.zeros_like(coarse)
    for part, answers in parts:
        fits = [_iou(part, answer.mask, coarse.shape) for answer in answers]
        _paste(union, answers[int(np.argmax(fits))].mask)
    return union


def _agreeing(parts: Sequence[tuple[TightMask, list[_Answer]]], weights: Float32Array) -> BoolArray:
    """Union of answers, put together step by step, that has a high soft IoU with weights (H, W) in 0..1."""
    answers = [answer for _, found in parts for answer in found]
    expected = np.array([max(answer.iou, 0.01) for answer in answers])
    union = np.zeros(weights.shape, dtype=bool)
    inside, area, total, agreement = 0.0, 0, float(weights.sum()), 0.0
    while True:
        gains = np.array([_gain(union, answer.mask, weights) for answer in answers])
        shared = inside + gains[:, 0]
        agreements = shared / np.maximum(area + gains[:, 1] + total - shared, _NOTHING)
        best = int(np.argmax(agreements * expected))
        if agreements[best] <= _GROWTH * agreement:
            return union
        _paste(union, answers[best].mask)
        inside, area, agreement = shared[best], area + gains[best, 1], agreements[best]


def _gain(union: BoolArray, mask: TightMask, weights: Float32Array) -> tuple[float, int]:
    """Weight and number of the pixels that a mask adds to a union."""
    if mask.box is None:
        return 0.0, 0
    x0, y0, x1, y1 = mask.box
    new = mask.pixels & ~union[y0:y1, x0:x1]
    return float(weights[y0:y1, x0:x1][new].sum()), int(new.sum())


def _iou(part: TightMask, answer: TightMask, size: Sequence[int]) -> float:
    """IoU of a part that is not empty with an answer, in a picture of that (height, width)."""
    x0, y0, x1, y1 = part.box or (0, 0, 0, 0)
    shared = np.count_nonzero(part.pixels & answer.full(*size)[y0:y1, x0:x1])
    return shared / (np.count_nonzero(part.pixels) + np.count_nonzero(answer.pixels) - shared)


def _paste(canvas: BoolArray, mask: TightMask) -> None:
    if mask.box is not None:
        x0, y0, x1, y1 = mask.box
        canvas[y0:y1, x0:x1] |= mask.pixels


def _sharpened(image: Any, masks: BoolArray, exclusive: bool) -> BoolArray:
    """Masks whose edges a dense CRF has moved; together, or each for itself."""
    crf = DenseCrf(image)
    shown = [row for row, mask in enumerate(masks) if mask.any()]
    sharp = np.zeros_like(masks)
    for rows in [shown] if exclusive else [[row] for row in shown]:
        certain = np.where(masks[rows], np.float32(_CERTAINTY), np.float32(1 - _CERTAINTY))
        labels = crf(with_background(certain)).argmax(axis=0)
        sharp[rows] = labels == np.arange(1, len(rows) + 1)[:, None, None]
    return sharp


__all__ = ["Choice", "refine_masks", "share_out"]
