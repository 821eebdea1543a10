"""Parquet files that `write_parquet` made: pictures embedded, columns as `features.FEATURES`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...errors import InputError
from ..samples import RegionSample
from .base import SampleReader


class ParquetSamples(SampleReader):
    """Rows of a parquet file, or of all *.parquet of a folder by name.

    `datasets` unpacks them once into its cache (HF_DATASETS_CACHE), which is memory-mapped: random access costs no
    memory, and the next opening takes no time.

    Args:
        path: the file or folder.
        cache_dir: folder for the unpacked copy, instead of the cache.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        super().__init__(path)
        files = parquet_files(self.path)
        from datasets import Dataset, Image

        check_parquet_columns(files)
        cache = None if cache_dir is None else str(cache_dir)
        table = Dataset.from_parquet([str(file) for file in files], cache_dir=cache)
        self._rows = table.cast_column("image", Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"row {index}"

    def _read(self, index: int) -> RegionSample:
        return RegionSample.from_row(self._rows[index])


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or a folder's *.parquet by name."""
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise InputError(f"{path}: there is no *.parquet in this folder")
    return files


def check_parquet_columns(files: list[Path]) -> None:
    """Raise [`InputError`] for a file that is no parquet, or whose columns are not those of a sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            names = pq.read_schema(file).names
        except pa.ArrowInvalid as error:
            raise InputError(f"{file} is not a parquet file, or is cut off ({error})") from error
        check_columns(names, str(file))


def check_columns(names: Iterable[str] | None, what: str) -> None:
    """Raise [`InputError`] for columns that a sample does not have, or without a picture."""
    from ..features import FEATURES

    unknown = sorted(set(names or ()) - set(FEATURES))
    if unknown or "image" not in set(names or ()):
        problem = f"unknown columns {', '.join(unknown)}" if unknown else 'no column "image"'
        raise InputError(f"{what}: {problem}; the columns of a sample are {', '.join(FEATURES)}")
