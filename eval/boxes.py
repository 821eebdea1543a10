"""Boxes to prompt with: those of a detector, or the true ones."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tap_llm.data.readers.base import PackedRecords, box_from_xywh, read_json
from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import encode_rle
from tap_llm.regions import check_box

from .annotations import AnnotatedPicture, Annotations
from .average_precision import Row
from .mending import is_number, known

_ANY_SIZE = (10**7, 10**7)


def false_alarm(height: int = 1, width: int = 1) -> dict[str, Any]:
    """A mask of one corner pixel: the LVIS API overlooks detections without any."""
    mask = np.zeros((height, width), dtype=bool)
    mask[0, 0] = True
    return encode_rle(mask)


class BoxSource(Protocol):
    """Where boxes come from.

    Attributes:
        identity: tells sources apart.
        strays: detections on no picture of the file, as rows for `average_precision`.
        faults: what is wrong with single boxes.
    """

    identity: str
    strays: list[Row]
    faults: list[str]

    def of(self, picture: AnnotatedPicture) -> list[Row]:
        """Rows of "category_id", "score" and "bbox" (x, y, w, h; None where it cannot be used)."""


class TrueBoxes:
    """The boxes of the annotations, each with the score 1; crowds and broken annotations are left out."""

    identity = "those of the annotations"

    def __init__(self) -> None:
        self.strays: list[Row] = []
        self.faults: list[str] = []

    def of(self, picture: AnnotatedPicture) -> list[Row]:
        """See [`BoxSource`]; in the order of `picture.sound`."""
        return [
            {"category_id": record["category_id"], "score": 1.0, "bbox": record["bbox"]} for record in picture.sound
        ]


class Detections:
    """COCO results: a JSON list of "image_id", "category_id", "bbox" (x, y, w, h) and "score".

    What cannot be used counts as a false alarm: a broken box as a mask of one pixel, one of an unlisted picture or
    category on the stray one.

    Args:
        path: the file.
        annotations: that it was made for.

    Raises:
        InputError: the file is missing, damaged, or no list.
    """

    def __init__(self, path: str | Path, annotations: Annotations) -> None:
        self.path, self._annotations = Path(path), annotations
        if not self.path.is_file():
            raise MissingFileError(f"detections: there is no file {path}")
        self.identity = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self._wrong: dict[str, list[int]] = defaultdict(list)
        by_image = self._sort(read_json(self.path))
        self.strays = [
            {key: row[key] for key in ("category_id", "score")}
            | {"image_id": annotations.stray_image, "segmentation": false_alarm()}
            for row in by_image.pop(annotations.stray_image, [])
        ]
        self._places = {number: place for place, number in enumerate(by_image)}
        self._rows = PackedRecords(by_image.values())
        self.faults = [
            f"{self.path}: {len(places)} detections {what} (first: number {places[0]})"
            for what, places in self._wrong.items()
        ]

    def of(self, picture: AnnotatedPicture) -> list[Row]:
        """See [`BoxSource`]."""
        place = self._places.get(picture.image_id)
        rows: list[Row] = [] if place is None else self._rows[place]
        return rows

    def _sort(self, records: Any) -> dict[int, list[Row]]:
        if not isinstance(records, list):
            raise InputError(f"{self.path} must hold a list of detections")
        by_image: dict[int, list[Row]] = defaultdict(list)
        for place, record in enumerate(records):
            image, row = self._row(record if isinstance(record, dict) else {}, place)
            by_image[image].append(row)
        return by_image

    def _row(self, record: dict[str, Any], place: int) -> tuple[int, Row]:
        """Picture, and what to prompt with; what is wrong is remembered."""
        file, image, category = self._annotations, record.get("image_id"), record.get("category_id")
        score, box = record.get("score"), record.get("bbox")
        place_of = image if known(image, file.sizes) else file.stray_image
        kind = category if known(category, file.categories) else file.stray_category
        scored = is_number(score)
        boxed = _is_box(box, file.sizes.get(place_of, _ANY_SIZE))
        checks = {
            f"are of an image that {file.path.name} does not list": place_of != file.stray_image,
            f"are of a category that {file.path.name} does not list": kind != file.stray_category,
            "have no score": scored,
            "have no box with an area inside the image": boxed,
        }
        for what in (what for what, sound in checks.items() if not sound):
            self._wrong[what].append(place)
        return place_of, {"category_id": kind, "score": score if scored else 1.0, "bbox": box if boxed else None}


def _is_box(box: Any, size: tuple[int, int]) -> bool:
    try:
        check_box(box_from_xywh(box), *size)
    except InputError:
        return False
    return True
