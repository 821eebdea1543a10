"""Records of benchmark files with their pictures; what is wrong with one stays with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from tap_llm.data.readers.base import find_image, read_json
from tap_llm.data.readers.jsonl import Lines, parse_object
from tap_llm.errors import InputError, MissingFileError

from .base import Example
from .provenance import fingerprint

Record = dict[str, Any]
COCO_FOLDERS = ("train2017", "val2017", "train2014", "val2014")


@dataclass(frozen=True, eq=False)
class Inquiry(Example):
    """A record and its picture.

    Attributes:
        record: as the file has it; empty where it is broken.
        image: path of the picture, which may be missing.
        digest: hash of the picture's file.
        group: what it counts to.
        problem: why the record cannot be used; "" where it can.
    """

    record: Record
    image: Path
    digest: str = ""
    group: str = ""
    problem: str = ""


class Inquiries(Dataset[Inquiry]):
    """Records with their pictures, in order. Broken ones and second ones of the same id stay, to be counted as wrong.

    Args:
        records: of `read_records`.
        images: folder of the pictures.
        image_key: of the picture's name.
        id_keys: what an id is made of; the number of the record where it has none of these.
        group: of all, and in front of their ids.

    Raises:
        MissingFileError: there is no folder of pictures.
    """

    def __init__(
        self,
        records: Sequence[Record | InputError],
        images: Path,
        image_key: str = "image",
        id_keys: Sequence[str] = ("id",),
        group: str = "",
    ) -> None:
        if not images.is_dir():
            raise MissingFileError(f"there is no folder {images} with pictures")
        self.records, self.images, self.image_key, self.group = records, images, image_key, group
        self.ids: list[str] = []
        self.repeated: dict[int, str] = {}
        seen: set[str] = set()
        for number, record in enumerate(records):
            known = {} if isinstance(record, InputError) else record
            parts = [str(known[key]) for key in id_keys if known.get(key) is not None]
            name = "/".join([*([group] if group else []), *(parts or [f"record {number}"])])
            if name in seen:
                self.repeated[number] = name
            seen.add(name)
            self.ids.append(f"{name} (record {number})" if number in self.repeated else name)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Inquiry:
        record, name = self.records[index], self.ids[index]
        if isinstance(record, InputError):
            return self._broken(name, {}, str(record))
        if index in self.repeated:
            return self._broken(name, record, f"the id {self.repeated[index]} is used twice; the first one counts")
        title = record.get(self.image_key)
        if not isinstance(title, str):
            return self._broken(name, record, f'the record is malformed: "{self.image_key}" is missing')
        image = find_image(self.images, title, COCO_FOLDERS)
        digest = file_digest(image)
        return Inquiry(name, fingerprint(record, digest), record, image, digest, self.group)

    def _broken(self, name: str, record: Record, problem: str) -> Inquiry:
        known = fingerprint(record, problem)
        return Inquiry(name, known, record, self.images, group=self.group, problem=problem)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; "missing" where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


def read_records(path: Path) -> list[Record | InputError]:
    """Records of a JSON list, or of a file with one a line; an error in place of each that is broken.

    Raises:
        InputError: the file cannot be read, or is a list that is cut off.
        MissingFileError: there is no file.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no file {path}")
    with path.open("rb") as stream:
        listed = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if listed:
        return [_record(f"record {number}", item) for number, item in enumerate(read_json(path))]
    lines = Lines(path)
    return [_record(lines.where(number), lines[number]) for number in range(len(lines))]


def _record(where: str, item: Any) -> Record | InputError:
    """A record; lines come as bytes."""
    try:
        item = parse_object(item) if isinstance(item, bytes) else item
    except InputError as error:
        return InputError(f"{where}: {error}")
    return item if isinstance(item, dict) else InputError(f"{where}: expected a record, got {type(item).__name__}")
