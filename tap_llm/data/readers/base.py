"""What all readers share: random access that decodes lazily, packed records, finding picture files."""

from __future__ import annotations

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from ...errors import InputError, MissingFileError
from ..samples import RegionSample


class SampleReader(Sequence[RegionSample], ABC):
    """A file or folder as a sequence of samples.

    Opening builds an index; a sample is put together when it is asked for, and its picture is read later still.
    Index i is always the same sample, so taking every k-th one per process and going on where a run stopped are
    plain arithmetic. Readers hold no open files: they can be copied into worker processes.

    Args:
        path: the file or folder.
        image_root: folder that the names of pictures start from; by default that of the file, or the one above
            where the file lies in a folder "annotations", as COCO's do.

    Attributes:
        path: the file or folder.
        root: folder that the names of pictures start from.
        notes: what was left out on purpose, such as crowd regions.
        faults: what is wrong with the file as a whole, such as regions of pictures that are not listed.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        self.faults: list[str] = []
        if not self.path.exists():
            raise MissingFileError(f"samples: there is no file or folder {path}")
        folder = self.path.parent
        beside = folder.parent if folder.name == "annotations" else folder
        self.root = beside if image_root is None else Path(image_root)
        if not self.root.is_dir():
            raise MissingFileError(f"image root: there is no folder {image_root}")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> RegionSample:
        """Put sample `index` together; 0 <= index < len."""

    def where(self, index: int) -> str:
        """How messages call sample `index`: its line, or its number in the file."""
        return f"record {index}"

    @overload
    def __getitem__(self, index: int) -> RegionSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[RegionSample]: ...
    def __getitem__(self, index: int | slice) -> RegionSample | list[RegionSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            return self._read(position)
        except InputError as error:
            raise type(error)(f"{self.where(position)}: {error}") from error
        except (AttributeError, KeyError, IndexError, OverflowError, TypeError, ValueError) as error:
            reason = f'"{error.args[0]}" is missing' if isinstance(error, KeyError) else str(error)
            raise InputError(f"{self.where(position)}: the record is malformed ({reason})") from error

    def __iter__(self) -> Iterator[RegionSample]:
        return map(self.__getitem__, range(len(self)))  # goes on after a broken record


class PackedRecords:
    """Many JSON records as one block of bytes, each unpacked when asked for.

    Millions of dicts would take several times the memory of the file, and worker processes that share them would
    copy them one by one as they count references; a single block stays shared.
    """

    def __init__(self, records: Iterable[Any]) -> None:
        self._block = bytearray()
        ends = []
        for record in records:
            self._block += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)  # five times as fast as JSON text
            ends.append(len(self._block))
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return pickle.loads(memoryview(self._block)[start : self._ends[index]])


def read_json(path: Path) -> Any:
    """A whole JSON document; InputError where it is damaged."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return json.load(stream)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): the file is damaged or cut off") from error


def list_of(document: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """`document[key]`, checked to be a list of dicts."""
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f'{path}: "{key}" is missing, or not a list of records')
    return cast(list[dict[str, Any]], value)


def find_image(root: Path, name: str, folders: Sequence[str] = ()) -> Path:
    """A picture below `root`, by its name as the file states it, or by its bare name in one of `folders`.

    Returns:
        The first path that exists; where none does, `root / name`, so that loading it says which file is missing.
    """
    bare = Path(name).name
    candidates = [root / name, root / bare, *(root / folder / bare for folder in folders)]
    return next((path for path in candidates if path.is_file()), candidates[0])


def box_from_xywh(value: Any) -> Any:
    """COCO's x, y, width, height as edges; what is not four numbers stays as it is, for `check` to name."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return value
    if not all(isinstance(number, (int, float)) for number in value):
        return value
    x, y, width, height = value
    return [x, y, x + width, y + height]


def size_of(record: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) where an image record states both."""
    height, width = record.get("height"), record.get("width")
    return (int(height), int(width)) if height and width else None
