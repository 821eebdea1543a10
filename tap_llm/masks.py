"""Masks as numpy arrays: COCO run lengths, polygons, tight boxes, interior points, box suppression.

Conventions, shared with COCO: a mask is (H, W); box edges are exclusive (columns 3..7 give x0 = 3, x1 = 8);
polygon vertices live on the same axes, so a polygon along a box's edges fills just that box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .errors import InputError
from .images import check_image_size

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_MAX_DIGITS = 7  # base-32 digits of one count: 35 bits, far above any image
_POLYGON_SCALE = 5  # COCO draws outlines on a grid five times finer than the pixels
_MAX_OUTLINE = 1_000_000  # pixels of outline per polygon: bounds memory against wild coordinates
_POINT_CELLS = 128 * 128  # interior points are chosen on a grid of about this many cells


def encode_rle(mask: ArrayLike) -> dict[str, Any]:
    """Encode a mask as compressed COCO RLE, byte for byte as `pycocotools.mask.encode` does.

    Args:
        mask: (H, W), nonzero = inside.

    Returns:
        `{"size": [H, W], "counts": str}`, runs in column-major order; ready for JSON.

    Raises:
        InputError: not two-dimensional, or without pixels.
    """
    array = _as_mask(mask)
    flat = np.ascontiguousarray(array.T).ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size])))
    if flat[0]:  # runs start with the outside
        counts = np.concatenate(([0], counts))
    return {"size": list(array.shape), "counts": _counts_to_string(counts.astype(np.int64))}


def decode_rle(rle: Mapping[str, Any]) -> BoolArray:
    """Decode a COCO RLE.

    Args:
        rle: `{"size": [H, W], "counts": ...}`, counts compressed (`str`, `bytes`) or a list of run lengths.

    Returns:
        (H, W) bool, C-contiguous.

    Raises:
        InputError: a key is missing, the size is impossible or above `images.MAX_IMAGE_PIXELS`, or the runs
            are negative, malformed, or do not sum to H * W (checked before anything of that size exists).
    """
    height, width = rle_size(rle)
    counts = _rle_counts(rle)
    area = height * width
    if counts.size and (counts.min() < 0 or counts.max() > area):
        raise InputError(f"RLE: run lengths must lie between 0 and {area} (size {height}x{width})")
    if counts.sum() != area:
        raise InputError(f"RLE: runs sum to {counts.sum()}, but size {[height, width]} has {area} pixels")
    inside = np.arange(counts.size) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, counts).reshape(width, height).T)


def _as_mask(mask: ArrayLike) -> BoolArray:
    array = np.asarray(mask)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"mask: expected shape (height, width) with at least one pixel, got {array.shape}")
    return array if array.dtype == np.bool_ else array != 0


def rle_size(rle: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a COCO RLE, without decoding it; InputError as [`decode_rle`]."""
    missing = [key for key in ("size", "counts") if key not in rle]
    if missing:
        raise InputError(f'RLE: missing key "{missing[0]}"; expected {{"size": [H, W], "counts": ...}}')
    try:
        height, width = map(int, rle["size"])
        if [height, width] != list(rle["size"]):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"RLE: size must be [height, width] in pixels, got {rle['size']!r}") from None
    check_image_size(width, height, "RLE")
    return height, width


def _rle_counts(rle: Mapping[str, Any]) -> IntArray:
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        return _string_to_counts(counts)
    try:
        array = np.asarray(counts)
    except (ValueError, OverflowError, TypeError):
        array = np.empty(0, dtype=object)
    if array.size == 0 or array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError("RLE: counts must be a compressed string or a flat list of whole run lengths")
    return array.astype(np.int64)  # what overflows turns negative, which the caller refuses


def _counts_to_string(counts: IntArray) -> str:
    """Base 32, low digit first, offset 48, bit 5 = more; from the fourth run on, minus the run two before."""
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    digits, used = [], []
    alive = np.ones(len(rest), dtype=bool)
    while alive.any():
        digit = rest & 31
        rest >>= 5
        more = np.where(digit & 16, rest != -1, rest != 0)
        digits.append(digit + 32 * more + 48)
        used.append(alive)
        alive = alive & more
    return np.stack(digits, 1)[np.stack(used, 1)].astype(np.uint8).tobytes().decode("ascii")


