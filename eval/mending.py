"""Annotations that are broken, made such that they count as wrong: never as absent, and never by a crash.

A damaged mask or box becomes an empty one, which nothing can match. A region of an unlisted picture or category moves
to one that nothing is predicted for. A number that is used twice is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from tap_llm.data.readers.base import box_from_xywh
from tap_llm.errors import InputError
from tap_llm.masks import decode_rle, encode_rle, mask_to_box, rle_size
from tap_llm.regions import check_box, read_mask

Record = dict[str, Any]

_ID_ZERO = "annotation 0: the reference implementations take a match with the id 0 for none: it counts as missed"


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a value can be the id of something: a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value can be a score or an area: finite, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def known(value: Any, ids: Container[int]) -> TypeGuard[int]:
    """Whether a value is one of these ids."""
    return is_id(value) and value in ids


def no_mask(height: int = 1, width: int = 1) -> dict[str, Any]:
    """RLE without a pixel inside."""
    return encode_rle(np.zeros((height, width), dtype=bool))


@dataclass
class Mender:
    """Mends the annotations of a file, and says what was wrong.

    Args:
        sizes: (height, width) of each picture by id.
        categories: ids that the file lists.
        stray_image: id of a picture for regions that lie on none.
        stray_category: likewise.
        masks: look at masks; else at boxes alone.

    Attributes:
        faults: one line for each thing that is wrong.
    """

    sizes: Mapping[int, tuple[int, int]]
    categories: Container[int]
    stray_image: int
    stray_category: int
    masks: bool = True
    faults: list[str] = field(default_factory=list)

    def mend(self, records: Sequence[Record]) -> list[Record]:
        """Copies with all that the reference implementations need.

        Returns:
            One per record, in order. "problem" says why a region cannot be found, where it cannot.
        """
        fresh = 1 + max((record["id"] for record in records if is_id(record.get("id"))), default=0)
        seen: set[int] = set()
        mended = []
        for record in records:
            number = record.get("id")
            if known(number, seen):
                self.faults.append(f"annotation {number}: this id is used twice; the further one counts as {fresh}")
            if not is_id(number) or number in seen:
                number, fresh = fresh, fresh + 1
            seen.add(number)
            mended.append(self._mend(record, number))
        self.faults += [_ID_ZERO] if 0 in seen else []
        return mended

    def _mend(self, record: Record, number: int) -> Record:
        mended = {"iscrowd": 0, **record, "id": number}
        problems = self._place(mended) or [*self._mask(mended), *self._box(mended)]
        if problems:
            mended["problem"] = "; ".join(problems)
        self._sums(mended, problems)
        self.faults += [f"annotation {record.get('id', number)}: {'; '.join(problems)}"] if problems else []
        return mended

    def _sums(self, mended: Record, problems: list[str]) -> None:
        """Area and "iscrowd" as numbers; a broken one is named, and does not keep the region from being found."""
        area, crowd = mended.get("area"), mended["iscrowd"]
        if crowd not in (0, 1):
            problems.append(f'"iscrowd" must be 0 or 1, got {crowd!r}: it counts as 0')
            mended["iscrowd"] = 0
        if not is_number(area):
            problems += [] if area is None else [f'"area" must be a number, got {area!r}: it is measured']
            mended["area"] = self._area(mended)

    def _place(self, mended: Record) -> list[str]:
        """Picture and category, or what stands for them."""
        image, category = mended.get("image_id"), mended.get("category_id")
        problems = []
        if not known(image, self.sizes):
            problems.append(f"there is no image {image}")
            mended["image_id"] = self.stray_image
        if not known(category, self.categories):
            problems.append(f"there is no category {category}")
            mended["category_id"] = self.stray_category
        if problems:
            mended |= {"segmentation": no_mask(), "bbox": [0, 0, 0, 0]}
        return problems

    def _mask(self, mended: Record) -> list[str]:
        if not self.masks:
            return []
        height, width = self.sizes[mended["image_id"]]
        problem = mask_problem(mended.get("segmentation"), height, width)
        if problem:
            mended["segmentation"] = no_mask(height, width)
        return [problem] if problem else []

    def _box(self, mended: Record) -> list[str]:
        """The box, or that of the mask where the file has none."""
        height, width = self.sizes[mended["image_id"]]
        try:
            if mended.get("bbox") is None and self.masks:
                x0, y0, x1, y1 = mask_to_box(read_mask(mended["segmentation"], height, width)) or (0, 0, 0, 0)
                mended["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            check_box(box_from_xywh(mended.get("bbox")), height, width)
        except InputError as error:
            mended["bbox"] = [0, 0, 0, 0]
            return [str(error)]
        return []

    def _area(self, mended: Record) -> float:
        if not self.masks or "problem" in mended:
            return float(mended["bbox"][2] * mended["bbox"][3])
        return float(read_mask(mended["segmentation"], *self.sizes[mended["image_id"]]).sum())


def mask_problem(mask: Any, height: int, width: int) -> str:
    """What is wrong with polygons or RLE for a picture of that size; "" where nothing is. Draws no polygon."""
    if isinstance(mask, Mapping):
        try:
            if rle_size(mask) != (height, width):
                tall, wide = rle_size(mask)
                return f"mask is {wide}x{tall}, but the image is {width}x{height} (width x height)"
            decode_rle(mask)
        except InputError as error:
            return str(error)
        return ""
    if not mask:
        return "there is no mask"
    sound = isinstance(mask, list) and all(map(_is_polygon, mask))
    return "" if sound else "mask: expected an RLE, or polygons of at least 3 points: [[x0, y0, x1, y1, x2, y2, ...]]"


def _is_polygon(value: Any) -> bool:
    try:
        corners = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return corners.ndim == 1 and corners.size >= 6 and corners.size % 2 == 0 and bool(np.isfinite(corners).all())
