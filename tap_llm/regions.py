"""The Region schema: check what a user points with, and turn it into prompt rows.

A region is a dict in pixels of the original image (after EXIF orientation), in one of these forms:

    {"box": [x0, y0, x1, y1]}                        edges exclusive: columns 3..7 give x0 = 3, x1 = 8
    {"points": [[x, y], ...], "labels": [1, 0, ...]} pixel indices; labels 1 inside, 0 outside, default 1
    {"box": ..., "points": ..., "labels": ...}
    {"sketch": [[x, y], ...]}                        a stroke, resampled to at most 9 points
    {"mask": ...}                                    (H, W) array (or nested lists of 0 and 1), COCO RLE dict,
                                                     polygons, mask image path

"id", "category" and "caption" ride along, and "type": "region" marks a chat message part. A key whose value
is None counts as absent. Rows and pad points follow TAP, arXiv:2312.09128.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InputError
from .images import open_image
from .masks import (
    BoolArray,
    FloatArray,
    IntArray,
    decode_rle,
    encode_rle,
    mask_to_box,
    mask_to_points,
    polygons_to_mask,
    rle_size,
)

Region = dict[str, Any]
MaskPrompt = Literal["box_and_points", "points"]

BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT, PAD = range(5)

MAX_SKETCH_POINTS = 9
MAX_MASK_POINTS = 8

_FORM_KEYS = ("box", "points", "labels", "sketch", "mask")
_EXTRA_KEYS = ("id", "category", "caption", "type")
_ALLOWED_TOGETHER = ({"points", "labels"}, {"box", "points"}, {"box", "points", "labels"})
_FAR = 1e7  # TAP clips to the canvas anyway; keeps float32 finite


@dataclass(eq=False)
class RegionPrompt:
    """One region as prompt points, in pixels of the original image, without pads.

    Attributes:
        points: (n, 2) float32, x and y; the two box corners come first where there is a box.
        labels: (n,) int64: 0 background, 1 foreground, 2 top-left corner, 3 bottom-right corner.
    """

    points: NDArray[np.float32]
    labels: IntArray

    @property
    def has_box(self) -> bool:
        """Whether the prompt contains box corners."""
        return bool((self.labels == TOP_LEFT).any())


def parse_region(
    region: Mapping[str, Any], height: int, width: int, mask_prompt: MaskPrompt = "box_and_points"
) -> RegionPrompt:
    """Check one region against its image and turn it into prompt points.

    Args:
        region: a region dict, see the module's head.
        height: of the original image, in pixels.
        width: of the original image, in pixels.
        mask_prompt: a mask becomes its tight box and up to 8 interior points, or ("points") the points only.

    Raises:
        InputError: an unknown key, conflicting forms, a box without area or wholly outside the image, a point
            more than 1 px outside, NaN, wrong labels, an empty mask or one of another size than the image.
        MissingFileError: there is no mask image at the path given.
    """
    if mask_prompt not in get_args(MaskPrompt):
        raise InputError(f"mask_prompt must be one of {get_args(MaskPrompt)}, got {mask_prompt!r}")
    form = _form_of(region)
    if "mask" in form:
        return _mask_prompt(read_mask(form["mask"], height, width), mask_prompt)
    if "sketch" in form:
        return _points_prompt(_resample(_check_points(form["sketch"], height, width, "sketch")), None)
    prompts = []
    if "box" in form:
        prompts.append(_box_prompt(check_box(form["box"], height, width)))
    if "points" in form:
        points = _check_points(form["points"], height, width, "points")
        prompts.append(_points_prompt(points, form.get("labels")))
    return _join(prompts)


def parse_regions(
    regions: Sequence[Any], sizes: Iterable[Any], mask_prompt: MaskPrompt = "box_and_points"
) -> tuple[list[RegionPrompt], IntArray]:
    """Check all regions of a batch of images and flatten them, image by image.

    Args:
        regions: one list of regions per image (ragged, may be empty); for one image also the flat list.
        sizes: (height, width) of each original image.
        mask_prompt: see [`parse_region`].

    Returns:
        N prompts, and the (N,) int64 index of each prompt's image.

    Raises:
        InputError: as [`parse_region`], with the index of the region (and of the image, if there are several)
            in front; or the number of lists is not the number of images.
    """
    shapes = [(int(height), int(width)) for height, width in sizes]
    lists = normalize_region_lists(regions, len(shapes))
    prompts, owners = [], []
    for image, (image_regions, (height, width)) in enumerate(zip(lists, shapes, strict=True)):
        for index, region in enumerate(image_regions):
            where = f"region {index}" if len(shapes) == 1 else f"image {image}, region {index}"
            try:
                prompts.append(parse_region(region, height, width, mask_prompt))
            except InputError as error:
                raise type(error)(f"{where}: {error}") from error
            owners.append(image)
    return prompts, np.array(owners, dtype=np.int64)


def normalize_region_lists(regions: Sequence[Any], num_images: int) -> list[list[Region]]:
    """Bring regions into the nested form: one list of region dicts per image.

    Args:
        regions: one list per image, or for one image a flat list of regions.
        num_images: number of images.

    Raises:
        InputError: not a list, flat for several images, mixed, or another number of lists than images.
    """
    if not isinstance(regions, (list, tuple)):
        hint = "; put the region into a list" if isinstance(regions, Mapping) else ""
        raise InputError(f"regions: expected a list of regions per image, got {type(regions).__name__}{hint}")
    if num_images == 1 and not any(isinstance(item, (list, tuple)) for item in regions):
        regions = [regions]
    if regions and all(isinstance(item, Mapping) for item in regions):
        raise InputError(f"regions: a flat list fits one image only; pass {num_images} lists, one per image")
    for index, item in enumerate(regions):
        if not isinstance(item, (list, tuple)):
            raise InputError(f"regions: entry {index} must be one image's list of regions, got {_brief(item)}")
    if len(regions) != num_images:
        raise InputError(f"regions: got {len(regions)} lists for {num_images} images; pass one per image")
    return [list(item) for item in regions]


def prompts_to_rows(prompts: Sequence[RegionPrompt]) -> tuple[NDArray[np.float32], IntArray]:
    """Stack prompts of different lengths into rows.

    Each prompt without a box gets exactly one pad (0, 0) of label 4, which TAP reads as a real token. Further
    label-4 pads only equalise n; the model masks them.

    Returns:
        points (N, n, 2) float32 and labels (N, n) int64; n >= 1, and (0, 2, 2), (0, 2) without prompts.
    """
    lengths = [len(prompt.labels) + (not prompt.has_box) for prompt in prompts]
    n = max(lengths, default=2)
    points = np.zeros((len(prompts), n, 2), dtype=np.float32)
    labels = np.full((len(prompts), n), PAD, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        count = len(prompt.labels)
        points[row, :count], labels[row, :count] = prompt.points, prompt.labels
    return points, labels


def region_to_json(region: Mapping[str, Any]) -> Region:
    """JSON-ready deep copy of a region: mask arrays as COCO RLE, arrays and tensors as lists, paths as text.

    Raises:
        InputError: a value that JSON cannot hold.
    """
    return {str(key): (_mask_to_json if key == "mask" else _to_json)(value) for key, value in region.items()}


def _form_of(region: Any) -> dict[str, Any]:
    """The form keys that are present, after checking that keys are known and fit together."""
    if not isinstance(region, Mapping):
        raise InputError(f'expected a dict such as {{"box": [x0, y0, x1, y1]}}, got {_brief(region)}')
    for key in region:
        if key not in _FORM_KEYS + _EXTRA_KEYS:
            raise InputError(_unknown_key(key))
    if region.get("type") not in (None, "region"):
        raise InputError(f'"type" of a region must be "region", got {_brief(region["type"])}')
    form = {key: region[key] for key in _FORM_KEYS if region.get(key) is not None}
    if form.keys() == {"labels"}:
        raise InputError('"labels" need "points"')
    if not form:
        raise InputError('a region needs one of "box", "points", "sketch" or "mask"')
    if len(form) > 1 and form.keys() not in _ALLOWED_TOGETHER:
        names = ", ".join(f'"{key}"' for key in form)
        raise InputError(f'{names} cannot be combined; only "box" and "points" (with "labels") go together')
    return form


def _unknown_key(key: Any) -> str:
    near = difflib.get_close_matches(str(key), _FORM_KEYS + _EXTRA_KEYS, n=1, cutoff=0.5)
    guess = f'did you mean "{near[0]}"? ' if near else ""
    return f'unknown key "{key}"; {guess}Known keys: {", ".join(_FORM_KEYS + _EXTRA_KEYS)}'


def check_box(value: Any, height: int, width: int) -> FloatArray:
    """Four numbers [x0, y0, x1, y1] as an array (4,), if they are a box that touches a picture of that size.

    Raises:
        InputError: not four finite numbers, without area, or wholly outside the picture.
    """
    box = _numbers(value)
    if box is None or box.shape != (4,):
        raise InputError(f"box {_brief(value)} must be four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = box
    if not np.isfinite(box).all():
        raise InputError(f"box {_brief(value)} contains NaN or infinity")
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"box {_brief(value)} has no area: it is [x0, y0, x1, y1] with x1 > x0 and y1 > y0")
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise InputError(f"box {_brief(value)} lies wholly outside the image ({width}x{height})")
    return box


def _check_points(value: Any, height: int, width: int, name: str) -> FloatArray:
    points = _numbers(value)
    if points is not None and points.size == 0:
        raise InputError(f'"{name}" is empty; give at least one [x, y]')
    if points is None or points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f'"{name}" must be a list of [x, y] numbers, got {_brief(value)}')
    outside = ~((points >= -1) & (points <= (width, height))).all(axis=1)  # NaN counts as outside
    if outside.any():
        first = int(outside.argmax())
        finite = np.isfinite(points[first]).all()
        problem = f"lies outside the image ({width}x{height})" if finite else "contains NaN or infinity"
        raise InputError(f"{name}[{first}] = {points[first].tolist()} {problem}")
    return points


def _check_labels(value: Any, count: int) -> IntArray:
    labels = np.ones(count) if value is None else _numbers(value)
    if labels is None or labels.ndim != 1 or not np.isin(labels, (BACKGROUND, FOREGROUND)).all():
        raise InputError(f'"labels" must be a list of 1 (inside) and 0 (outside), got {_brief(value)}')
    if len(labels) != count:
        raise InputError(f"{count} points but {len(labels)} labels; give one label per point, or none")
    return labels.astype(np.int64)


def _numbers(value: Any) -> FloatArray | None:
    """A list, tuple, array or tensor of numbers as float64 array; None where it is anything else."""
    try:
        array = np.asarray(_plain(value))
    except (ValueError, TypeError, OverflowError):
        return None
    return array.astype(np.float64) if array.dtype.kind in "buif" else None


def _plain(value: Any) -> Any:
    """A torch tensor of any device and dtype as numpy array; any other value as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16


