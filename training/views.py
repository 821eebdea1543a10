"""A picture with regions to learn from, and its large-scale jitter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tap_llm.data.colours import COLOUR_WORDS
from tap_llm.masks import mask_to_box

LEAST_SHARE = 0.0005  # of the picture: what jitter leaves smaller than that is dropped


@dataclass
class Picture:
    """One image to train on; names are None and colours empty where unknown."""

    image: NDArray[np.uint8]
    """(H, W, 3)."""
    boxes: NDArray[np.float64]
    """(M, 4) x0, y0, x1, y1 in pixels."""
    masks: NDArray[np.bool_]
    """(M, H, W), non-empty; (0, H, W) where only boxes are known."""
    names: list[str | None]
    colours: list[list[str]]
    captions: list[list[str]]
    teacher: Tensor | None = None
    """(M, E) embeddings of a concept teacher, NaN where there is none."""

    def keep(self, rows: Sequence[int]) -> Picture:
        """The same picture with some of its regions."""
        return Picture(
            image=self.image,
            boxes=self.boxes[list(rows)],
            masks=self.masks[list(rows)] if len(self.masks) else self.masks,
            names=[self.names[row] for row in rows],
            colours=[self.colours[row] for row in rows],
            captions=[self.captions[row] for row in rows],
            teacher=self.teacher[list(rows)] if self.teacher is not None else None,
        )


def known_colours(words: Iterable[str]) -> list[str]:
    """Those of the words that can be learnt."""
    return [word for word in words if word in COLOUR_WORDS]


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(M, H, W) non-empty masks -> (M, 4) boxes."""
    return np.array([mask_to_box(mask) for mask in masks], dtype=np.float64).reshape(-1, 4)


def jitter(picture: Picture, rng: np.random.Generator, low: float, high: float, flip: float) -> Picture:
    """Large-scale jitter: the picture smaller on the canvas, or a crop of it; mirrored at times.

    A factor f > 1 keeps a random window of 1 / f of each side; f < 1 shrinks the picture to f of the canvas, by
    padding it on the right and below with its mean colour.
    """
    factor = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    image, masks = picture.image, picture.masks
    if rng.random() < flip:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    image, masks = _crop(rng, image, masks, factor) if factor > 1 else _shrink(image, masks, factor)
    shown = copy.copy(picture)
    shown.image, shown.masks = np.ascontiguousarray(image), masks
    least = LEAST_SHARE * image.shape[0] * image.shape[1]
    kept = shown.keep(np.flatnonzero(masks.sum((1, 2)) >= least).tolist())
    kept.boxes = tight_boxes(kept.masks)
    return kept


def _crop(
    rng: np.random.Generator, image: NDArray[np.uint8], masks: NDArray[np.bool_], factor: float
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A random window of 1 / factor of each side."""
    height, width = image.shape[:2]
    h, w = max(1, round(height / factor)), max(1, round(width / factor))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return image[top : top + h, left : left + w], masks[:, top : top + h, left : left + w]


def _shrink(
    image: NDArray[np.uint8], masks: NDArray[np.bool_], factor: float
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The picture in the top left corner of a square, `factor` of its side."""
    height, width = image.shape[:2]
    side = round(max(height, width) / factor)
    padded = np.empty((side, side, 3), dtype=np.uint8)
    padded[:] = image.mean((0, 1)).astype(np.uint8)
    padded[:height, :width] = image
    return padded, np.pad(masks, ((0, 0), (0, side - height), (0, side - width)))
