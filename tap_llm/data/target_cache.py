"""What a CLIP teacher says of each mask, stored once: a distribution over concepts (TAP, arXiv:2312.09128, section 3).

The teacher is the image tower of a CLIP model that sees each region alone. Its embeddings do not depend on the
concepts, so each is computed once and kept in a [`TargetCache`]; log p_t = log_softmax(normalize(v) @ W) is cheap.
Where regions have names, `NameTargets` need no teacher at all.

    teacher = ConceptTeacher.from_pretrained("path/to/clip")
    build_target_cache(samples, teacher, "targets")
    cache = TargetCache.open("targets")
    log_targets = concept_log_targets(cache.lookup([0, 0, 7], [0, 1, 3]), concepts)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import InputError, MissingFileError
from ..regions import region_to_json
from .crops import ConceptTeacher, CropReader, SampleCrops
from .samples import RegionSample

INDEX_FILE = "index.json"
SHARD_SIZE = 256
_FORMAT = "tap-llm concept targets 1"
_PROBES = 1024  # samples that tell data sets apart
_MAX_OPEN = 1024  # shards mapped at a time


@dataclass(frozen=True)
class CacheIndex:
    """`index.json` of a cache: what it was made of. Shard i has the samples from i * shard_size on."""

    teacher: str
    teacher_hash: str
    data: str
    data_hash: str
    samples: int
    shard_size: int
    width: int
    format: str = _FORMAT

    @property
    def shards(self) -> int:
        """Number of shards of the whole cache."""
        return -(-self.samples // self.shard_size)

    def samples_of(self, shard: int) -> range:
        """Numbers of the samples of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.samples))

    def check_same(self, folder: Path, other: CacheIndex) -> None:
        """Raise InputError unless both are made by the same teacher from the same data."""
        for what in ("teacher", "data"):
            ours, theirs = (f"{getattr(index, what)} [{getattr(index, what + '_hash')}]" for index in (self, other))
            if getattr(self, f"{what}_hash") != getattr(other, f"{what}_hash"):
                raise InputError(f"{folder} holds targets of other {what}: {ours}, not {theirs}; choose another folder")