def _box_prompt(box: FloatArray) -> RegionPrompt:
    corners = np.clip(box, -_FAR, _FAR).astype(np.float32).reshape(2, 2)
    return RegionPrompt(corners, np.array([TOP_LEFT, BOTTOM_RIGHT], dtype=np.int64))


def _points_prompt(points: FloatArray | NDArray[np.float32], labels: Any) -> RegionPrompt:
    return RegionPrompt(points.astype(np.float32), _check_labels(labels, len(points)))


def _mask_prompt(mask: BoolArray, mask_prompt: MaskPrompt) -> RegionPrompt:
    points = _points_prompt(mask_to_points(mask, MAX_MASK_POINTS), None)
    if mask_prompt == "points":
        return points
    return _join([_box_prompt(np.array(mask_to_box(mask), dtype=np.float64)), points])


def _join(prompts: list[RegionPrompt]) -> RegionPrompt:
    points = np.concatenate([prompt.points for prompt in prompts])
    return RegionPrompt(points, np.concatenate([prompt.labels for prompt in prompts]))


def _resample(stroke: FloatArray) -> FloatArray:
    """At most 9 points spread evenly over the stroke's order, both ends left out (as TAP's demo does)."""
    if len(stroke) <= MAX_SKETCH_POINTS:
        return stroke
    return stroke[np.linspace(0, len(stroke), MAX_SKETCH_POINTS + 2).astype(np.int64)[1:-1]]


