"""Pictures of regions: translucent masks with crisp outlines, the user's prompts, labels that never overlap.

A few regions get their label next to them. Where labels would crowd the picture, each region gets a numbered
chip and the text goes into a legend beneath it. All sizes follow the picture: it reads the same at any size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tap_llm.drawing import BLACK, WHITE, Color, Point, disc, frame, region_color, stroke
from tap_llm.errors import InputError
from tap_llm.images import load_image
from tap_llm.label_drawing import Style, draw_labels
from tap_llm.label_layout import Anchor, Rect
from tap_llm.masks import mask_to_box

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

SMALL_SIDE = 480  # pictures whose longest side is below this are enlarged ...
ENLARGED_SIDE = 640  # ... by the smallest whole factor that brings it here


@dataclass(frozen=True)
class _Shape:
    """A region at the picture's scale: the mask inside its tight box, and the box's top-left corner."""

    index: int
    pixels: Mask
    x: int
    y: int

    @property
    def box(self) -> Rect:
        height, width = self.pixels.shape
        return self.x, self.y, self.x + width, self.y + height

    @cached_property
    def area(self) -> int:
        return int(self.pixels.sum())


def _checked_mask(index: int, result: Mapping[str, Any], size: tuple[int, int]) -> Mask:
    mask = np.asarray(result["mask"], dtype=bool)
    if mask.shape != (size[1], size[0]):
        raise InputError(
            f"The mask of region {index + 1} has shape {mask.shape}, but the image needs (height, width) = "
            f"{(size[1], size[0])}. Draw on the image that the results were made from."
        )
    return mask


def _shape(index: int, mask: Mask, scale: int) -> _Shape | None:
    """Cuts a mask to its box and enlarges it; enlarged edges are rounded, not stepped."""
    box = mask_to_box(mask)
    if box is None:
        return None
    x0, y0, x1, y1 = (int(edge) for edge in box)
    pixels = mask[y0:y1, x0:x1]
    if scale > 1:
        grey = Image.fromarray(np.pad(pixels, 2).astype(np.uint8) * 255)
        grey = grey.resize((grey.width * scale, grey.height * scale), Image.Resampling.BICUBIC)
        inner = slice(2 * scale, -2 * scale)
        pixels = np.asarray(grey)[inner, inner] > 127
    return _Shape(index, pixels, x0 * scale, y0 * scale)


def _owners(shapes: Sequence[_Shape], width: int, height: int) -> NDArray[np.int32]:
    """(H, W) index of the last, and so topmost, of the shapes on each pixel; -1 where there is none."""
    owners = np.full((height, width), -1, dtype=np.int32)
    for shape in shapes:
        x0, y0, x1, y1 = shape.box
        owners[y0:y1, x0:x1][shape.pixels] = shape.index
    return owners


def _fill(canvas: Image.Image, owners: NDArray[np.int32], colors: Sequence[Color], opacity: float) -> None:
    """One flat tint per pixel, that of its owner: overlapping regions do not mix into mud."""
    palette = np.array([*colors, (0, 0, 0)], dtype=np.uint8)  # index -1 is the last
    alpha = np.where(owners >= 0, round(255 * opacity), 0).astype(np.uint8)
    canvas.paste(Image.fromarray(palette[owners]), mask=Image.fromarray(alpha))


def _edge_distance(pixels: Mask, reach: int) -> Floats:
    """Signed distance in pixels to the mask's edge, positive outside, for the mask padded by `reach` + 1.

    Exact up to `reach`, constant beyond. The cost follows the length of the edge, not the area.
    """
    padded = np.pad(pixels, reach + 1)
    inner = padded[1:-1, 1:-1].copy()
    for neighbours in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        inner &= neighbours
    edge = padded.copy()
    edge[1:-1, 1:-1] &= ~inner
    flat = np.flatnonzero(edge)
    distance = np.full(padded.size, reach + 1, dtype=np.float32)
    span = np.arange(-reach, reach + 1)
    dy, dx = (axis.ravel() for axis in np.meshgrid(span, span, indexing="ij"))
    radius = np.hypot(dy, dx)
    for k in np.argsort(-radius):  # the nearest comes last and wins
        if radius[k] <= reach:
            distance[flat + (dy[k] * padded.shape[1] + dx[k])] = radius[k]
    unsigned = distance.reshape(padded.shape)
    return np.where(padded, -unsigned - 0.5, unsigned - 0.5)


def _band(distance: Floats, start: float, stop: float) -> Image.Image:
    """Anti-aliased coverage (0 to 255) of the pixels whose distance lies between start and stop."""
    coverage = np.minimum(distance - start, stop - distance) + 0.5
    return Image.fromarray((coverage.clip(0, 1) * 255).astype(np.uint8))


def _outline(canvas: Image.Image, shape: _Shape, color: Color, width: float, smoothing: float) -> None:
    """A coloured line just inside the edge, a light halo just outside, and a soft dark rim around both.

    `smoothing` (pixels) rounds the steps of the mask's edge.
    """
    halo, rim = 0.5 * width, 1.1 * width
    reach = math.ceil(width + smoothing + 1.5)
    distance = _edge_distance(shape.pixels, reach)
    distance = ndimage.gaussian_filter(distance, smoothing, mode="nearest", truncate=2.5)
    corner = (shape.x - reach - 1, shape.y - reach - 1)
    dark = _band(distance, halo, rim).point(lambda value: value * 0.4)
    light = _band(distance, -0.5, halo).point(lambda value: value * 0.9)
    for tone, alpha in (((0, 0, 0), dark), ((255, 255, 255), light), (color, _band(distance, -width, 0))):
        canvas.paste(tone, corner, alpha)


def _points(region: Mapping[str, Any], key: str, scale: int) -> list[Point]:
    """Prompt points at the picture's scale; as pixel indices they sit in the middle of a pixel."""
    value = region.get(key)
    points = np.empty((0, 2)) if value is None else np.asarray(value, dtype=np.float64).reshape(-1, 2)
    return [(x, y) for x, y in ((points + 0.5) * scale).tolist()]


