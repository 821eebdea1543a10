"""Pictures of cases: what is right beside what the model said."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tap_llm.errors import InputError
from tap_llm.images import load_image, open_header
from tap_llm.masks import decode_rle
from tap_llm.visualize import draw_regions

from .cases import Case, CaseRegion

TILE = 420  # width of one picture
_GAP = 4


def draw_case(case: Case, width: int = TILE) -> Image.Image:
    """Truth on the left, answer on the right; one picture where there is only one of them, or neither.

    Args:
        case: with a picture.
        width: of each picture.

    Raises:
        InputError: there is no picture, it cannot be read, or a mask does not fit it.
    """
    image = picture_of(case)
    drawn = [regions for regions in (case.get("truth", []), case.get("answer", [])) if regions]
    halves = [_drawn(image, regions, width) for regions in drawn or [[]]]
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


def _drawn(image: Image.Image, regions: Sequence[CaseRegion], width: int) -> Image.Image:
    empty = np.zeros((image.height, image.width), dtype=bool)
    shown = [{**region, "mask": decode_rle(region["mask"]) if "mask" in region else empty} for region in regions]
    drawn = draw_regions(image, shown)
    return drawn.resize((width, max(1, round(drawn.height * width / drawn.width))), Image.Resampling.LANCZOS)
