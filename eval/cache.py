"""Predictions on disk: one JSON object per line, the first of which says whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tap_llm.errors import InputError


def as_json(value: Any) -> str:
    """One line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class PredictionCache:
    """A file of predictions to append to; a context manager.

    What a kill left half-written is cut off. A file of another key is started anew.

    Args:
        path: the file.
        key: what the predictions depend on beside their example.
        fresh: start anew in any case.

    Attributes:
        note: what was found, for people.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, key: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self._key = json.loads(as_json(key))
        self._known: dict[tuple[str, str], Any] = {}
        good = 0 if fresh else self._read()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if good else "wb")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._append(self._key)

    def _read(self) -> int:
        """Fill in what is known; returns how many bytes to keep, 0 to start anew."""
        if not self.path.is_file():
            self.note = f"predictions go to {self.path}"
            return 0
        good, found = 0, []
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _parse(line)
            if record is None:
                break
            good += len(line)
            found.append(record)
        if not found or found[0] != self._key:
            self.note = f"{self.path} holds predictions of another model or protocol: starting anew"
            return 0
        self._known = {(record["id"], record["fingerprint"]): record["prediction"] for record in found[1:]}
        self.note = f"{len(self._known)} predictions found in {self.path}"
        return good

    note = "all predictions are made anew"

    def get(self, example: str, fingerprint: str) -> Any | None:
        """The stored prediction for an example as it is now, or None."""
        return self._known.get((example, fingerprint))

    def add(self, example: str, fingerprint: str, prediction: Any) -> Any:
        """Store a prediction; returns it as it will be read again."""
        self._append({"id": example, "fingerprint": fingerprint, "prediction": prediction})
        return json.loads(as_json(prediction))

    def _append(self, record: Any) -> None:
        self._file.write(as_json(record).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _parse(line: bytes) -> Any | None:
    """A complete line's object; None for what a kill left behind."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
