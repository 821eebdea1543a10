"""Small COCO and LVIS files with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 48, 32
CATEGORIES = ("circle", "square", "star")  # ids 1, 2, 3; names of drawn shapes

Box = tuple[int, int, int, int]  # x, y, w, h


def rectangle(x: int, y: int, width: int, height: int) -> list[list[int]]:
    """As a polygon that fills just these pixels."""
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def annotation(image: int, category: int, box: Box, **more: Any) -> dict[str, Any]:
    """A filled box; `more` wins."""
    found = {"image_id": image, "category_id": category, "bbox": [*box], "iscrowd": 0, "area": box[2] * box[3]}
    return {**found, "segmentation": rectangle(*box), **more}


def coco_document(annotations: list[dict[str, Any]], images: int = 2, lvis: bool = False) -> dict[str, Any]:
    """Images 1, 2, …; annotations are numbered from 1 where they have no id. LVIS: nothing was looked for in vain."""
    document: dict[str, Any] = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
            for number in range(1, images + 1)
        ],
        "annotations": [{"id": number, **record} for number, record in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)],
    }
    if lvis:
        for image in document["images"]:
            image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        for category, frequency in zip(document["categories"], "rcf", strict=True):
            category["frequency"] = frequency
    return document


def write_coco(folder: Path, document: dict[str, Any], name: str = "annotations.json") -> Path:
    """The file, with a noisy picture for each image that has none yet."""
    generator = np.random.default_rng(0)
    for image in document["images"]:
        pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        if image.get("file_name") and not (folder / image["file_name"]).exists():
            Image.fromarray(pixels).save(folder / image["file_name"])
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def write_detections(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of detections."""
    path = folder / "detections.json"
    path.write_text(json.dumps(rows))
    return path
