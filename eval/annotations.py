"""COCO and LVIS files as benchmarks score them: every record is kept, and what is wrong with one is named.

Records that fit nowhere count as wrong, never as absent: a region whose mask or box is damaged has none that could be
found, one of an unlisted image or category becomes a region of a picture or category that nothing is predicted for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from tap_llm.data.readers.base import find_image, list_of, read_json, size_of
from tap_llm.data.readers.coco import CocoSamples
from tap_llm.data.samples import RegionSample
from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import encode_rle, mask_to_box
from tap_llm.regions import read_mask

from .average_precision import Style
from .base import Example, fingerprint
from .overlap import Mask

Record = dict[str, Any]
SHOWN_IDS = 5


@dataclass(frozen=True, eq=False)
class AnnotatedPicture(Example):
    """A picture of the file; its pixels are read by `load`.

    Attributes:
        image_id: its id in the file.
        path: of the picture; it may be missing.
        size: (height, width) that the file states.
        records: annotations that stand for one object each, in the file's order.
        problem: why the picture cannot be used; "" where it can.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    records: list[Record]
    problem: str

    def load(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            InputError: missing, damaged, or of another size than the file states; or it has a `problem`.
        """
        if self.problem:
            raise InputError(self.problem)
        return RegionSample(self.path, size=self.size).load_image()


class Annotations(Sequence[AnnotatedPicture]):
    """A COCO or LVIS file; a sequence of its pictures.

    Args:
        path: the JSON file.
        image_root: folder of the pictures, or of COCO's train2017 and so on; by default that of the file, or the one
            above where the file lies in a folder "annotations".
        every: take every so many-th picture, starting with the first.
        masks: check masks too.

    Attributes:
        style: "lvis" where pictures list the categories that were looked for in vain, else "coco".
        document: "images", "annotations" and "categories" for `average_precision`: all records of the file, mended
            where they are broken, so that they can be counted as wrong.
        categories: names by id, in the file's order.
        stray_image: id of a picture for what lies on none of the file.
        stray_category: likewise.
        faults: what is wrong with single records.

    Raises:
        InputError: the file is missing, damaged, of another form or empty.
    """

    def __init__(
        self, path: str | Path, image_root: str | Path | None = None, every: int = 1, masks: bool = True
    ) -> None:
        self.path = Path(path)
        self._root = _image_root(self.path, image_root)
        content = read_json(self.path)
        images, records, categories = (
            list_of(content, key, self.path) for key in ("images", "annotations", "categories")
        )
        if not images or not categories:
            raise InputError(f"{path} lists no images, or no categories")
        self.style: Style = "lvis" if "neg_category_ids" in images[0] else "coco"
        self.faults: list[str] = []
        self._problems: dict[int, str] = {}
        self._images = self._by_id("image", images)
        self.categories = {number: str(record.get("name")) for number, record in self._by_id("category", categories).items()}
        self._check_lvis(categories)
        self.stray_image, self.stray_category = 1 + max(self._images), 1 + max(self.categories)
        self._masks = masks
        mended = self._mend_all(records)
        self._picked = list(self._images)[::every]
        self._by_image: dict[int, list[Record]] = defaultdict(list)
        for record in mended:
            self._by_image[record["image_id"]].append(record)
        self.document = {"images": self._image_records(), "annotations": mended, "categories": self._category_records(categories)}
