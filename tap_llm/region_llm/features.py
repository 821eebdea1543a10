"""What a language model gets to know of regions: all that frozen TAP computes, in a form that can be stored.

Boxes are (cx, cy, w, h) as shares of the photo, so the padding of TAP's canvas never shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..encoded import cell_boxes
from ..regions import TOP_LEFT
from ..tap.outputs import TapOutput, take_slots

WHOLE = (0.5, 0.5, 1.0, 1.0)


@dataclass(eq=False)
class RegionFeatures:
    """N regions on B images, after TAP and before the projector.

    Attributes:
        semantic_tokens: (N, D) token of the routed slot.
        boxes: (N, 4) float32, see the module's head: the prompt's own box, else the tight box of the routed mask,
            else the whole image.
        roi: (N, R*R, D) image embedding at the centres of an R x R grid over the box; (N, 0, D) if not extracted.
        global_tokens: (B, g*g, D*u*u) image embedding over the photo, u x u cells a token; (B, 0, D) if not extracted.
        region_image_index: (N,) int64 image of each region.
    """

    semantic_tokens: Tensor
    boxes: Tensor
    roi: Tensor
    global_tokens: Tensor
    region_image_index: Tensor

    def __len__(self) -> int:
        return len(self.semantic_tokens)

    @property
    def num_images(self) -> int:
        """B."""
        return len(self.global_tokens)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> RegionFeatures:
        """The same elsewhere, or in another floating-point type; boxes stay float32."""
        floats = (tensor.to(device, dtype) for tensor in (self.semantic_tokens, self.roi, self.global_tokens))
        semantic_tokens, roi, global_tokens = floats
        return RegionFeatures(
            semantic_tokens, self.boxes.to(device), roi, global_tokens, self.region_image_index.to(device)
        )

    def select(self, rows: Sequence[int]) -> RegionFeatures:
        """Some of the regions, in a new order; all images stay."""
        chosen = torch.as_tensor(rows, dtype=torch.long, device=self.semantic_tokens.device)
        return RegionFeatures(
            self.semantic_tokens[chosen], self.boxes[chosen], self.roi[chosen], self.global_tokens,
            self.region_image_index[chosen],
        )  # fmt: skip

    @staticmethod
    def cat(parts: Sequence[RegionFeatures]) -> RegionFeatures:
        """One batch of several; images and regions keep their order."""
        first_images = torch.tensor([0, *(part.num_images for part in parts[:-1])]).cumsum(0).tolist()
        return RegionFeatures(
            semantic_tokens=torch.cat([part.semantic_tokens for part in parts]),
            boxes=torch.cat([part.boxes for part in parts]),
            roi=torch.cat([part.roi for part in parts]),
            global_tokens=torch.cat([part.global_tokens for part in parts]),
            region_image_index=torch.cat(
                [part.region_image_index + first for part, first in zip(parts, first_images, strict=True)]
            ),
        )


@torch.no_grad()
def extract_features(
    tap: Any,
    pixel_values: Tensor | None = None,
    input_points: Tensor | None = None,
    input_labels: Tensor | None = None,
    region_image_index: Tensor | None = None,
    resized_sizes: Tensor | None = None,
    image_embeddings: Tensor | None = None,
    roi_grid: int = 4,
    global_grid: int = 8,
) -> RegionFeatures:
    """Run TAP; an image is encoded once, however many regions it has.

    Args:
        tap: a [`TapModel`] or [`TapForConditionalGeneration`].
        pixel_values: (B, 3, S, S) from the processor; or `image_embeddings`.
        input_points: (N, n, 2) in canvas pixels; None for images without regions.
        input_labels: (N, n).
        region_image_index: (N,); may be left out for one image, or one region per image.
        resized_sizes: (B, 2) height and width of the photos on the canvas; the whole canvas if None.
        image_embeddings: (B, D, G, G), in place of `pixel_values`.
        roi_grid: R; 0 leaves `roi` out.
        global_grid: g; 0 leaves `global_tokens` out.

    Raises:
        ValueError: not exactly one of `pixel_values` and `image_embeddings`, or rows that do not fit together.
    """
    if (pixel_values is None) == (image_embeddings is None):
        raise ValueError("give exactly one of pixel_values and image_embeddings")
    if pixel_values is not None:
        image_embeddings = tap.get_image_embeddings(pixel_values.to(tap.device, tap.dtype))
    assert image_embeddings is not None
    images = image_embeddings.to(tap.device, tap.dtype)
    extents = _extents(resized_sizes, images, tap.config.vision_config.image_size)
    global_tokens = _global_tokens(images, extents, global_grid)
    if input_points is None or len(input_points) == 0:
        return _without_regions(images, global_tokens, roi_grid)
    labels = input_labels.to(tap.device) if input_labels is not None else None
    points = input_points.to(tap.device)
    index = region_image_index.to(tap.device) if region_image_index is not None else None
    outputs = tap(
        input_points=points, input_labels=labels, region_image_index=index, image_embeddings=images, return_dict=True
    )
    if index is None:  # TAP has checked that this is what leaving it out means
        index = torch.arange(len(points), device=tap.device).clamp(max=len(images) - 1)
    boxes = _region_boxes(outputs, points, labels, extents[index], tap.config.vision_config.image_size)
    centres = grid_cells(boxes, roi_grid)[..., :2] * extents[index, None]
    return RegionFeatures(
        semantic_tokens=take_slots(outputs.semantic_tokens, outputs.slots),
        boxes=boxes,
        roi=sample_bilinear(images, index, centres),
        global_tokens=global_tokens,
        region_image_index=index,
    )


def _extents(resized_sizes: Tensor | None, images: Tensor, side: int) -> Tensor:
    """(B, 2) width and height of the photos as shares of the canvas."""
    if resized_sizes is None:
        return torch.ones(len(images), 2, device=images.device)
    return resized_sizes.to(images.device).flip(-1).float() / side


def _without_regions(images: Tensor, global_tokens: Tensor, roi_grid: int) -> RegionFeatures:
    width = images.shape[1]
    return RegionFeatures(
        semantic_tokens=images.new_zeros(0, width),
        boxes=torch.zeros(0, 4, device=images.device),
        roi=images.new_zeros(0, roi_grid**2, width),
        global_tokens=global_tokens,
        region_image_index=torch.zeros(0, dtype=torch.long, device=images.device),
    )


def _region_boxes(outputs: TapOutput, points: Tensor, labels: Any, extents: Tensor, side: int) -> Tensor:
    """(N, 4) boxes as shares of the photos, whose extents (N, 2) are shares of the canvas."""
    assert outputs.pred_masks is not None and outputs.slots is not None
    masks = take_slots(outputs.pred_masks, outputs.slots)
    tight = cell_boxes(masks).to(points.device) / masks.shape[-1]
    corners = torch.cat([points, points], dim=1)[:, :2].flatten(1).float() / side
    boxes = torch.where((labels[:, :1] == TOP_LEFT), corners, tight) / extents.repeat(1, 2)
    (x0, y0, x1, y1) = boxes.clamp(0, 1).unbind(dim=1)
    centred = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
    has_area = ((x1 > x0) & (y1 > y0))[:, None]
    return torch.where(has_area, centred, centred.new_tensor(WHOLE))


def _global_tokens(images: Tensor, extents: Tensor, grid: int) -> Tensor:
    """(B, D, G, G) -> (B, g*g, D*u*u) over the photo alone, without the canvas' padding."""
    count, width, side, _ = images.shape
    if grid == 0:
        return images.new_zeros(count, 0, width)
    photo = torch.tensor([WHOLE], device=images.device)
    centres = grid_cells(photo, side)[..., :2] * extents[:, None]
    cells = sample_bilinear(images, torch.arange(count, device=images.device), centres)
    step = side // grid
    blocks = cells.view(count, grid, step, grid, step, width).transpose(2, 3)
    return blocks.reshape(count, grid * grid, step * step * width)


