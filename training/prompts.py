"""Prompts drawn from masks while training, after TAP's two-stage sampler (arXiv:2312.09128), and clicks for tests.

Stage 0 prompts each region with its jittered box or one point. Stage 1 adds points where the first prediction was
wrong, as a user would. Masks lie on a grid over the square canvas; prompts are in canvas pixels. Random
numbers are drawn on the device of the generator, which need not be that of the masks.

Symbols: N regions, n prompt points, (h, w) mask grid, S canvas side.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Generator, Tensor

from tap_llm.masks import mask_to_points
from tap_llm.regions import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PAD, TOP_LEFT

PAD_COORDINATE = -0.5
JITTER_CANVAS = 1024  # the canvas on which the largest jitter is counted in pixels


@dataclass
class Prompts:
    """A flat batch of prompts.

    A row that started from points carries one pad, which TAP reads as a real token; rows that started from a box
    carry none. Further pads stand for points that could not be drawn, and the model masks them.

    Attributes:
        points: (N, n, 2) float32 x and y in canvas pixels; -0.5 for pads.
        labels: (N, n) int64: 0 background, 1 foreground, 2 top-left corner, 3 bottom-right corner, 4 pad.
        from_box: (N,) bool, how the row started; says which slot learns from it.
    """

    points: Tensor
    labels: Tensor
    from_box: Tensor

    @classmethod
    def from_boxes(cls, boxes: Tensor) -> Self:
        """Box prompts from (N, 4) boxes x0, y0, x1, y1 in canvas pixels; a box without area leaves two pads."""
        valid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        points = boxes.float().unflatten(1, (2, 2)).where(valid[:, None, None], PAD_COORDINATE)
        corners = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
        return cls(points, torch.where(valid[:, None], corners, PAD), valid)

    @classmethod
    def from_points(cls, points: Tensor, labels: Tensor) -> Self:
        """Point prompts from (N, n, 2) points in canvas pixels and (N, n) labels, with their pad behind."""
        started = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        pad = points.new_full((len(points), 1, 2), PAD_COORDINATE)
        no_points = cls(pad, labels.new_full((len(labels), 1), PAD), started)
        joined = no_points.append(points, labels)
        return cls(joined.points.roll(-1, dims=1), joined.labels.roll(-1, dims=1), started)

    def append(self, points: Tensor, labels: Tensor) -> Self:
        """The same prompts with (N, k, 2) points in canvas pixels and (N, k) labels behind."""
        points = points.float().where((labels != PAD)[..., None], PAD_COORDINATE)
        return type(self)(
            torch.cat([self.points, points], dim=1), torch.cat([self.labels, labels], dim=1), self.from_box
        )


def to_canvas(pixels: Tensor, grid: tuple[int, int], canvas_size: int) -> Tensor:
    """(..., 2) cells x, y of an (h, w) grid over the canvas -> canvas pixels of their centres, float32."""
    height, width = grid
    scale = torch.tensor([canvas_size / width, canvas_size / height], device=pixels.device)
    return (pixels.float() + 0.5) * scale - 0.5


def mask_boxes(masks: Tensor, canvas_size: int) -> Tensor:
    """Tight boxes of masks.

    Args:
        masks: (N, h, w) bool.
        canvas_size: S.

    Returns:
        (N, 4) float32 x0, y0, x1, y1 in canvas pixels, right and bottom edges exclusive; 0 for an empty mask.
    """
    edges = []
    for axis, size in ((1, masks.shape[2]), (2, masks.shape[1])):  # columns, then rows
        used = masks.any(dim=axis).byte()
        first, last = used.argmax(dim=1), size - used.flip(1).argmax(dim=1)
        edges.append(torch.stack([first, last], dim=1) * (canvas_size / size))
    boxes = torch.stack(edges, dim=2).flatten(1)  # x0, y0, x1, y1
    return boxes * masks.flatten(1).any(dim=1)[:, None]


def sample_pixels(region: Tensor, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw pixels of each region uniformly, without replacement where the region has enough of them.

    Args:
        region: (N, h, w) bool.
        count: k pixels per region.
        generator: source of randomness.

    Returns:
        (N, k) int64 indices into the flattened grid, and (N,) bool, False for an empty region (indices then mean
        nothing).
    """
    flat = region.flatten(1)
    keys = _uniform(flat.shape, generator, flat.device).masked_fill(~flat, -1.0)
    shuffled = keys.topk(min(count, flat.shape[1]), dim=1).indices  # pixels of the region first, in random order
    size = flat.sum(dim=1, keepdim=True)
    repeated = (_uniform((len(flat), count), generator, flat.device) * size).long()
    in_order = torch.arange(count, device=flat.device).expand_as(repeated)
    return shuffled.gather(1, torch.where(size < count, repeated, in_order)), size[:, 0] > 0


