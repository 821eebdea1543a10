"""A picture encoded once and prompted any number of times: shared by the pipeline and everything mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .masks import BoolArray, mask_to_box
from .regions import MaskPrompt, Region, parse_regions, prompts_to_rows
from .tap.image_processing_tap import canvas_side, resize_factor

Box = tuple[int, int, int, int]


@dataclass(eq=False)
class EncodedImage:
    """A picture after the image encoder: prompt it any number of times without encoding it again.

    Attributes:
        image: upright RGB picture.
        image_embeddings: (1, D, G, G), on the model's device.
        original_size: (height, width) of the picture.
        resized_size: (height, width) on the canvas, without padding.
    """

    image: Image.Image
    image_embeddings: Tensor
    original_size: tuple[int, int]
    resized_size: tuple[int, int]


@torch.no_grad()
def encode_image(model: Any, processor: Any, image: Image.Image) -> EncodedImage:
    """Run the image encoder on one RGB picture.

    Args:
        model: a [`TapModel`] or [`TapForConditionalGeneration`].
        processor: its [`TapProcessor`].
        image: upright RGB picture.
    """
    inputs = processor(image)
    pixels = inputs["pixel_values"].to(model.device, model.dtype)
    height, width = inputs["resized_sizes"][0].tolist()
    embeddings = model.get_image_embeddings(pixels)
    return EncodedImage(image, embeddings, (image.height, image.width), (height, width))


def prompt_rows(
    processor: Any,
    regions: Sequence[Region],
    size: tuple[int, int],
    mask_prompt: MaskPrompt = "box_and_points",
) -> tuple[Tensor, Tensor]:
    """Prompts of one picture, without touching its pixels.

    Args:
        processor: a [`TapProcessor`].
        regions: N region dicts.
        size: (height, width) of the picture.
        mask_prompt: how masks prompt.

    Returns:
        `input_points` (N, n, 2) float32 in canvas pixels and `input_labels` (N, n) int64.

    Raises:
        InputError: a region that cannot be used, with its index.
    """
    prompts, _ = parse_regions(regions, [size], mask_prompt)
    points, labels = prompts_to_rows(prompts)
    factor = np.float32(resize_factor(*size, canvas_side(processor.image_processor)))
    return torch.from_numpy(points * factor), torch.from_numpy(labels)


@dataclass(eq=False)
class TightMask:
    """A mask cut out at its tight box: a thousand of them on a large photo still fit into memory.

    Attributes:
        box: (x0, y0, x1, y1) with exclusive right and bottom edges; None for an empty mask.
        pixels: (y1 - y0, x1 - x0) bool, (0, 0) for an empty mask.
    """

    box: Box | None
    pixels: BoolArray

    def full(self, height: int, width: int) -> BoolArray:
        """(height, width) mask. Fresh zero pages: what lies far from the box takes no memory."""
        mask = np.zeros((height, width), dtype=bool)
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            mask[y0:y1, x0:x1] = self.pixels
        return mask

    def shifted(self, x: int, y: int) -> TightMask:
        """The same mask, seen from a picture whose origin is this much to the left and above."""
        return self if self.box is None else TightMask(_moved(self.box, x, y), self.pixels)


def tight_masks(processor: Any, logits: Tensor, encoded: EncodedImage) -> Iterator[TightMask]:
    """Low-resolution logits to masks of the picture: what `post_process_masks` gives, only where a mask can be.

    Args:
        processor: a [`TapProcessor`].
        logits: (N, 4G, 4G).
        encoded: the picture.
    """
    side = canvas_side(processor.image_processor)
    sizes = zip(encoded.resized_size, encoded.original_size, strict=True)
    rows, columns = (_Axis(logits.shape[-1], side, *size, logits.device) for size in sizes)
    for cells, (x0, y0, x1, y1) in zip(logits, cell_boxes(logits).tolist(), strict=True):
        (y, low_y), (x, low_x) = rows.reach_of(y0, y1), columns.reach_of(x0, x1)
        window = rows.weights[y, low_y] @ cells[low_y, low_x].float() @ columns.weights[x, low_x].T > 0
        yield _cut_out(window.cpu().numpy(), x.start, y.start)


class _Axis:
    """The way of one axis from mask cells over the canvas to pixels, as a matrix: bilinear resizing is separable."""

    def __init__(self, cells: int, side: int, resized: int, original: int, device: torch.device) -> None:
        canvas = interpolate(torch.eye(cells)[None], side, mode="linear", align_corners=False)[..., :resized]
        weights = interpolate(canvas, original, mode="linear", align_corners=False)[0].T
        self.touches = (weights > 0).numpy()
        self.weights = weights.contiguous().to(device)  # (pixels, cells)

    def reach_of(self, first: int, stop: int) -> tuple[slice, slice]:
        """Pixels that cells first..stop can make positive, and all cells that these pixels depend on."""
        pixels = _extent(np.any(self.touches[:, first:stop], axis=1))
        return pixels, _extent(np.any(self.touches[pixels], axis=0))


def _extent(line: Any) -> slice:
    inside = np.flatnonzero(line)
    return slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)


def _cut_out(window: BoolArray, x: int, y: int) -> TightMask:
    """The tight part of a window whose top left corner is at x, y."""
    box = mask_to_box(window) if window.size else None
    if box is None:
        return TightMask(None, np.zeros((0, 0), dtype=bool))
    x0, y0, x1, y1 = box
    return TightMask(_moved((x0, y0, x1, y1), x, y), window[y0:y1, x0:x1].copy())


def _moved(box: Box, x: int, y: int) -> Box:
    x0, y0, x1, y1 = box
    return x0 + x, y0 + y, x1 + x, y1 + y


def cell_boxes(logits: Tensor) -> Tensor:
    """Tight boxes (N, 4) of (N, h, w) > 0 on the CPU, in cells, xyxy with exclusive edges; all of an empty mask."""
    inside = logits > 0
    ranges = []
    for dim in (1, 2):  # any over rows leaves columns, and the other way round
        line = inside.any(dim=dim).int()
        ranges.append((line.argmax(dim=1), line.shape[1] - line.flip(1).argmax(dim=1)))
    (x0, x1), (y0, y1) = ranges
    return torch.stack([x0, y0, x1, y1], dim=1).cpu()


__all__ = ["EncodedImage", "TightMask", "cell_boxes", "encode_image", "prompt_rows", "tight_masks"]