def read_mask(value: Any, height: int, width: int) -> BoolArray:
    """A mask in any form of the Region schema (array, RLE, polygons, path of a mask image) as (H, W) bool.

    Raises:
        InputError: it cannot be read, is of another size, or empty.
    """
    if isinstance(value, (str, Path)):
        mask = _mask_from_file(value)
    elif isinstance(value, Mapping):
        _check_mask_size(rle_size(value), height, width)  # before anything of a wrong size exists
        mask = decode_rle(value)
    elif isinstance(value, (list, tuple)):
        nested = _mask_from_lists(value, height, width)
        mask = polygons_to_mask(value, height, width) if nested is None else nested
    else:
        mask = _mask_from_array(value)
    _check_mask_size(mask.shape, height, width)
    if not mask.any():
        raise InputError("mask is empty: no pixel is inside")
    return mask


def _check_mask_size(shape: tuple[int, ...], height: int, width: int) -> None:
    if shape != (height, width):
        raise InputError(f"mask is {shape[1]}x{shape[0]}, but the image is {width}x{height} (width x height)")


def _mask_from_lists(rows: Sequence[Any], height: int, width: int) -> BoolArray | None:
    """`height` rows of `width` zeros and ones as a mask; None for anything else, such as polygons."""
    array = _numbers(rows) if len(rows) == height else None
    if array is None or array.shape != (height, width) or not np.isin(array, (0, 1)).all():
        return None
    return array.astype(bool)