def _prompt_box(region: Mapping[str, Any], scale: int) -> tuple[float, float, float, float] | None:
    if region.get("box") is None:
        return None
    x0, y0, x1, y1 = (float(edge) * scale for edge in region["box"])
    return x0, y0, x1, y1


def _draw_point(canvas: Image.Image, point: Point, label: int, color: Color, unit: float) -> None:
    """Foreground: a filled dot. Background: a white disc with a cross in it."""
    radius = max(3.5, 5 * unit)
    disc(canvas, point, 1.5 * radius, BLACK, 0.4)
    disc(canvas, point, 1.3 * radius, WHITE)
    if label > 0:
        disc(canvas, point, 0.95 * radius, color)
        return
    arm, (x, y) = 0.55 * radius, point
    for slope in (-1, 1):
        stroke(canvas, [(x - arm, y - slope * arm), (x + arm, y + slope * arm)], 0.4 * radius, (196, 30, 40))


def _draw_prompt(canvas: Image.Image, region: Mapping[str, Any], color: Color, scale: int, style: Style) -> None:
    """The user's box, sketch and points; a mask given as a prompt shows in the result's own mask."""
    box = _prompt_box(region, scale)
    thin = max(1, round(0.6 * style.line))
    if box is not None:
        frame(canvas, box, 3 * thin, BLACK, 0.4)
        frame(canvas, box, thin, color)
    sketch = _points(region, "sketch", scale)
    if sketch:
        for width, tone, opacity in ((3.2, BLACK, 0.4), (2.4, WHITE, 1.0), (1.2, color, 1.0)):
            stroke(canvas, sketch, width * style.line, tone, opacity)
    points = _points(region, "points", scale)
    labels = region.get("labels")
    labels = [1] * len(points) if labels is None else [int(label) for label in labels]
    for point, label in zip(points, labels, strict=False):
        _draw_point(canvas, point, label, color, style.unit)


def _mask_anchor(shape: _Shape) -> Anchor:
    """The middle of the largest disc that fits into the mask, and the box of the part that it lies in.

    Works on a coarse copy. A mask in several far-off parts thus gets its label next to the thickest one.
    """
    step = max(1, math.ceil(max(shape.pixels.shape) / 64))
    coarse = np.asarray(Image.fromarray(shape.pixels.astype(np.uint8) * 255).reduce(step)) > 127
    if not coarse.any():
        return Anchor(shape.box, ((shape.box[0] + shape.box[2]) / 2, (shape.box[1] + shape.box[3]) / 2))
    depth = ndimage.distance_transform_edt(np.pad(coarse, 1))[1:-1, 1:-1]
    y, x = (int(i) for i in np.unravel_index(int(depth.argmax()), depth.shape))
    parts, _ = ndimage.label(coarse)
    x0, y0, x1, y1 = (int(edge) * step for edge in mask_to_box(parts == parts[y, x]) or (0, 0, 1, 1))
    box = (shape.x + x0, shape.y + y0, min(shape.x + x1, shape.box[2]), min(shape.y + y1, shape.box[3]))
    return Anchor(box, (shape.x + (x + 0.5) * step, shape.y + (y + 0.5) * step))


