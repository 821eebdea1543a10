"""A picture encoded once and prompted any number of times: shared by the pipeline and everything mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .masks import BoolArray
from .regions import MaskPrompt, Region, parse_regions, prompts_to_rows
from .tap.image_processing_tap import canvas_side, resize_factor

_UPSCALE_PIXELS = 1 << 25  # pixels brought to full resolution at once: 128 MiB of logits


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


def full_masks(processor: Any, logits: Tensor, encoded: EncodedImage) -> Iterator[BoolArray]:
    """Low-resolution logits (N, 4G, 4G) to N masks (H, W) of the picture, a bounded number at a time."""
    height, width = encoded.original_size
    sizes = (torch.tensor([encoded.original_size]), torch.tensor([encoded.resized_size]))
    for chunk in logits.split(max(1, _UPSCALE_PIXELS // (height * width))):
        for mask in processor.post_process_masks(chunk[:, None], *sizes):
            yield mask[0].cpu().numpy()


__all__ = ["EncodedImage", "encode_image", "full_masks", "prompt_rows"]
