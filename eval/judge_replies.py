"""Raw replies of judges on disk, one JSON object per line, to be read again in place of asking."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tap_llm.errors import InputError, MissingFileError

from .cache import as_json
from .provenance import hash_texts

_KEYS = ("key", "model", "reply")


class Replies(AbstractContextManager["Replies"]):
    """A file of replies; a context manager. Lines that are not replies, such as what a kill left behind, do not count.

    Args:
        path: the file.
        read_only: take replies from it, and never add one.

    Attributes:
        note: what was found, for people.

    Raises:
        InputError: the file cannot be read or written.
        MissingFileError: there is no file to read from.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        if read_only and not path.is_file():
            raise MissingFileError(f"there is no file {path} with replies of a judge")
        self._lock = threading.Lock()
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        parsed = [_parse(line) for line in lines]
        self._known: dict[str, dict[str, Any]] = {record["key"]: record for record in parsed if record is not None}
        skipped = parsed.count(None)
        unusable = f"; {skipped} of its lines are no replies" if skipped else ""
        self.note = f"{len(self._known)} replies of judges found in {path}{unusable}"
        if read_only:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        if lines and not lines[-1].endswith(b"\n"):
            self._file.write(b"\n")

    @property
    def models(self) -> list[str]:
        """Of all replies in the file."""
        return sorted({record["model"] for record in self._known.values()})

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply to a request, or None."""
        record = self._known.get(key)
        return None if record is None else record["reply"]

    def add(self, key: str, model: str, request: dict[str, Any], reply: dict[str, Any]) -> None:
        """Keep a reply; may be called from several threads."""
        record = {"key": key, "model": model, "request": request, "reply": reply}
        with self._lock:
            self._known[key] = record
            self._file.write(as_json(record).encode("utf-8", "replace") + b"\n")
            self._file.flush()

    def __exit__(self, *error: object) -> None:
        if not self.read_only:
            self._file.close()


def request_key(model: str, request: dict[str, Any]) -> str:
    """Hash of a model's name and a request."""
    return hash_texts(json.dumps([model, request], sort_keys=True))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    usable = isinstance(record, dict) and all(key in record for key in _KEYS) and isinstance(record["reply"], dict)
    return record if usable else None