def grid_cells(boxes: Tensor, side: int) -> Tensor:
    """Cut boxes (N, 4) of (cx, cy, w, h) into side x side cells: (N, side*side, 4), row by row."""
    steps = (torch.arange(side, device=boxes.device) + 0.5) / max(side, 1) - 0.5
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    shifts = torch.stack([x.flatten(), y.flatten()], dim=1)  # of the centres, in box sizes
    centres = boxes[:, None, :2] + shifts * boxes[:, None, 2:]
    return torch.cat([centres, (boxes[:, None, 2:] / max(side, 1)).expand_as(centres)], dim=2)


def sample_bilinear(images: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Read grids between their cells' centres; beyond the outermost centres the border repeats.

    Args:
        images: (B, D, G, G).
        index: (N,) image of each row.
        points: (N, P, 2) x and y as shares of the canvas, float32.

    Returns:
        (N, P, D) in the images' dtype.
    """
    side = images.shape[-1]
    cells = (points * side - 0.5).clamp(0, side - 1)
    low = cells.floor().clamp(max=max(side - 2, 0))
    (right, down), (x, y) = (cells - low).to(images.dtype)[..., None, :].unbind(-1), low.long().unbind(-1)
    table = images.flatten(2).transpose(1, 2)

    def read(rows: Tensor, columns: Tensor) -> Tensor:
        return table[index[:, None], rows.clamp(max=side - 1) * side + columns.clamp(max=side - 1)]

    upper = read(y, x) * (1 - right) + read(y, x + 1) * right
    lower = read(y + 1, x) * (1 - right) + read(y + 1, x + 1) * right
    return upper * (1 - down) + lower * down


__all__ = ["RegionFeatures", "extract_features", "grid_cells", "sample_bilinear"]