class TargetCache:
    """Image embeddings of all regions of a data set, on disk, in half precision (2 KB per mask at E = 1024).

    Shards are mapped into memory, not read: a cache may be larger than memory, and processes share it.
    """

    def __init__(self, folder: str | Path, index: CacheIndex) -> None:
        self.folder = Path(folder)
        self.index = index
        self._mapped: dict[int, _Shard] = {}

    def __reduce__(self) -> tuple[type, tuple[Path, CacheIndex]]:
        """Workers map the shards themselves."""
        return type(self), (self.folder, self.index)

    @classmethod
    def open(cls, folder: str | Path) -> TargetCache:
        """Open a complete cache.

        Raises:
            MissingFileError: there is no cache in the folder.
            InputError: it is damaged or not complete.
        """
        index = _read_index(Path(folder))
        done = index.shards - len(_missing_shards(Path(folder), index))
        if done < index.shards:
            raise InputError(
                f"the targets in {folder} are not complete ({done} of {index.shards} shards): run the command that "
                "makes them again, it goes on where it stopped"
            )
        return cls(folder, index)

    def __len__(self) -> int:
        """Number of samples."""
        return self.index.samples

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Embedding (E,) float16 of region `key[1]` of sample `key[0]`; NaN where the region has no crop.

        Raises:
            InputError: there is no such sample or region, or a shard is damaged.
        """
        sample, region = key
        if not 0 <= sample < len(self):
            raise InputError(f"{self.folder} has targets of samples 0 to {len(self) - 1}, not of sample {sample}")
        shard, place = divmod(sample, self.index.shard_size)
        rows = self._shard(shard)
        first, end = rows.offsets[place : place + 2].tolist()
        if not 0 <= region < end - first:
            raise InputError(f"{self.folder} has targets of {end - first} regions of sample {sample}, not of {region}")
        return rows.embeds[first + region]

    def lookup(self, samples: Sequence[int], regions: Sequence[int]) -> Tensor:
        """Embeddings of many regions.

        Args:
            samples: N numbers of samples in their data set.
            regions: N numbers of regions within those samples.

        Returns:
            (N, E) float16 of unit length; rows of NaN where a region has no target: it has points alone, or its
            sample was broken when the cache was made.

        Raises:
            InputError: there is no such sample or region, or a shard is damaged.
        """
        rows = [self[int(sample), int(region)] for sample, region in zip(samples, regions, strict=True)]
        return torch.stack(rows) if rows else torch.zeros((0, self.index.width), dtype=torch.float16)

    def check_data(self, samples: Sequence[RegionSample]) -> None:
        """Raise InputError unless the cache was made of these samples, in this order."""
        if _data_hash(samples) != self.index.data_hash:
            raise InputError(
                f"{self.folder} holds targets of other data: {self.index.data} ({self.index.samples} samples), not "
                f"these {len(samples)} samples; make targets for them"
            )

    def problems(self) -> list[str]:
        """Samples that were broken when the cache was made, with file and reason."""
        return [text for shard in range(self.index.shards) for text in _read_shard(self.folder, shard).problems]

    def _shard(self, number: int) -> _Shard:
        if number not in self._mapped:
            if len(self._mapped) >= _MAX_OPEN:
                self._mapped.pop(next(iter(self._mapped)))
            self._mapped[number] = _read_shard(self.folder, number)
        return self._mapped[number]


def build_target_cache(
    samples: Sequence[RegionSample],
    teacher: ConceptTeacher,
    folder: str | Path,
    shard_size: int = SHARD_SIZE,
    rank: int = 0,
    world_size: int = 1,
    *,
    batch_size: int = 64,
    workers: int = 0,
    broken_share: float = 0.01,
    data_name: str = "samples",
    progress: bool = False,
) -> list[str]:
    """Embed every region once, or go on where an earlier call stopped, however it was stopped.

    Shards are runs of consecutive samples and appear only when complete. Which process makes a shard changes
    nothing in it, so the cache does not depend on the number of processes.

    Args:
        samples: the data set.
        teacher: the image tower.
        folder: of the cache; made if absent.
        shard_size: samples per shard; a cache that is there already keeps its own.
        rank: number of this process; it makes shards rank, rank + world_size, ...
        world_size: number of processes that share the work, all called with the same arguments.
        batch_size: crops embedded at a time.
        workers: processes that load and crop images; 0 for this one.
        broken_share: share of broken samples, of those of this process, above which it gives up.
        data_name: how messages call the data set.
        progress: show a bar with the time left.

    Returns:
        Broken samples of this process's shards with file and reason. Their targets are NaN; to embed them once they
        are mended, delete the file and call this again.

    Raises:
        InputError: no samples, too many broken ones, or the folder holds targets of another teacher or data set.
    """
    if not len(samples) or shard_size < 1:
        raise InputError(f"{data_name}: {len(samples)} samples in shards of {shard_size} make no targets")
    made_of = teacher.name, teacher.fingerprint, data_name, _data_hash(samples)
    folder = Path(folder)
    index = _claim(folder, CacheIndex(*made_of, len(samples), shard_size, teacher.width), rank)
    own = range(rank, index.shards, world_size)
    absent = _missing_shards(folder, index)
    problems = [text for shard in own if shard not in absent for text in _read_shard(folder, shard).problems]
    pending = [shard for shard in own if shard in absent]
    order = [sample for shard in pending for sample in index.samples_of(shard)]
    total = sum(len(index.samples_of(shard)) for shard in own)
    reader = CropReader(samples, teacher.settings)
    loader = DataLoader(reader, batch_size=None, sampler=order, num_workers=workers)
    with tqdm(loader, "targets", total, initial=total - len(order), unit="sample", disable=not progress) as bar:
        stream = iter(bar)
        for shard in pending:
            crops = islice(stream, len(index.samples_of(shard)))
            path = _shard_path(folder, shard)
            content, broken = _make_shard(path.name, crops, teacher, batch_size)
            problems += broken
            _check_broken(problems, total, broken_share)  # before it is written: the causes may be mended
            _write(path, content)
        next(stream, None)  # the bar shows the end only once it has seen it
    return problems


def _make_shard(
    name: str, crops: Iterable[SampleCrops], teacher: ConceptTeacher, batch_size: int
) -> tuple[bytes, list[str]]:
    """Embed the regions of a shard's samples: the file's content, and what was broken."""
    from safetensors.torch import save

    has_crop: list[Tensor] = []
    problems: list[str] = []

    def pixels() -> Iterator[Tensor]:
        for item in crops:
            has_crop.append(item.has_crop)
            problems.extend([f"{name}: {item.problem}"] if item.problem else [])
            yield item.pixels

    vectors = [batch.half().cpu() for batch in teacher.embed_stream(pixels(), batch_size)]
    rows = torch.cat(has_crop)
    embeds = torch.full((len(rows), teacher.width), torch.nan, dtype=torch.float16)
    if vectors:
        embeds[rows] = torch.cat(vectors)
    ends = torch.tensor([len(row) for row in has_crop]).cumsum(0)
    tensors = {"embeds": embeds, "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), ends])}
    return save(tensors, metadata={"problems": json.dumps(problems)}), problems


def _check_broken(problems: list[str], total: int, broken_share: float) -> None:
    if len(problems) > broken_share * total:
        first = "; ".join(problems[:3])
        raise InputError(
            f"{len(problems)} of {total} samples are broken, more than {broken_share:.1%}; the first: {first}"
        )


def _data_hash(samples: Sequence[RegionSample]) -> str:
    """Tells data sets apart: a hash of their length, and of the ids and forms of samples spread over them."""
    places = torch.linspace(0, len(samples) - 1, min(len(samples), _PROBES), dtype=torch.float64).round().long()
    digest = hashlib.sha256(str(len(samples)).encode())
    for place in places.tolist():
        digest.update(_sample_key(samples, place).encode())
    return digest.hexdigest()[:16]


def _sample_key(samples: Sequence[RegionSample], index: int) -> str:
    try:
        sample = samples[index]
        forms = [region_to_json({key: region.get(key) for key in ("box", "mask")}) for region in sample.regions]
        for form in forms:  # files may move
            form["mask"] = Path(form["mask"]).name if isinstance(form["mask"], str) else form["mask"]
        return json.dumps([sample.id, forms])
    except (InputError, LookupError, TypeError, AttributeError):
        return "broken"


def _write(path: Path, content: bytes, suffix: str = ".part") -> None:
    """Write beside the file and rename: it appears only when complete, and a crash of the system loses nothing."""
    part = path.with_name(path.name + suffix)
    with open(part, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def _claim(folder: Path, index: CacheIndex, rank: int) -> CacheIndex:
    """The cache's index, made if absent; it must agree. Processes that make it at once write the same."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX_FILE).exists():
        _write(folder / INDEX_FILE, json.dumps(asdict(index), indent=1).encode(), f".{rank}.part")
    found = _read_index(folder)
    found.check_same(folder, index)
    return found


def _read_index(folder: Path) -> CacheIndex:
    try:
        content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise InputError(f"{folder} is not a cache of concept targets that this version reads")
        return CacheIndex(**content)
    except FileNotFoundError:
        raise MissingFileError(f"there are no concept targets in {folder}: it has no {INDEX_FILE}") from None
    except (TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder / INDEX_FILE} is damaged: {error!r}") from None


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"targets-{shard:06d}.safetensors"


def _missing_shards(folder: Path, index: CacheIndex) -> set[int]:
    present = {entry.name for entry in os.scandir(folder)}
    return {shard for shard in range(index.shards) if _shard_path(folder, shard).name not in present}


@dataclass(frozen=True)
class _Shard:
    """Embeddings (rows, E) and where each sample's rows begin (samples + 1,), both mapped; what was broken."""

    embeds: Tensor
    offsets: Tensor
    problems: list[str]


def _read_shard(folder: Path, number: int) -> _Shard:
    from safetensors import SafetensorError, safe_open

    path = _shard_path(folder, number)
    try:
        with safe_open(path, "pt") as file:
            problems = json.loads(file.metadata()["problems"])
            return _Shard(file.get_tensor("embeds"), file.get_tensor("offsets"), problems)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run the command that makes it again") from None
