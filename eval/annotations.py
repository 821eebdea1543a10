"""COCO and LVIS files as average precision needs them: every record counts, and what is wrong with one is named."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload
from urllib.parse import urlparse

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tap_llm.data.readers.base import find_image, list_of, read_json
from tap_llm.data.readers.coco import CocoSamples
from tap_llm.data.samples import RegionSample
from tap_llm.errors import InputError, MissingFileError

from .average_precision import Style
from .base import Example, fingerprint
from .command import positive
from .mending import Mender, Record, is_id

_LISTS = ("images", "annotations", "categories")
_FREQUENCIES = ("r", "c", "f")  # of a category in LVIS: rare, common, frequent


@dataclass(frozen=True, eq=False)
class AnnotatedPicture(Example):
    """A picture of the file; `load` reads its pixels.

    Attributes:
        image_id: in the file.
        path: of the picture, which may be missing.
        size: (height, width) that the file states.
        records: its annotations in the file's order, mended, without crowds.
        problem: why it cannot be used; "" where it can.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    records: list[Record]
    problem: str = ""

    @property
    def sound(self) -> list[Record]:
        """Annotations that can be found."""
        return [record for record in self.records if "problem" not in record]

    def load(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            InputError: it has a problem, is missing, damaged, or of another size than the file states.
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
        masks: look at masks, too; else at boxes alone.

    Attributes:
        style: "lvis" where pictures list the categories that were looked for in vain, else "coco".
        categories: names by id, in the file's order.
        sizes: (height, width) of each picture by id; (1, 1) where the file does not state it.
        faults: what is wrong with single records.
        stray_image: id of a picture for what lies on none; part of `document` only.
        stray_category: likewise.
        strays: how many annotations lie on no picture.
        document: all records, mended, for `average_precision`.

    Raises:
        InputError: the file is missing, damaged, empty, or of another form.
    """

    def __init__(
        self, path: str | Path, image_root: str | Path | None = None, every: int = 1, masks: bool = True
    ) -> None:
        self.path, self.faults = Path(path), list[str]()
        self._root = _image_root(self.path, image_root)
        content = read_json(self.path)
        images, records, categories = (list_of(content, key, self.path) for key in _LISTS)
        self.style: Style = "lvis" if images and "neg_category_ids" in images[0] else "coco"
        self._problems: dict[int, str] = {}
        self._images = self._index_images(images)
        self.categories = self._index_categories(categories)
        if not self._images or not self.categories:
            raise InputError(f"{path} lists no images, or no categories")
        self.sizes = {number: _size_of(record) or (1, 1) for number, record in self._images.items()}
        self.stray_image, self.stray_category = 1 + max(self._images), 1 + max(self.categories)
        mender = Mender(self.sizes, self.categories, self.stray_image, self.stray_category, masks)
        mended = mender.mend(records)
        self.faults += mender.faults
        self.document = self._document(mended, categories)
        self.strays = sum(record["image_id"] == self.stray_image for record in mended)
        self._picked = list(self._images)[::every]
        self._by_image: dict[int, list[Record]] = defaultdict(list)
        for record in mended:
            if not record["iscrowd"]:
                self._by_image[record["image_id"]].append(record)

    def __len__(self) -> int:
        return len(self._picked)

    @overload
    def __getitem__(self, index: int) -> AnnotatedPicture: ...
    @overload
    def __getitem__(self, index: slice) -> list[AnnotatedPicture]: ...
    def __getitem__(self, index: int | slice) -> AnnotatedPicture | list[AnnotatedPicture]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.picture(self._picked[index])

    def picture(self, number: int) -> AnnotatedPicture:
        """The picture with this id."""
        record, regions = self._images[number], self._by_image.get(number, [])
        path = find_image(self._root, _file_name(record), CocoSamples.folders)
        seal = fingerprint(_bytes_of(path), record, regions)
        problem = self._problems.get(number, "")
        return AnnotatedPicture(f"image {number}", seal, number, path, self.sizes[number], regions, problem)

    def _index_images(self, images: list[Record]) -> dict[int, Record]:
        index: dict[int, Record] = {}
        for record in images:
            number = self._checked_id(record, "image")
            if number in index:
                self._problems[number] = f"image {number}: this id is used twice"
            elif _size_of(record) is None or not _file_name(record):
                self._problems[number] = f"image {number}: its record states no file, or no height and width"
            index.setdefault(number, record)
        return index

    def _index_categories(self, categories: list[Record]) -> dict[int, str]:
        index: dict[int, str] = {}
        for record in categories:
            number = self._checked_id(record, "category")
            if number in index:
                self.faults.append(f"category {number}: this id is used twice; the first one counts")
            if self.style == "lvis" and record.get("frequency") not in _FREQUENCIES:
                raise InputError(
                    f'{self.path}: category {number}: "frequency" must be one of {", ".join(_FREQUENCIES)}'
                )
            index.setdefault(number, str(record.get("name")))
        return index

    def _checked_id(self, record: Record, what: str) -> int:
        number = record.get("id")
        if not is_id(number):
            raise InputError(f"{self.path}: {what} ids must be whole numbers, got {number!r}")
        return int(number)  # type: ignore[arg-type]

    def _document(self, mended: list[Record], categories: list[Record]) -> dict[str, Any]:
        """With a picture and a category for what belongs to none; of double ones the first."""
        lists: dict[str, Any] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        looked_for = [*self.categories, self.stray_category]
        stray_image = {**lists, "id": self.stray_image, "height": 1, "width": 1, "neg_category_ids": looked_for}
        stray_category = {"id": self.stray_category, "name": "none of these", "frequency": "f"}
        images = [
            {**lists, **record, "height": self.sizes[number][0], "width": self.sizes[number][1]}
            for number, record in self._images.items()
        ]
        first = {record["id"]: record for record in reversed(categories)}
        return {
            "images": [*images, stray_image],
            "annotations": mended,
            "categories": [*first.values(), stray_category],
        }


def annotation_arguments(parser: argparse.ArgumentParser, data: str = "COCO or LVIS annotations") -> None:
    """Add --data, --images, --every and --pictures."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help=data)
    add("--images", type=Path, metavar="DIR", help="folder of the pictures, or of train2017 and val2017")
    add("--every", type=positive, default=1, metavar="K", help="every K-th picture, starting with the first")
    add("--pictures", type=positive, default=4, metavar="N", help="pictures encoded at once [4]")


def _image_root(path: Path, image_root: str | Path | None) -> Path:
    if not path.is_file():
        raise MissingFileError(f"annotations: there is no file {path}")
    root = Path(image_root or (path.parent.parent if path.parent.name == "annotations" else path.parent))
    if not root.is_dir():
        raise MissingFileError(f"image root: there is no folder {root}")
    return root


def _size_of(record: Record) -> tuple[int, int] | None:
    """(height, width); None where either is missing or no size."""
    height, width = record.get("height"), record.get("width")
    return (height, width) if is_id(height) and is_id(width) and min(height, width) > 0 else None  # type: ignore


def _file_name(record: Record) -> str:
    """As the file states it; LVIS has it at the end of "coco_url": folder and file."""
    address = urlparse(str(record.get("coco_url") or "")).path
    return str(record.get("file_name") or "/".join(address.split("/")[-2:]))


def _bytes_of(path: Path) -> NDArray[np.uint8]:
    return np.frombuffer(path.read_bytes() if path.is_file() else b"", dtype=np.uint8)
