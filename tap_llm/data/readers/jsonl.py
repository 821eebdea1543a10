"""One JSON object per line, the form for your own data.

    {"image": "photos/1.jpg", "regions": [{"box": [40, 30, 300, 280], "category": "dog", "captions": ["a wet dog"]}],
     "captions": [...], "messages": [...], "id": "...", "source": "...", "license": "...", "size": [height, width]}

Only "image" is needed. "messages" are chat messages; "conversations" is another name for the same list.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..samples import RegionSample
from .base import SampleReader

KEYS = ("image", "regions", "captions", "caption", "messages", "conversations", "id", "source", "license", "size")
_CHUNK = 1 << 24


class JsonlSamples(SampleReader):
    """One sample per line. Opening notes where lines begin (8 bytes a line); empty lines do not count.

    Args:
        path: the file, UTF-8.
        image_root: folder that the paths of pictures and masks start from; see [`SampleReader`].
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        super().__init__(path, image_root)
        self._lines = Lines(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return self._lines.where(index)

    def _read(self, index: int) -> RegionSample:
        return parse_line(self._lines[index], self.root)


class Lines:
    """The lines of a file that are not empty, each read when asked for.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        edges = line_edges(path)
        filled = np.flatnonzero(np.diff(edges) > 2)  # shorter lines cannot hold a record
        self._starts, self._ends = edges[filled], edges[filled + 1]
        # line numbers are needed apart from the index only where there are empty lines
        self._numbers = None if len(filled) == len(edges) - 1 else filled

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        if index >= len(self):
            raise IndexError(f"line {index} of {len(self)}")  # ends a loop
        with open(self._path, "rb") as stream:
            stream.seek(self._starts[index])
            return stream.read(self._ends[index] - self._starts[index])

    def where(self, index: int) -> str:
        """How messages call a line: its number in the file, counted from 1."""
        return f"line {int(index if self._numbers is None else self._numbers[index]) + 1}"


def line_edges(path: Path) -> NDArray[np.int64]:
    """Byte offsets at which the lines of a file begin, and the file's length at the end."""
    edges = [np.zeros(1, dtype=np.int64)]
    position = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            edges.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + position + 1)
            position += len(chunk)
    offsets = np.concatenate(edges)
    return offsets if offsets[-1] == position else np.append(offsets, position)


def parse_line(text: bytes | str, root: Path) -> RegionSample:
    """One line as a sample.

    Args:
        text: a JSON object.
        root: folder that relative paths start from.

    Raises:
        InputError: not a JSON object, an unknown key, or no "image".
    """
    record = parse_object(text)
    for key in record:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            guess = f'did you mean "{near[0]}"? ' if near else ""
            raise InputError(f'unknown key "{key}"; {guess}Known keys: {", ".join(KEYS)}')
    fields = {key: value for key, value in record.items() if value is not None}
    if not isinstance(fields.get("image"), str):
        raise InputError('"image" must be the path of a picture')
    return _sample(fields, root)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """One line as a dict; InputError where it is no JSON object."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, got {type(record).__name__}")
    return record


def _sample(fields: dict[str, Any], root: Path) -> RegionSample:
    if "caption" in fields:
        fields.setdefault("captions", [fields["caption"]])
    if "messages" in fields:
        fields.setdefault("conversations", fields["messages"])
    fields = {key: value for key, value in fields.items() if key not in ("caption", "messages")}
    fields["image"] = root / fields["image"]
    if "size" in fields:
        height, width = fields["size"]
        fields["size"] = (int(height), int(width))
    if isinstance(fields.get("id"), int):
        fields["id"] = str(fields["id"])
    if isinstance(fields.get("regions"), list):
        fields["regions"] = [_with_mask_path(region, root) for region in fields["regions"]]
    return RegionSample(**fields)


def _with_mask_path(region: Any, root: Path) -> Any:
    """A mask given as a path starts from `root` too."""
    if not isinstance(region, dict) or not isinstance(region.get("mask"), str):
        return region
    return region | {"mask": root / region["mask"]}
