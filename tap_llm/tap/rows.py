"""Regions as a flat batch of rows: what must fit together, and which images a part of them needs."""

import torch
from torch import Tensor


def check_rows(
    input_points: Tensor | None, input_labels: Tensor | None, index: Tensor | None, num_images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Check that flat rows fit together.

    Args:
        input_points: (N, n, 2).
        input_labels: (N, n).
        index: (N,) image of each row; None for one image, or one row per image.
        num_images: B.

    Returns:
        `input_points`, `input_labels`, and the (N,) int64 image of each row.

    Raises:
        ValueError: something is missing, or does not fit.
    """
    if input_points is None or input_labels is None:
        raise ValueError("TAP needs input_points (N, n, 2) and input_labels (N, n): call the processor with regions")
    if input_points.shape[:2] != input_labels.shape or input_points.shape[-1] != 2:
        raise ValueError(
            f"input_points must be (N, n, 2) and input_labels (N, n), got {tuple(input_points.shape)} and "
            f"{tuple(input_labels.shape)}"
        )
    rows = input_points.shape[0]
    if index is not None:
        if index.shape != (rows,):
            raise ValueError(f"region_image_index must be ({rows},), one image per region, got {tuple(index.shape)}")
        _check_images(index, num_images)
        return input_points, input_labels, index
    if num_images == 1:
        return input_points, input_labels, torch.zeros(rows, dtype=torch.long, device=input_points.device)
    if num_images != rows:
        raise ValueError(
            f"{rows} regions on {num_images} images: give region_image_index to say which region is on which image"
        )
    return input_points, input_labels, torch.arange(rows, device=input_points.device)


def _check_images(index: Tensor, num_images: int) -> None:
    """On the CPU, where looking costs nothing: no row may be on an image that is not there."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not len(index):
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"region_image_index holds {low if low < 0 else high}, but there are {num_images} images")


def images_in_use(image_embeddings: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The images that the rows of a chunk lie on, and the rows' places among them: others need no projection."""
    if len(image_embeddings) == 1 or len(index) == 0:
        return image_embeddings, index
    low, high = int(index.min()), int(index.max())
    return image_embeddings[low : high + 1], index - low


__all__ = ["check_rows", "images_in_use"]