def _string_to_counts(text: str | bytes) -> IntArray:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if digits.size == 0 or digits.min() < 0 or digits.max() > 63:
        raise InputError("RLE: counts are empty or contain characters that are not part of a COCO RLE")
    ends = np.flatnonzero(digits < 32)
    if ends.size == 0 or ends[-1] != digits.size - 1:
        raise InputError("RLE: counts are truncated")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _MAX_DIGITS:
        raise InputError("RLE: a run length is too large")
    shifts = 5 * (np.arange(digits.size) - np.repeat(starts, lengths))
    counts = np.add.reduceat((digits & 31) << shifts, starts)
    counts -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)  # sign of the last digit
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def polygons_to_mask(polygons: Sequence[Any], height: int, width: int) -> BoolArray:
    """Fill polygons; their union is the mask. Pixel for pixel the same as COCO (`frPyObjects`, then `merge`).

    Args:
        polygons: list of polygons, each flat `[x0, y0, x1, y1, ...]` or `[[x, y], ...]`, at least 3 points.
            Coordinates are continuous and exclusive on the right and bottom like box edges: the square
            (3, 3), (8, 3), (8, 8), (3, 8) fills columns and rows 3..7. Parts outside the image are cut.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        (height, width) bool.

    Raises:
        InputError: no polygon, fewer than 3 points, odd or non-numeric coordinates, a boundless outline.
    """
    check_image_size(width, height, "polygon mask")
    if len(polygons) == 0:
        raise InputError("polygons: expected a list of polygons, each [x0, y0, x1, y1, x2, y2, ...]")
    mask = np.zeros((height, width), dtype=bool)
    for index, polygon in enumerate(polygons):
        _paint_polygon(mask, _polygon_vertices(polygon, index))
    return mask


def _polygon_vertices(polygon: Any, index: int) -> FloatArray:
    try:
        values = np.asarray(polygon)
    except (ValueError, TypeError):
        values = np.empty(0)
    flat = values.ndim == 1 and values.size % 2 == 0
    pairs = values.ndim == 2 and values.shape[1] == 2
    if values.dtype.kind not in "iuf" or not (flat or pairs) or values.size < 6:
        raise InputError(
            f"polygon {index}: expected at least 3 points as [x0, y0, x1, y1, x2, y2, ...]; "
            "one polygon alone is written [[x0, y0, ...]]"
        )
    if not np.isfinite(values).all():
        raise InputError(f"polygon {index}: contains NaN or infinite coordinates")
    return values.astype(np.float64).reshape(-1, 2)


