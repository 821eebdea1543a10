"""Pictures as judges see them: regions painted and numbered, and crops of single regions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tap_llm.images import load_image
from tap_llm.masks import decode_rle, mask_to_box
from tap_llm.visualize import draw_regions

from .base import Prediction
from .judge import Picture
from .provenance import fingerprint

_MARGIN = 0.25  # around a crop, as a share of the region's longer side


def painted(prediction: Prediction) -> Picture:
    """The picture of a question with its regions: masks tinted, boxes and points drawn, numbered from 1.

    Args:
        prediction: of [`RegionQuestions`], with one question.
    """
    path, regions = Path(prediction["image"]), prediction["shown"][0]

    def make() -> Image.Image:
        image = load_image(path)
        empty = np.zeros((image.height, image.width), dtype=bool)
        masks = [decode_rle(region["mask"]) if "mask" in region else empty for region in regions]
        return draw_regions(image, [{**region, "mask": mask} for region, mask in zip(regions, masks, strict=True)])

    return Picture(fingerprint("painted", prediction["digest"], regions), make)


def cropped(prediction: Prediction) -> list[Picture]:
    """For each mask of a question the part of the picture around it, as it is.

    Args:
        prediction: of [`RegionQuestions`], with one question about masks.
    """
    path, digest = Path(prediction["image"]), prediction["digest"]
    masks = [region["mask"] for region in prediction["shown"][0]]
    return [Picture(fingerprint("cropped", digest, mask), lambda mask=mask: _crop(path, mask)) for mask in masks]  # type: ignore[misc]


def _crop(path: Path, mask: dict[str, Any]) -> Image.Image:
    image = load_image(path)
    box = mask_to_box(decode_rle(mask))
    assert box is not None  # questions about empty masks are not asked
    x0, y0, x1, y1 = box
    margin = math.ceil(_MARGIN * max(x1 - x0, y1 - y0))
    return image.crop(
        (max(0, x0 - margin), max(0, y0 - margin), min(image.width, x1 + margin), min(image.height, y1 + margin))
    )
