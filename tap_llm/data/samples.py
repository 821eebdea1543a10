"""`RegionSample`: one picture with its regions, captions and conversations, whatever file it came from.

A region is a Region dict (see `tap_llm.regions`) in pixels of the upright picture. As an annotation it may hold a
box *and* a mask, and these keys beside the form:

    "id"          number or text, unique within the sample
    "category"    the name of what is there
    "captions"    list of texts; a single "caption" is accepted and becomes a list of one
    "attributes"  dict of anything else that JSON can hold

Conversations are chat messages (`{"role": ..., "content": ...}`, where a content part
`{"type": "region", "index": 0}` points at a region) or records `{"question": ..., "answer": ..., "regions": [0, 1]}`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError
from ..images import load_image, open_header
from ..masks import BoolArray, encode_rle, mask_to_box
from ..regions import Region, parse_region, read_mask, region_to_json
from .checks import named, region_name, sample_problems, type_problems

REGION_COLUMNS = ("id", "box", "points", "labels", "sketch", "mask", "category", "captions", "attributes")


@dataclass(eq=False)
class RegionSample:
    """One picture and what is known about it. Nothing is read before it is asked for.

    Attributes:
        image: path, encoded bytes, PIL image, or (H, W, 3) uint8 array.
        regions: Region dicts, see the module's head.
        captions: of the whole picture.
        conversations: chat messages, or question/answer records.
        id: names the sample within its source.
        source: the data set it belongs to.
        license: under which it may be used.
        size: (height, width) that the source states; the picture's own once it was loaded.
    """

    image: Any
    regions: list[Region] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    conversations: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""
    source: str = ""
    license: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raises [`InputError`] for a field of a wrong type."""
        problem = next(type_problems(self), None)
        if problem is not None:
            raise InputError(problem)
        self.regions = [_with_captions(region) for region in self.regions]

    def load_image(self) -> Image.Image:
        """The picture, upright, RGB.

        Raises:
            InputError: missing, damaged, or of another size than the source states.
        """
        source = _decode(self.image) if isinstance(self.image, bytes) else self.image
        with _naming("image"):
            image = load_image(source)
        size = (image.height, image.width)
        if self.size is not None and tuple(self.size) != size:
            height, width = self.size
            raise InputError(f"image: is {image.width}x{image.height}, but its record states {width}x{height}")
        self.size = size
        return image

    def image_size(self) -> tuple[int, int]:
        """(height, width): what the source states, else the picture is loaded for it."""
        if self.size is None:
            self.load_image()
        assert self.size is not None
        return self.size

    @property
    def has_mask(self) -> BoolArray:
        """(N,): which regions have a mask."""
        return np.array([region.get("mask") is not None for region in self.regions], dtype=bool)

    def masks(self) -> BoolArray:
        """(M, H, W) masks of the M regions that have one, in order (see `has_mask`).

        Raises:
            InputError: a mask is malformed, empty, or of another size than the picture.
        """
        height, width = self.image_size()
        masks = np.zeros((int(self.has_mask.sum()), height, width), dtype=bool)
        for row, index in enumerate(np.flatnonzero(self.has_mask)):
            masks[row] = self._mask(int(index))
        return masks

    def boxes(self) -> NDArray[np.float64]:
        """(N, 4) xyxy: each region's box, else the tight box of its mask, else NaN (points alone).

        Raises:
            InputError: as `masks`, or a box is malformed, without area, or wholly outside the picture.
        """
        boxes = np.full((len(self.regions), 4), np.nan)
        for index, region in enumerate(self.regions):
            if region.get("box") is not None:
                boxes[index] = self._box(index)
            elif region.get("mask") is not None:
                boxes[index] = mask_to_box(self._mask(index))
        return boxes

    def prompts(self) -> list[Region]:
        """What to prompt TAP with: the box of each region, that of its mask if need be, else its points or stroke.

        Raises:
            InputError: as `boxes`.
        """
        boxes = self.boxes()
        keys = ("points", "labels", "sketch")
        return [
            {"box": box.tolist()} if np.isfinite(box).all() else {key: region[key] for key in keys if key in region}
            for box, region in zip(boxes, self.regions, strict=True)
        ]

    def _mask(self, index: int) -> BoolArray:
        with _naming(region_name(index, self.regions[index])):
            return read_mask(self.regions[index]["mask"], *self.image_size())

    def _box(self, index: int) -> Any:
        box = self.regions[index]["box"]
        with _naming(region_name(index, self.regions[index])):
            parse_region({"box": box}, *self.image_size())
        return box

    def check(self) -> None:
        """Read everything once and raise [`InputError`] for the first fault; the message names the field."""
        problem = next(self.problems(), None)
        if problem is not None:
            raise InputError(problem)

    def problems(self) -> Iterator[str]:
        """All faults, one message each, the field in front."""
        return sample_problems(self)

    def to_row(self) -> dict[str, Any]:
        """A row for `features.FEATURES`: the picture as bytes (files as they are, else PNG), masks as RLE.

        `Json` columns hold text already. Left to `datasets`, the id "12" would come back as a number, and a list
        whose first region needs no encoding would not be encoded at all.

        Raises:
            InputError: the picture cannot be read, a mask is malformed, empty or of another size, a region has an
                unknown key, or a value that JSON cannot hold.
        """
        return {
            "id": self.id,
            "image": {"bytes": encode_image(self.image), "path": None},
            "size": list(self.image_size()),
            "regions": [self._region_row(index) for index in range(len(self.regions))],
            "captions": list(self.captions),
            "conversations": [json.dumps(region_to_json(turn)) for turn in self.conversations],
            "source": self.source,
            "license": self.license,
        }

    def _region_row(self, index: int) -> dict[str, Any]:
        region = self.regions[index]
        row = region_to_json({key: region[key] for key in region if key not in ("mask", "type")})
        unknown = row.keys() - set(REGION_COLUMNS)
        if unknown:
            raise InputError(
                f'{region_name(index, region)}: unknown key "{min(unknown)}"; "attributes" has room for it'
            )
        if region.get("mask") is not None:
            row["mask"] = encode_rle(self._mask(index))
        row |= {key: json.dumps(row[key]) for key in ("id", "attributes") if row.get(key) is not None}
        return {key: row.get(key) for key in REGION_COLUMNS}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> RegionSample:
        """Undo `to_row`. The picture may be a dict of bytes or path, or decoded already."""
        fields = {key: value for key, value in row.items() if value is not None}
        image = fields.pop("image")
        if isinstance(image, Mapping):
            image = image["bytes"] if image.get("bytes") is not None else image["path"]
        regions = [
            {key: value for key, value in region.items() if value is not None} for region in fields.pop("regions", [])
        ]
        size = tuple(fields.pop("size")) if fields.get("size") else None
        return cls(image, regions, size=size, **fields)


@contextmanager
def _naming(field_name: str) -> Iterator[None]:
    """Put the field in front of an error's message."""
    try:
        yield
    except InputError as error:
        raise type(error)(named(field_name, error)) from error


def _with_captions(region: Mapping[str, Any]) -> Region:
    """A copy in which a single "caption" has become "captions"."""
    region = dict(region)
    caption = region.pop("caption", None)
    if caption is not None:
        region.setdefault("captions", [caption])
    return region


def _decode(data: bytes) -> Image.Image:
    try:
        return open_header(io.BytesIO(data))
    except Exception as error:  # a damaged header surfaces as nearly any exception type
        raise InputError("image: the embedded bytes are damaged, or not an image of a known format") from error


def encode_image(image: Any) -> bytes:
    """Bytes of an image file: those there are, else PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"image: cannot read {image} ({error.strerror})") from error
    stream = io.BytesIO()
    load_image(image).save(stream, format="PNG")
    return stream.getvalue()
