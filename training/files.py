"""Files and folders that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file; a kill leaves the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end, if nothing was raised."""
    part = start_folder(folder)
    yield part
    finish_folder(part, folder)


def start_folder(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and then handed to [`finish_folder`]."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def finish_folder(part: Path, folder: Path) -> None:
    """Put a filled folder in the place of `folder`; a crash of the system loses nothing that is under that name."""
    for path in part.rglob("*"):
        if path.is_file():
            _flush(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
