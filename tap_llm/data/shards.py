"""Folders of shards made from a data set: what the caches of targets and of region tokens share.

A folder has `index.json`, which says what it was made of, and shards of consecutive samples. A shard appears under its
name only when it is complete, and which process makes it changes nothing in it: making them can stop anywhere and go
on with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from ..errors import InputError, MissingFileError
from ..regions import region_to_json
from .samples import RegionSample

INDEX_FILE = "index.json"
_FORMS = ("box", "mask", "points", "labels", "sketch")
T = TypeVar("T")
_PROBES = 1024  # samples that tell data sets apart


@dataclass(frozen=True)
class ShardKind:
    """What shards hold.

    Attributes:
        name: in the plural, as messages call it.
        maker: what makes it, as messages call it.
        file: name of a shard, with a place for its number.
        version: of the form of the shards.
    """

    name: str
    maker: str
    file: str
    version: int = 1

    @property
    def format(self) -> str:
        """Tells forms apart."""
        return f"tap-llm {self.name} {self.version}"


@dataclass(frozen=True)
class ShardIndex:
    """`index.json`: what the shards were made of. Shard i has the samples from i * shard_size on.

    Attributes:
        format: of the [`ShardKind`].
        maker: model that made them.
        maker_hash: tells models apart.
        data: the data set, as messages call it.
        data_hash: tells data sets apart, see [`data_hash`].
        samples: number of samples.
        shard_size: samples per shard.
        settings: whatever else must agree; values that JSON can hold.
    """

    format: str
    maker: str
    maker_hash: str
    data: str
    data_hash: str
    samples: int
    shard_size: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        """Number of shards when all are made."""
        return -(-self.samples // self.shard_size)

    def samples_of(self, shard: int) -> range:
        """Numbers of the samples of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.samples))


@dataclass(frozen=True)
class Share:
    """The part of one process.

    Attributes:
        done: its shards that are there already.
        pending: its shards that are to be made.
        total: samples in all of them.
        left: samples in those to be made.
    """

    done: list[int]
    pending: list[int]
    total: int
    left: int


