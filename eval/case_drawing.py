"""Pictures of cases: what is right beside what the model said."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tap_llm.errors import InputError
from tap_llm.images import load_image, open_header
from tap_llm.masks import decode_rle, mask_to_box
from tap_llm.visualize import draw_regions

from .cases import Case, CaseRegion

TILE = 420  # width of one picture
_GAP = 4
_NEAR, _LEAST_SIDE = (
    4,
    96,
)  # what is shown around a small region: so many times its longer side, at least so many pixels

Drawn = dict[str, Any]  # a region whose mask is an array
Window = tuple[int, int, int, int]


def draw_case(case: Case, width: int = TILE) -> Image.Image:
    """Truth on the left, answer on the right; one picture where there is only one of them, or neither.

    Regions that are small in their picture are shown with their surroundings only.

    Args:
        case: with a picture.
        width: of each picture.

    Raises:
        InputError: there is no picture, it cannot be read, or a mask does not fit it.
    """
    image = picture_of(case)
    sides = [[_decoded(region, image) for region in case.get(side, [])] for side in ("truth", "answer")]  # type: ignore[attr-defined]
    window = _window([region for regions in sides for region in regions], image)
    near = image.crop(window)
    drawn = [[_moved(region, window) for region in regions] for regions in sides if regions]
    halves = [_drawn(near, regions, width) for regions in drawn or [[]]]
    sheet = Image.new("RGB", (len(halves) * (width + _GAP) - _GAP, max(half.height for half in halves)), "white")
    for index, half in enumerate(halves):
        sheet.paste(half, (index * (width + _GAP), 0))
    return sheet


def picture_of(case: Case) -> Image.Image:
    """The picture of a case.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    source = case.get("image")
    if source is None:
        raise InputError("no picture")
    if not source.startswith("data:"):
        return load_image(source)
    try:
        packed = base64.b64decode(source.partition(",")[2], validate=True)
        return load_image(open_header(io.BytesIO(packed)))
    except (OSError, binascii.Error) as error:
        raise InputError(f"the stored picture is damaged ({error})") from error


def _decoded(region: CaseRegion, image: Image.Image) -> Drawn:
    """With its mask as an array; an empty one where it has none."""
    size = (image.height, image.width)
    mask = decode_rle(region["mask"]) if "mask" in region else np.zeros(size, dtype=bool)
    if mask.shape != size:
        raise InputError(f"a mask has shape {mask.shape}, but the picture is {size}")
    return {**region, "mask": mask}


def _window(regions: Sequence[Drawn], image: Image.Image) -> Window:
    """(x0, y0, x1, y1) around all regions; the whole picture unless they are small in it."""
    boxes = [box for region in regions for box in _extents(region)]
    whole = (0, 0, image.width, image.height)
    if not boxes:
        return whole
    low, high = np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]
    side = max(_NEAR * float((high - low).max()), _LEAST_SIDE)
    if side >= max(whole):
        return whole
    left, top = np.clip((low + high - side) / 2, 0, np.maximum(np.array(image.size) - side, 0)).tolist()
    x0, y0 = round(left), round(top)
    return x0, y0, min(x0 + round(side), image.width), min(y0 + round(side), image.height)


def _extents(region: Drawn) -> Iterator[Sequence[float]]:
    """Boxes of all that is drawn of a region."""
    prompt = region.get("region", {})
    yield from (box for box in (mask_to_box(region["mask"]), prompt.get("box")) if box is not None)
    yield from ((x, y, x + 1, y + 1) for key in ("points", "sketch") for x, y in prompt.get(key, ()))


def _moved(region: Drawn, window: Window) -> Drawn:
    """What is seen of a region through the window."""
    x0, y0, x1, y1 = window
    prompt = dict(region.get("region", {}))
    if "box" in prompt:
        prompt["box"] = (np.array(prompt["box"]) - (x0, y0, x0, y0)).tolist()
    for key in prompt.keys() & {"points", "sketch"}:
        prompt[key] = [[x - x0, y - y0] for x, y in prompt[key]]
    return {**region, "mask": region["mask"][y0:y1, x0:x1], **({"region": prompt} if prompt else {})}


def _drawn(image: Image.Image, regions: Sequence[Drawn], width: int) -> Image.Image:
    drawn = draw_regions(image, regions)
    return drawn.resize((width, max(1, round(drawn.height * width / drawn.width))), Image.Resampling.LANCZOS)
