"""Folders that commands write: there only when complete."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def check_free(output: Path) -> None:
    """Raise [`InputError`] where something else would be overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty folder; choose another output")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place at the end; errors leave nothing behind.

    Raises:
        InputError: it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            folder = Path(temporary) / "new"
            folder.mkdir()
            yield folder
            check_free(output)  # someone else may have filled it meanwhile
            folder.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error}") from None


__all__ = ["check_free", "new_folder"]