class ShardFolder:
    """A folder with its index.

    Args:
        path: of the folder.
        kind: what its shards hold.
        index: what they were made of.
    """

    def __init__(self, path: Path, kind: ShardKind, index: ShardIndex) -> None:
        self.path, self.kind, self.index = path, kind, index

    @classmethod
    def read(cls, path: str | Path, kind: ShardKind) -> ShardFolder:
        """Open a folder as far as it is made.

        Raises:
            MissingFileError: there is no index.
            InputError: it is damaged or of another kind.
        """
        return cls(Path(path), kind, _read_index(Path(path), kind))

    @classmethod
    def open(cls, path: str | Path, kind: ShardKind) -> ShardFolder:
        """Open a folder that has all its shards.

        Raises:
            MissingFileError: there is no index.
            InputError: it is damaged or of another kind, or shards are missing.
        """
        folder = cls.read(path, kind)
        shards, missing = folder.index.shards, len(folder.missing())
        if missing:
            raise InputError(
                f"the {kind.name} in {path} are not complete ({shards - missing} of {shards} shards): run the command "
                "that makes them again, it goes on where it stopped"
            )
        return folder

    @classmethod
    def claim(cls, path: str | Path, kind: ShardKind, index: ShardIndex, rank: int) -> ShardFolder:
        """Open a folder to make shards in; what is there must agree, but for the size of its shards, which stays.

        Processes that make the index at once write the same.

        Raises:
            InputError: the folder holds something else; nothing is changed in it then.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / INDEX_FILE).exists():
            with whole_shard(path / INDEX_FILE, f".{rank}.part") as part:
                part.write_text(json.dumps(asdict(index), indent=1), encoding="utf-8")
        folder = cls.read(path, kind)
        folder._check_same(index)
        return folder

    def shard_path(self, shard: int) -> Path:
        """File of a shard."""
        return self.path / self.kind.file.format(shard)

    def missing(self) -> list[int]:
        """Shards that are not made yet."""
        present = {entry.name for entry in os.scandir(self.path)}
        return [shard for shard in range(self.index.shards) if self.kind.file.format(shard) not in present]

    def share(self, rank: int, world_size: int) -> Share:
        """What a process is to do: it makes shards rank, rank + world_size, ...

        Raises:
            InputError: there is no such process.
        """
        check_rank(rank, world_size)
        own, missing = range(rank, self.index.shards, world_size), set(self.missing())
        pending = [shard for shard in own if shard in missing]
        total, left = (sum(len(self.index.samples_of(shard)) for shard in shards) for shards in (own, pending))
        return Share([shard for shard in own if shard not in missing], pending, total, left)

    def damaged(self, shard: int, error: object) -> InputError:
        """What to raise for a shard that cannot be read."""
        return InputError(
            f"{self.shard_path(shard)} is damaged ({error}): delete it and run the command that makes it again"
        )

    def _check_same(self, other: ShardIndex) -> None:
        holds = f"{self.path} holds {self.kind.name}"
        for what, named in (("maker", f"another {self.kind.maker}"), ("data", "other data")):
            ours, theirs = (f"{getattr(i, what)} [{getattr(i, what + '_hash')}]" for i in (self.index, other))
            if getattr(self.index, f"{what}_hash") != getattr(other, f"{what}_hash"):
                raise InputError(f"{holds} of {named}: {ours}, not {theirs}; choose another folder")
        for key in sorted(self.index.settings.keys() | other.settings.keys()):
            ours, theirs = (str(index.settings.get(key)) for index in (self.index, other))
            if ours != theirs:
                raise InputError(f"{holds} made with {key} {ours}, not {theirs}; choose another folder")


class ShardCache(ABC, Generic[T]):
    """What was computed of a data set, read shard by shard; the base of the caches.

    Args:
        shards: complete folder.
    """

    kind: ClassVar[ShardKind]
    max_open: ClassVar[int]  # shards kept open at a time

    def __init__(self, shards: ShardFolder) -> None:
        self._shards = shards

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a complete cache.

        Raises:
            MissingFileError: there is no cache in the folder.
            InputError: it is damaged or not complete.
        """
        return cls(ShardFolder.open(folder, cls.kind))

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._shards.path

    @property
    def index(self) -> ShardIndex:
        """What it was made of."""
        return self._shards.index

    def __len__(self) -> int:
        """Number of samples."""
        return self.index.samples

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the shards themselves."""
        return {key: value for key, value in vars(self).items() if key != "_shard"}

    @cached_property
    def _shard(self) -> Callable[[int], T]:
        return lru_cache(self.max_open)(self._read)

    @abstractmethod
    def _read(self, number: int) -> T:
        """Open a shard; raises InputError where it is damaged."""

    def check_data(self, samples: Sequence[RegionSample]) -> None:
        """Raise InputError unless the cache was made of these samples, in this order."""
        if data_hash(samples) != self.index.data_hash:
            raise InputError(
                f"{self.folder} holds {self.kind.name} of other data: {self.index.data} ({len(self)} samples), not "
                f"these {len(samples)} samples; make {self.kind.name} for them"
            )


def check_rank(rank: int, world_size: int) -> None:
    """Raise InputError if there is no such process."""
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of {world_size} processes: ranks are 0 to {world_size - 1}")


def make_index(
    kind: ShardKind,
    maker: tuple[str, str],
    data: str,
    samples: Sequence[RegionSample],
    shard_size: int,
    **settings: Any,
) -> ShardIndex:
    """The index of shards that are to be made.

    Args:
        kind: what they hold.
        maker: name and hash of the model.
        data: what messages call the data set.
        samples: the data set.
        shard_size: samples per shard.
        settings: whatever else must agree.

    Raises:
        InputError: there are no samples, or shards without any.
    """
    if not len(samples) or shard_size < 1:
        raise InputError(f"{data}: {len(samples)} samples in shards of {shard_size} make no {kind.name}")
    return ShardIndex(kind.format, *maker, data, data_hash(samples), len(samples), shard_size, settings)


def _read_index(path: Path, kind: ShardKind) -> ShardIndex:
    try:
        content = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))
        if content["format"] != kind.format:
            raise InputError(f"{path} holds {content['format']!r}, not {kind.format!r}")
        return ShardIndex(**content)
    except FileNotFoundError:
        raise MissingFileError(f"there are no {kind.name} in {path}: it has no {INDEX_FILE}") from None
    except (TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path / INDEX_FILE} is damaged: {error!r}") from None


@contextmanager
def whole_shard(path: Path, suffix: str = ".part") -> Iterator[Path]:
    """A path to write to, which becomes `path` if the block ends well: not even a crash of the system leaves half.

    What a killed process leaves behind has a fixed name, so that the next one writes over it.
    """
    part = path.with_name(path.name + suffix)
    try:
        yield part
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_broken(problems: Sequence[str], total: int, broken_share: float) -> None:
    """Raise InputError if more than a share of `total` samples has problems; the first ones are named."""
    if len(problems) > broken_share * total:
        first = "; ".join(problems[:3])
        raise InputError(
            f"{len(problems)} of {total} samples are broken, more than {broken_share:.1%}; the first: {first}"
        )


def data_hash(samples: Sequence[RegionSample]) -> str:
    """Tells data sets apart: a hash of their length, and of ids, pictures' names and regions of samples all over."""
    places = np.linspace(0, len(samples) - 1, min(len(samples), _PROBES)).round().astype(int)
    digest = hashlib.sha256(str(len(samples)).encode())
    for place in places.tolist():
        digest.update(_sample_key(samples, place).encode())
    return digest.hexdigest()[:16]


def _sample_key(samples: Sequence[RegionSample], index: int) -> str:
    try:
        sample = samples[index]
        forms = [region_to_json({key: region.get(key) for key in _FORMS}) for region in sample.regions]
        for form in forms:
            form["mask"] = _bare_name(form["mask"])
        return json.dumps([sample.id, _image_key(sample.image), forms])
    except (InputError, LookupError, TypeError, AttributeError):
        return "broken"


def _image_key(image: Any) -> Any:
    """Name of a file, checksum of bytes; pictures in memory are not told apart."""
    if isinstance(image, bytes):
        return zlib.crc32(image)
    return _bare_name(str(image)) if isinstance(image, (str, Path)) else None


def _bare_name(value: Any) -> Any:
    """Files may move: of a path the name only; anything else as it is."""
    return Path(value).name if isinstance(value, str) else value