def _mask_from_array(value: Any) -> BoolArray:
    value = _plain(value)
    if not isinstance(value, np.ndarray):
        raise InputError(
            "mask must be a (height, width) array, an RLE dict, a list of polygons or a mask image's path, "
            f"got {_brief(value)}"
        )
    if value.ndim != 2 or value.dtype.kind not in "buif":
        raise InputError(f"mask must be a (height, width) array, got shape {value.shape} of {value.dtype}")
    if value.dtype.kind == "f" and not np.isin(value, (0, 1)).all():
        raise InputError("a floating-point mask must hold 0 and 1 only; make it boolean first (mask > 0.5)")
    return value.astype(bool)


def _mask_from_file(path: str | Path) -> BoolArray:
    """Inside where a mask image is nonzero: palette index, grey value or any colour channel, of any depth.

    With an alpha channel, transparent pixels are outside, and an all-black picture is read by its alpha
    alone. JPEG leaves noise around zero, so there inside means above half.
    """
    image = open_image(path, "mask image")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    values = np.atleast_3d(np.asarray(image))
    if image.mode in ("LA", "PA", "RGBA"):
        painted, opaque = values[..., :-1].any(axis=2), values[..., -1] > 0
        return painted & opaque if painted.any() else opaque
    inside = values > 127 if image.format in ("JPEG", "MPO") else values != 0
    return np.asarray(inside.any(axis=2))


def _mask_to_json(value: Any) -> Any:
    if isinstance(value, (str, Path, Mapping, list, tuple)) or value is None:
        return _to_json(value)
    return encode_rle(_mask_from_array(value))


def _to_json(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return _to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("ascii", errors="replace")
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"a {type(value).__name__} cannot be written as JSON: {_brief(value)}")


def _brief(value: Any) -> str:
    """Short text of a value for a message."""
    value = _plain(value)
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.size <= 8 else f"an array of shape {value.shape}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
