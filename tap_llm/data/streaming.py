"""Samples one after the other, for what does not fit: sharded per process, resumable to the sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from ..errors import InputError, MissingFileError
from .readers.jsonl import parse_line
from .readers.parquet import check_columns, check_parquet_columns
from .samples import RegionSample

_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class SampleStream(IterableDataset[RegionSample]):
    """An iterable of samples over a streaming `datasets.IterableDataset`; made by [`stream_samples`].

    Its iterator goes on after an [`InputError`] for a broken line, see `skip_broken`. In the workers of a
    `DataLoader` each reads its share of the files, and `state_dict` belongs to the worker: use no workers, or a
    loader that asks its workers for their state (torchdata's StatefulDataLoader).
    """

    def __init__(
        self, files: Sequence[str], kind: str, rank: int, world_size: int, seed: int | None, image_root: Path | None
    ) -> None:
        self.files, self.kind = list(files), kind
        self.rank, self.world_size = rank, world_size
        self.seed, self.image_root = seed, image_root
        self.epoch = 0
        self._rows: Any = None  # what is being read
        self._start: dict[str, Any] | None = None  # where the next iterator begins

    def __iter__(self) -> Iterator[RegionSample]:
        self._rows = self._open()
        if self._start is not None:
            self._rows.load_state_dict(self._start)
            self._start = None
        return map(self._sample, self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the files, where there is a seed; the next iterator begins at the first sample."""
        self.epoch, self._rows, self._start = epoch, None, None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the epoch, and the place in it. JSON can hold it."""
        place = self._start if self._rows is None else self._rows.state_dict()
        return {"epoch": self.epoch, "place": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iterator goes on there: no sample is lost or comes twice. Files, seed and ranks must be the same."""
        self.set_epoch(state["epoch"])
        self._start = state["place"]

    def _open(self) -> Any:
        from datasets import Image, load_dataset
        from datasets import IterableDataset as Rows
        from datasets.distributed import split_dataset_by_node

        files = self._ordered_files()
        if self.kind == "jsonl":
            rows = Rows.from_generator(_lines, gen_kwargs={"paths": files})
        else:
            rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
            check_columns(rows.column_names, files[0])
            rows = rows.cast_column("image", Image(decode=False))  # a damaged picture is for us to name
        return split_dataset_by_node(rows, rank=self.rank, world_size=self.world_size)

    def _ordered_files(self) -> list[str]:
        """A shuffle buffer of samples could not be resumed exactly; the order of the files can."""
        if self.seed is None:
            return self.files
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.files))
        return [self.files[index] for index in order]

    def _sample(self, row: dict[str, Any]) -> RegionSample:
        if self.kind == "parquet":
            return RegionSample.from_row(row)
        path = Path(row["path"])
        try:
            return parse_line(row["line"], self.image_root or path.parent)
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
    """Stream the samples of this process.

    Where the number of files is a multiple of `world_size`, each process reads its own files; else all processes
    read everything and keep every `world_size`-th sample.

    Args:
        files: parquet or JSON-lines files (all of one kind), or the name of a data set on the Hugging Face hub
            that consists of such parquet files.
        rank: of this process.
        world_size: number of processes.
        seed: shuffles the order of the files, anew for each `set_epoch`. Within a file samples keep their order.
        split: of the data set on the hub.
        image_root: for JSON lines, where the paths of pictures start; by default the folder of the file.

    Raises:
        InputError: an unknown kind of file, or columns that are not those of a sample.
        MissingFileError: a file is not there.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank must lie between 0 and world_size - 1 = {world_size - 1}, got {rank}")
    names = [str(files)] if isinstance(files, (str, Path)) else [str(file) for file in files]
    kinds = {_KINDS.get(Path(name).suffix.lower(), "hub") for name in names}
    if len(kinds) != 1 or (kinds == {"hub"} and len(names) != 1):
        raise InputError(f"cannot stream {', '.join(names)}: give files of one kind (.parquet, .jsonl)")
    kind = kinds.pop()
    if kind == "hub":
        names, kind = _hub_files(names[0], split), "parquet"
    else:
        _check_files(names, kind)
    return SampleStream(names, kind, rank, world_size, seed, None if image_root is None else Path(image_root))


def _check_files(names: list[str], kind: str) -> None:
    missing = next((name for name in names if not Path(name).is_file()), None)
    if missing is not None:
        raise MissingFileError(f"samples: there is no file {missing}")
    if kind == "parquet":
        check_parquet_columns([Path(name) for name in names])


def _hub_files(name: str, split: str) -> list[str]:
    """Addresses of the parquet files of a data set on the hub."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise InputError(f"cannot stream {name}: neither a .parquet or .jsonl file nor a data set ({error})") from error
    files = (builder.config.data_files or {}).get(split, [])
    if not files or not all(file.endswith(".parquet") for file in files):
        raise InputError(f"cannot stream {name}: its split {split!r} does not consist of parquet files")
    return [str(file) for file in files]


def _lines(paths: list[str]) -> Iterator[dict[str, Any]]:
    """Lines unparsed, so that going on in the middle of a file is cheap."""
    for path in paths:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield {"line": line, "path": path, "number": number}
