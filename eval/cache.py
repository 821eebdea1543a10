"""Predictions on disk: one JSON object per line, the first of which says whose they are.

Every process has a file of its own to append to. What is beside it, left by as many processes as there may have been,
is found again by all of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tap_llm.errors import InputError

_Place = tuple[Path, int]  # file, and where its line begins


def as_json(value: Any) -> str:
    """One line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def part_path(path: Path, rank: int) -> Path:
    """The file of a process; that of the first one is `path`."""
    return path if rank == 0 else path.with_name(f"{path.stem}.{rank}{path.suffix}")


def part_paths(path: Path) -> list[Path]:
    """The files of all processes that are there."""
    known = re.compile(rf"{re.escape(path.stem)}(\.\d+)?{re.escape(path.suffix)}")
    folder = path.parent
    return sorted(found for found in folder.iterdir() if known.fullmatch(found.name)) if folder.is_dir() else []


class StoredPredictions:
    """What has been predicted, by whichever process. Only places are kept in memory.

    Args:
        path: file of the first process.
        key: what the predictions depend on beside their example; files of another key do not count.
        fresh: nothing counts.

    Attributes:
        path: as given.
        key: as given, as JSON has it.
        kept: by file of this key, how many bytes are whole lines; what follows was cut off by a kill.
        others: files of other keys.
        note: what was found, for people.
    """

    def __init__(self, path: Path, key: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.key = path, json.loads(as_json(key))
        self._places: dict[tuple[str, str], _Place] = {}
        self.kept: dict[Path, int] = {}
        parts = part_paths(path)
        for part in [] if fresh else parts:
            self._scan(part)
        self.others = [part for part in parts if part not in self.kept]
        self.note = self._note(fresh)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, example: tuple[str, str]) -> bool:
        return example in self._places

    def __getitem__(self, example: tuple[str, str]) -> dict[str, Any]:
        """The prediction for the (id, fingerprint) of an example."""
        return json.loads(self._line(example))["prediction"]

    def _line(self, example: tuple[str, str]) -> bytes:
        part, start = self._places[example]
        with part.open("rb") as file:
            file.seek(start)
            return file.readline()

    def _scan(self, part: Path) -> None:
        lines = _whole_lines(part)
        start, key = next(lines, (0, None))
        if key != self.key:
            return
        self.kept[part] = start
        for end, record in lines:
            if not (isinstance(record, dict) and record.keys() >= {"id", "fingerprint", "prediction"}):
                return  # damaged, as is what follows
            self._places[str(record["id"]), str(record["fingerprint"])] = part, self.kept[part]
            self.kept[part] = end

    def _note(self, fresh: bool) -> str:
        if self.kept:
            return f"{len(self)} predictions found in {self.path}"
        if fresh:
            return "all predictions are made anew"
        if self.others:
            return f"{self.path} holds predictions of another model or protocol: starting anew"
        return f"predictions go to {self.path}"

    def discard_others(self, processes: int) -> None:
        """Remove files of other keys that none of so many processes will write anew."""
        ours = {part_path(self.path, rank) for rank in range(processes)}
        for part in self.others:
            if part not in ours:
                part.unlink()

    def unite(self, first: list[tuple[str, str]]) -> None:
        """Make one file of all, those of the given examples in front."""
        parts = [part for part in part_paths(self.path) if part != self.path]
        if not parts:
            return
        order = dict.fromkeys([*(example for example in first if example in self), *self._places])
        whole = self.path.with_name(self.path.name + ".part")
        with whole.open("wb") as file:
            file.write(as_json(self.key).encode() + b"\n")
            file.writelines(map(self._line, order))
        os.replace(whole, self.path)
        for part in parts:
            part.unlink()


class PredictionFile:
    """A file to append predictions to; a context manager.

    Args:
        path: the file.
        key: see `StoredPredictions`.
        kept: bytes of it to keep; 0 to start anew.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, key: dict[str, Any], kept: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if kept else "wb")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._append(key)

    def add(self, example: str, fingerprint: str, prediction: Any) -> None:
        """Store a prediction."""
        self._append({"id": example, "fingerprint": fingerprint, "prediction": prediction})

    def _append(self, record: Any) -> None:
        self._file.write(as_json(record).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _whole_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Objects and where their lines end, up to what a kill left behind."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None:
                return
            end += len(line)
            yield end, record
