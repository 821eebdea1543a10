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

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import InputError
from .crops import ConceptTeacher, CropReader, SampleCrops
from .samples import RegionSample
from .shards import ShardCache, ShardFolder, ShardKind, check_broken, check_rank, make_index, whole_shard

SHARD_SIZE = 256
TARGETS = ShardKind("concept targets", "teacher", "targets-{:06d}.safetensors", version=2)


@dataclass(frozen=True)
class _Shard:
    """Embeddings (rows, E) and where each sample's rows begin (samples + 1,), both mapped; what was broken."""

    embeds: Tensor
    offsets: Tensor
    problems: list[str]


class TargetCache(ShardCache[_Shard]):
    """Image embeddings of all regions of a data set, on disk, in half precision (2 KB per mask at E = 1024).

    Shards are mapped into memory, not read: a cache may be larger than memory, and processes share it.
    """

    kind = TARGETS
    max_open = 1024

    @property
    def width(self) -> int:
        """Width E of the embeddings."""
        return self.index.settings["width"]

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
        return torch.stack(rows) if rows else torch.zeros((0, self.width), dtype=torch.float16)

    def _read(self, number: int) -> _Shard:
        return _read_shard(self._shards, number)

    def problems(self) -> list[str]:
        """Samples that were broken when the cache was made, with file and reason."""
        return [text for shard in range(self.index.shards) for text in _read_shard(self._shards, shard).problems]


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
    check_rank(rank, world_size)
    maker = teacher.name, teacher.fingerprint
    index = make_index(TARGETS, maker, data_name, samples, shard_size, width=teacher.width)
    shards = ShardFolder.claim(folder, TARGETS, index, rank)
    share = shards.share(rank, world_size)
    problems = [text for shard in share.done for text in _read_shard(shards, shard).problems]
    order = [sample for shard in share.pending for sample in shards.index.samples_of(shard)]
    loader = DataLoader(CropReader(samples, teacher.settings), batch_size=None, sampler=order, num_workers=workers)
    done = share.total - share.left
    with tqdm(loader, "targets", share.total, initial=done, unit="sample", disable=not progress) as bar:
        stream = iter(bar)
        for shard in share.pending:
            crops = islice(stream, len(shards.index.samples_of(shard)))
            path = shards.shard_path(shard)
            content, broken = _make_shard(path.name, crops, teacher, batch_size)
            problems += broken
            check_broken(problems, share.total, broken_share)  # before it is written: the causes may be mended
            with whole_shard(path) as part:
                part.write_bytes(content)
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


def _read_shard(shards: ShardFolder, number: int) -> _Shard:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shards.shard_path(number), "pt") as file:
            problems = json.loads(file.metadata()["problems"])
            return _Shard(file.get_tensor("embeds"), file.get_tensor("offsets"), problems)
    except (SafetensorError, OSError) as error:
        raise shards.damaged(number, error) from None
