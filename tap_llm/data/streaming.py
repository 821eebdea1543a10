"""Samples one after the other, for what does not fit: sharded per process, resumable to the sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from ..errors import InputError, MissingFileError
from .readers.jsonl import parse_line
from .readers.parquet import check_columns, check_parquet_columns
from .samples import RegionSample

_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class SampleStream(IterableDataset[RegionSample]):
    """An iterable of samples on a streaming `datasets.IterableDataset`; see [`stream_samples`].

    In the workers of a `DataLoader` each reads its share of the files. `state_dict` then belongs to the worker: use
    no workers, or a loader that asks its workers for their state (torchdata's StatefulDataLoader).
    """

    def __init__(self, rows: Any, image_root: Path | None) -> None:
        self._rows = rows
        self._image_root = image_root
        self._epoch = 0

    def __iter__(self) -> Iterator[RegionSample]:
        return map(self._sample, self._rows)  # goes on after a broken line, which a generator would not

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the files, where a seed was given; takes effect at the next start."""
        self._epoch = epoch
        self._rows.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: epoch and place. JSON can hold it."""
        return {"epoch": self._epoch, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there at the next `iter`: no sample is lost or comes twice."""
        self.set_epoch(state["epoch"])
        self._rows.load_state_dict(state["rows"])

    def _sample(self, row: dict[str, Any]) -> RegionSample:
        if "line" not in row:
            return RegionSample.from_row(row)
        path = Path(row["path"])
        try:
            return parse_line(row["line"], self._image_root or path.parent)
        except InputError as error:
            raise InputError(f"{path.name}, line {row['number']}: {error}") from error


def stream_samples(
    files: str | Path | Sequence[str | Path],
    rank: int = 0,
    world_size: int = 1,
    *,
    seed: int | None = None,
    split: str = "train",
    image_root: str | Path | None = None,
) -> SampleStream:
    """Stream samples of this process.

    With a number of files that is a multiple of `world_size` each process reads its own files; else all read
    everything and keep every `world_size`-th sample.

    Args:
        files: parquet or JSON-lines files (all of one kind), or the name of a data set on the Hugging Face hub
            whose columns are those of `features.FEATURES`.
        rank: of this process.
        world_size: number of processes.
        seed: shuffles the order of the files, anew for each `set_epoch`. Samples within a file keep their order: a
            shuffle buffer could not be resumed exactly.
        split: of the data set on the hub.
        image_root: for JSON lines, where the paths of pictures start; by default the folder of the file.

    Raises:
        InputError: an unknown kind of file, or columns that are not those of a sample.
        MissingFileError: a file is not there.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank must lie between 0 and world_size - 1 = {world_size - 1}, got {rank}")
    from datasets.distributed import split_dataset_by_node

    rows = _open_rows([files] if isinstance(files, (str, Path)) else list(files), split)
    if seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)  # files only
    rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
    return SampleStream(rows, None if image_root is None else Path(image_root))


def _open_rows(files: list[str | Path], split: str) -> Any:
    """A streaming data set of rows, or of lines."""
    from datasets import Image, IterableDataset, load_dataset

    kinds = {_SUFFIXES.get(Path(file).suffix.lower(), "hub") for file in files}
    if len(kinds) != 1 or (kinds == {"hub"} and len(files) != 1):
        raise InputError(f"cannot stream {', '.join(map(str, files))}: give files of one kind (.parquet, .jsonl)")
    kind = kinds.pop()
    if kind == "hub":
        rows = load_dataset(str(files[0]), split=split, streaming=True)
        check_columns(rows.column_names, str(files[0]))
        return rows.cast_column("image", Image(decode=False))
    paths = [Path(file) for file in files]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise MissingFileError(f"samples: there is no file {missing}")
    if kind == "jsonl":
        return IterableDataset.from_generator(_lines, gen_kwargs={"paths": [str(path) for path in paths]})
    check_parquet_columns(paths)
    rows = load_dataset("parquet", data_files=[str(path) for path in paths], split="train", streaming=True)
    return rows.cast_column("image", Image(decode=False))


def _lines(paths: list[str]) -> Iterator[dict[str, Any]]:
    """Lines unparsed, so that going on in the middle of a file is cheap."""
    for path in paths:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield {"line": line, "path": path, "number": number}