def _prompt_anchor(region: Mapping[str, Any], scale: int, size: tuple[int, int]) -> Anchor:
    """For an empty mask: the prompt or, without one, the whole picture."""
    corners = _points(region, "points", scale) + _points(region, "sketch", scale)
    box = _prompt_box(region, scale)
    if box is not None:
        corners += [box[:2], box[2:]]
    if not corners:
        corners = [(0.0, 0.0), (float(size[0]), float(size[1]))]
    path = np.array(corners).clip(0, np.array(size) - 1)
    x0, y0, x1, y1 = np.rint([*path.min(0), *path.max(0)]).astype(int).tolist()
    return Anchor((x0, y0, x1 + 1, y1 + 1), ((x0 + x1) / 2, (y0 + y1) / 2))


def _crowd(owners: NDArray[np.int32], shapes: Sequence[_Shape], count: int, style: Style) -> Floats:
    """What labels had better not cover, on a coarse grid: each region's pixels share a cost of 1."""
    weights = np.zeros(count + 1, dtype=np.float32)  # index -1, no region, is the last
    for shape in shapes:
        weights[shape.index] = 1 / shape.area
    return np.asarray(Image.fromarray(weights[owners]).reduce(max(1, style.title // 4)))


def _enlargement(size: tuple[int, int]) -> int:
    longest = max(size)
    return 1 if longest >= SMALL_SIDE else math.ceil(ENLARGED_SIDE / longest)


def draw_regions(
    image: Any,
    results: Sequence[Mapping[str, Any]],
    *,
    labels: bool = True,
    prompts: bool = True,
    opacity: float = 0.42,
    font: str | Path | None = None,
) -> Image.Image:
    """Draws the results of `RegionPipeline` on a copy of their image.

    Masks are tinted and outlined in `region_color(index)`, small regions over large ones. Labels read
    "1 frog 96%" with the caption beneath, next to their regions; where they do not fit, each region carries a
    numbered chip and a legend beneath the picture holds the text (as many rows as fit in the picture's own
    height, then "+ 57 more").

    Args:
        image: What the results were made from: PIL image, path, (H, W, 3) uint8 array or (3, H, W) tensor.
        results: Dicts with "mask" (H, W) bool and, all optional, "region" (the prompt: box, points, sketch in
            original pixels), "concept", "concept_score" and "caption".
        labels: Draw labels and, where needed, the legend.
        prompts: Draw the user's boxes, points and sketches.
        opacity: Of the tint, 0 to 1.
        font: TrueType or OpenType file. Pillow's own font, the default, knows little beyond ASCII.

    Returns:
        RGB picture. Its size is the image's, except: an image whose longest side is below 480 pixels is
        enlarged by a whole factor to at least 640; a legend adds height and, to a very narrow image, width.
        Without results, a plain copy of the image.

    Raises:
        InputError: A mask's size is not the image's, the opacity is out of range, or the font cannot be read.
    """
    canvas = load_image(image).copy()
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity must lie between 0 and 1, not {opacity}.")
    if not results:
        return canvas
    masks = [_checked_mask(index, result, canvas.size) for index, result in enumerate(results)]
    scale = _enlargement(canvas.size)
    if scale > 1:
        canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.BICUBIC)
    found = [_shape(index, mask, scale) for index, mask in enumerate(masks)]
    shapes = sorted((shape for shape in found if shape is not None), key=lambda shape: -shape.area)
    colors = [region_color(index) for index in range(len(results))]
    style = Style(canvas.width, canvas.height, len(results), font)
    owners = _owners(shapes, canvas.width, canvas.height)
    _fill(canvas, owners, colors, opacity)
    smoothing = min(0.3 + 0.5 * scale, 3 * style.line)  # whole enlarged pixels would show as steps
    for shape in shapes:
        _outline(canvas, shape, colors[shape.index], style.line, smoothing)
    regions = [result.get("region") or {} for result in results]
    for region, color in zip(regions if prompts else [], colors, strict=False):
        _draw_prompt(canvas, region, color, scale, style)
    if not labels:
        return canvas
    anchors = [
        _prompt_anchor(region, scale, canvas.size) if shape is None else _mask_anchor(shape)
        for shape, region in zip(found, regions, strict=True)
    ]
    return draw_labels(canvas, results, anchors, colors, style, _crowd(owners, shapes, len(results), style))