class PromptSampler:
    """Draws the prompts of both training stages.

    Args:
        canvas_size: S.
        box_probability: share of regions that start from their box. With 0, regions start from 2 to `max_points`
            points instead of one: the mode for captions of points and sketches.
        max_points: most points that a region gets over both stages.
        interactive_probability: share of regions whose stage 1 looks at the prediction; the others get points of
            the true mask.
        error_region: False never looks at the prediction: the ablation.
        box_jitter: standard deviation of the shift of a box side, as a share of the box's width or height.
        box_jitter_max_px: largest shift, in pixels of a canvas of 1024; scaled with the canvas.
    """

    def __init__(
        self,
        canvas_size: int,
        box_probability: float = 0.5,
        max_points: int = 9,
        interactive_probability: float = 0.5,
        error_region: bool = True,
        box_jitter: float = 0.1,
        box_jitter_max_px: float = 20.0,
    ) -> None:
        self.canvas_size = canvas_size
        self.box_probability = box_probability
        self.max_points = max_points
        self.interactive_probability = interactive_probability if error_region else 0.0
        self.box_jitter = box_jitter
        self.largest_shift = box_jitter_max_px * canvas_size / JITTER_CANVAS

    def start(self, masks: Tensor, generator: Generator, boxes: Tensor | None = None) -> Prompts:
        """Stage 0: a jittered box, or one foreground point and a pad.

        Args:
            masks: (N, h, w) bool; an empty mask gets pads only.
            generator: source of randomness.
            boxes: (N, 4) tight boxes in canvas pixels where they are known more finely than the grid.

        Returns:
            [`Prompts`] of 2 columns; with `box_probability` 0 of up to `max_points` + 1.
        """
        box_prompts = self.start_from_boxes(mask_boxes(masks, self.canvas_size) if boxes is None else boxes, generator)
        count = 1
        if self.box_probability == 0:
            count = _randint(2, self.max_points, generator)
        indices, found = sample_pixels(masks, count, generator)
        points = self._place(indices, masks.shape)
        labels = torch.where(found[:, None], FOREGROUND, PAD).expand(-1, count)
        point_prompts = Prompts.from_points(points, labels)
        if self.box_probability == 0:
            return point_prompts
        drawn = _uniform((len(masks),), generator, masks.device) < self.box_probability
        from_box = drawn & box_prompts.from_box
        return Prompts(
            torch.where(from_box[:, None, None], box_prompts.points, point_prompts.points),
            torch.where(from_box[:, None], box_prompts.labels, point_prompts.labels),
            from_box,
        )

    def start_from_boxes(self, boxes: Tensor, generator: Generator) -> Prompts:
        """Stage 0 for regions that have no mask: every region starts from its box.

        Args:
            boxes: (N, 4) x0, y0, x1, y1 in canvas pixels; a box without area leaves two pads.
            generator: source of randomness.

        Returns:
            [`Prompts`] of 2 columns. Sides moved outward only, and not clipped to the image.
        """
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        shift = _normal(boxes.shape, generator, boxes.device) * (self.box_jitter * sides)
        shift = shift.clamp(-self.largest_shift, self.largest_shift)
        shift = torch.cat([shift[:, :2].clamp(max=0), shift[:, 2:].clamp(min=0)], dim=1)
        jittered = Prompts.from_boxes(boxes)
        points = jittered.points + shift.unflatten(1, (2, 2)) * jittered.from_box[:, None, None]
        return Prompts(points, jittered.labels, jittered.from_box)

    def correct(self, prompts: Prompts, masks: Tensor, predicted: Tensor | None, generator: Generator) -> Prompts:
        """Stage 1: 1 to `max_points` - 1 further points, the same number for every region.

        A point of an interactive region lies where prediction and mask differ: foreground if the mask was missed
        there, else background. Where they agree, and in other regions, it lies on the mask. A region without any
        pixel to choose keeps pads.

        Args:
            prompts: of stage 0.
            masks: (N, h, w) bool.
            predicted: (N, h, w) bool, masks predicted from `prompts`; None to sample from the true masks alone.
            generator: source of randomness.

        Returns:
            [`Prompts`] with the points behind those of stage 0.
        """
        count = _randint(1, self.max_points - 1, generator)
        region = masks
        if predicted is not None:
            interactive = _uniform((len(masks),), generator, masks.device) < self.interactive_probability
            error = predicted ^ masks
            usable = interactive & error.flatten(1).any(dim=1)
            region = torch.where(usable[:, None, None], error, masks)
        indices, found = sample_pixels(region, count, generator)
        inside = masks.flatten(1).gather(1, indices)
        labels = torch.where(inside, FOREGROUND, BACKGROUND).where(found[:, None], PAD)
        return prompts.append(self._place(indices, masks.shape), labels)

    def _place(self, indices: Tensor, shape: torch.Size) -> Tensor:
        """(N, k) indices into the flattened grid -> (N, k, 2) canvas pixels."""
        height, width = shape[-2:]
        pixels = torch.stack([indices % width, indices // width], dim=-1)
        return to_canvas(pixels, (height, width), self.canvas_size)


def centre_click(masks: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel of each mask that lies deepest inside: the one click of an evaluation.

    Args:
        masks: (N, h, w) bool.

    Returns:
        (N, 2) int64 x, y of the pixel, and (N,) labels: foreground, or pad for an empty mask.
    """
    pixels = torch.zeros(len(masks), 2, dtype=torch.long)
    labels = torch.full((len(masks),), PAD)
    for row, mask in enumerate(masks.cpu().numpy()):
        for point in mask_to_points(mask, 1):  # none for an empty mask
            pixels[row], labels[row] = torch.from_numpy(point).long(), FOREGROUND
    return pixels.to(masks.device), labels.to(masks.device)


def click_error_centre(masks: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """The next click of a careful user: deepest inside the largest connected region that is wrong.

    Args:
        masks: (N, h, w) bool.
        predicted: (N, h, w) bool.

    Returns:
        (N, 2) int64 x, y of the pixel, and (N,) labels: foreground if the mask was missed there, background if it
        was predicted wrongly, pad where nothing is wrong.
    """
    pairs = zip((masks & ~predicted).cpu().numpy(), (predicted & ~masks).cpu().numpy(), strict=True)
    regions = [_largest_region(missed, wrong) for missed, wrong in pairs]
    stacked = np.stack(regions) if regions else np.zeros(masks.shape, dtype=bool)
    pixels, labels = centre_click(torch.from_numpy(stacked).to(masks.device))
    inside = masks[torch.arange(len(masks), device=masks.device), pixels[:, 1], pixels[:, 0]]
    return pixels, labels.masked_fill((labels == FOREGROUND) & ~inside, BACKGROUND)


def _largest_region(missed: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part of either mask; on a tie the missed one."""
    best, best_area = np.zeros_like(missed), 0
    for error in (missed, wrong):
        parts, _ = ndimage.label(error)
        areas = np.bincount(parts.ravel())[1:]
        if len(areas) and areas.max() > best_area:
            best, best_area = parts == 1 + areas.argmax(), areas.max()
    return best


def _uniform(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def _normal(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def _randint(low: int, high: int, generator: Generator) -> int:
    """Whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))