def _paint_polygon(mask: BoolArray, vertices: FloatArray) -> None:
    """Walk the outline on a 5x finer grid, note where it crosses column centres, fill columns by parity."""
    if np.abs(np.diff(vertices, axis=0, append=vertices[:1])).max(axis=1).sum() > _MAX_OUTLINE:
        raise InputError(f"polygon: the outline is longer than {_MAX_OUTLINE:,} pixels")
    height, width = mask.shape
    u, v = _outline(np.trunc(_POLYGON_SCALE * vertices + 0.5).astype(np.int64))
    column, x_rest = np.divmod(np.minimum(u[1:], u[:-1]), _POLYGON_SCALE)
    centre = (u[1:] != u[:-1]) & (x_rest == _POLYGON_SCALE // 2) & (column >= 0) & (column < width)
    if not centre.any():
        return
    y_fine = np.minimum(v[1:], v[:-1])[centre]
    y = np.ceil(np.clip((y_fine + 0.5) / _POLYGON_SCALE - 0.5, 0, height)).astype(np.int64)
    x, left, top = column[centre], column[centre].min(), y.min()
    columns, rows = x.max() - left + 1, y.max() - top + 1
    flips = np.bincount((x - left) * rows + y - top, minlength=columns * rows).reshape(columns, rows)
    filled = np.logical_xor.accumulate(flips % 2 == 1, axis=1)[:, :-1]
    mask[top : top + rows - 1, left : left + columns] |= filled.T


def _outline(corners: IntArray) -> tuple[IntArray, IntArray]:
    """All grid points (u, v) along the closed outline, one step at a time on each edge's longer axis."""
    start, end = corners, np.roll(corners, -1, axis=0)
    span = np.abs(end - start)
    steep = span[:, 0] < span[:, 1]
    major = np.where(steep, 1, 0)
    rows = np.arange(len(corners))
    flip = start[rows, major] > end[rows, major]
    low, high = np.where(flip[:, None], end, start), np.where(flip[:, None], start, end)
    length = span[rows, major]
    slope = (high - low)[rows, 1 - major] / np.maximum(length, 1)

    edge = np.repeat(rows, length + 1)
    first = np.cumsum(length + 1) - (length + 1)
    step = np.arange(edge.size) - first[edge]
    step = np.where(flip[edge], length[edge] - step, step)
    along = low[rows, major][edge] + step
    across = np.trunc(low[rows, 1 - major][edge] + slope[edge] * step + 0.5).astype(np.int64)
    return np.where(steep[edge], across, along), np.where(steep[edge], along, across)


def mask_to_box(mask: ArrayLike) -> list[int] | None:
    """Tight box `[x0, y0, x1, y1]` of a (H, W) mask, exclusive on the right and below; None if empty."""
    array = _as_mask(mask)
    rows = np.flatnonzero(array.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(array[rows[0] : rows[-1] + 1].any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def mask_to_points(mask: ArrayLike, num_points: int = 8) -> NDArray[np.float32]:
    """Choose points inside a mask: the one farthest from the border first, then spread over all parts.

    Each further point maximises sqrt(distance to the border, at most its mean) x (distance to the points
    chosen): interior wins, what is near a chosen point loses. Large masks are judged on about 16k cells.

    Args:
        mask: (H, W), nonzero = inside.
        num_points: at most so many points.

    Returns:
        (k, 2) float32 pixel indices x, y, k <= num_points: distinct, inside the mask, always the same ones;
        (0, 2) for an empty mask.
    """
    array = _as_mask(mask)
    if num_points < 1:
        raise InputError(f"num_points must be at least 1, got {num_points}")
    box = mask_to_box(array)
    if box is None:
        return np.zeros((0, 2), dtype=np.float32)
    x0, y0, x1, y1 = box
    crop = array[y0:y1, x0:x1]
    stride = int(np.ceil(np.sqrt(crop.size / _POINT_CELLS)))
    cells = _spread_cells(_cell_fill(crop, stride), num_points)
    pixels = np.array([_pixel_of_cell(crop, cell, stride) for cell in cells]) + (x0, y0)
    return pixels.astype(np.float32)


def _cell_fill(crop: BoolArray, stride: int) -> FloatArray:
    """Share of inside pixels per stride x stride cell."""
    height, width = crop.shape
    padded = np.pad(crop, ((0, -height % stride), (0, -width % stride)))
    rows, columns = padded.shape[0] // stride, padded.shape[1] // stride
    return padded.reshape(rows, stride, columns, stride).mean(axis=(1, 3))


def _spread_cells(fill: FloatArray, count: int) -> IntArray:
    """Rows and columns (k, 2) of the chosen cells; cells that are not full count as border."""
    to_border = ndimage.distance_transform_edt(np.pad(fill == 1, 1))[1:-1, 1:-1] + 1
    cells = np.argwhere(fill > 0)
    depth = to_border[fill > 0]
    ridge = np.flatnonzero(depth == depth.max())
    chosen = [int(ridge[np.abs(cells[ridge] - cells[ridge].mean(axis=0)).sum(axis=1).argmin()])]
    weight = np.sqrt(np.minimum(depth, depth.mean()))
    to_chosen = np.full(len(cells), np.inf)
    for _ in range(min(count, len(cells)) - 1):
        to_chosen = np.minimum(to_chosen, np.linalg.norm(cells - cells[chosen[-1]], axis=1))
        chosen.append(int((weight * to_chosen).argmax()))
    return cells[chosen]


def _pixel_of_cell(crop: BoolArray, cell: IntArray, stride: int) -> tuple[int, int]:
    """(x, y) of the inside pixel nearest the middle of a cell."""
    top, left = (int(index) * stride for index in cell)
    inside = np.argwhere(crop[top : top + stride, left : left + stride])
    nearest = np.abs(inside - (stride - 1) / 2).sum(axis=1).argmin()
    return left + int(inside[nearest, 1]), top + int(inside[nearest, 0])


def box_iou(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """Intersection over union of xyxy boxes (N, 4) and (M, 4) -> (N, M) float64; 0 for empty boxes."""
    first, second = _as_boxes(a), _as_boxes(b)
    top_left = np.maximum(first[:, None, :2], second[None, :, :2])
    bottom_right = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inter = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    union = _box_areas(first)[:, None] + _box_areas(second)[None] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def box_nms(boxes: ArrayLike, scores: ArrayLike, iou_threshold: float) -> IntArray:
    """Greedy non-maximum suppression of boxes.

    Args:
        boxes: (N, 4), xyxy.
        scores: (N,); equal scores keep their order.
        iou_threshold: a larger IoU suppresses. Empty boxes have IoU 0 with everything.

    Returns:
        Kept indices, int64, best first.
    """
    corners = _as_boxes(boxes)
    order = _score_order(scores, len(corners))
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        order = rest[box_iou(corners[[best]], corners[rest])[0] <= iou_threshold]
    return np.array(kept, dtype=np.int64)


def _score_order(scores: ArrayLike, count: int) -> IntArray:
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (count,):
        raise InputError(f"expected one score per region ({count}), got shape {values.shape}")
    return np.argsort(-values, kind="stable").astype(np.int64)


def _as_boxes(boxes: ArrayLike) -> FloatArray:
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise InputError(f"boxes: expected shape (N, 4) as x0, y0, x1, y1, got {array.shape}")
    return array


def _box_areas(boxes: FloatArray) -> FloatArray:
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
