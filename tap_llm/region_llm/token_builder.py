"""Run TAP over a data set once and store what it knows: see [`TokenCache`], which reads it.

A picture is encoded once, however many regions it has. Batches never cross the border of a shard, so that a shard is
the same whichever process makes it, and whenever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.broken import with_place
from ..data.samples import RegionSample
from ..data.shards import ShardFolder, check_broken, check_rank, make_index, whole_shard
from ..errors import InputError
from ..regions import PAD
from ..tap.image_processing_tap import canvas_side
from ..tap.modeling_tap import TapModel
from ..tap.processing_tap import TapProcessor
from .features import RegionFeatures, extract_features
from .joining import name_of
from .token_cache import DTYPES, TOKENS, TokenLayout, shard_problems, tap_body, to_bytes, weights_hash

SHARD_SIZE = 256
REGIONS_AT_ONCE = 64  # rows in TAP's mask decoder: bounds memory where pictures have hundreds
_ROWS = ("semantic_tokens", "boxes", "roi", "region_image_index")


@dataclass
class PromptBatch:
    """Samples on their way to TAP.

    Attributes:
        tensors: what the processor gives for those that are whole; empty where none is.
        regions: number of regions of each of these.
        problems: of every sample, why it cannot be used; "" where it can.
    """

    tensors: dict[str, Tensor]
    regions: list[int]
    problems: list[str]


@dataclass
class TokenReport:
    """What a call of [`build_token_cache`] did.

    Attributes:
        problems: broken samples of this process's shards with file and reason.
        samples: that went through TAP.
        regions: of these samples.
        seconds: that it took, loading included.
    """

    problems: list[str] = field(default_factory=list)
    samples: int = 0
    regions: int = 0
    seconds: float = 0.0

    def count(self, batch: PromptBatch, file: str) -> None:
        """Add a batch of a shard."""
        self.problems += [f"{file}: {problem}" for problem in batch.problems if problem]
        self.samples += len(batch.regions)
        self.regions += sum(batch.regions)


def build_token_cache(
    samples: Sequence[RegionSample],
    model: Any,
    processor: TapProcessor,
    folder: str | Path,
    roi_grid: int = 4,
    global_grid: int = 0,
    dtype: str = "float16",
    shard_size: int = SHARD_SIZE,
    rank: int = 0,
    world_size: int = 1,
    *,
    batch_size: int = 4,
    workers: int = 0,
    broken_share: float = 0.01,
    data_name: str = "samples",
    model_name: str = "",
    progress: bool = False,
) -> TokenReport:
    """Run TAP over all regions once, or go on where an earlier call stopped, however it was stopped.

    Shards are runs of consecutive samples and appear only when complete. Memory holds `batch_size` pictures per
    worker and the tokens of one batch, whatever the size of the data set.

    Args:
        samples: the data set; regions are prompted as [`RegionSample.prompts`] says.
        model: a [`TapModel`] or [`TapForConditionalGeneration`] on any device, in any dtype; put into eval mode.
        processor: its [`TapProcessor`].
        folder: of the cache; made if absent.
        roi_grid: R, see [`extract_features`]; 0 leaves `roi` out.
        global_grid: g; 0 leaves `global_tokens` out. They hold the whole image embedding: 2 MB a picture at ViT-B.
        dtype: in which tokens are stored: "float32", "float16" or "bfloat16".
        shard_size: samples per shard; a cache that is there already keeps its own.
        rank: number of this process; it makes shards rank, rank + world_size, ...
        world_size: number of processes that share the work, all called with the same arguments.
        batch_size: pictures encoded at a time; other sizes may change the last bits of float32.
        workers: processes that load pictures and masks; 0 for this one.
        broken_share: share of broken samples, of those of this process, above which it gives up.
        data_name: how messages call the data set.
        model_name: how messages call the TAP; by default where it was loaded from.
        progress: show a bar with the time left.

    Returns:
        What was done, with the broken samples. The cache refuses to give these; to try again once they are mended,
        delete the file that is named and call this again.

    Raises:
        InputError: no samples, too many broken ones, settings that cannot be, features that are not finite, or the
            folder holds tokens of another TAP or data set, or with other settings.
    """
    body = tap_body(model).eval()
    layout = TokenLayout.of_model(body.config, dtype, roi_grid, global_grid)
    maker = model_name or name_of(model) or "built in memory", weights_hash(body)
    settings = asdict(layout) | _settings(body, processor)
    check_rank(rank, world_size)
    index = make_index(TOKENS, maker, data_name, samples, shard_size, **settings)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    shards = ShardFolder.claim(folder, TOKENS, index, rank)
    share = shards.share(rank, world_size)
    report = TokenReport([text for shard in share.done for text in shard_problems(shards, shard)])
    plan = {shard: _split(shards.index.samples_of(shard), batch_size) for shard in share.pending}
    order = [numbers for batches in plan.values() for numbers in batches]
    loader = DataLoader(PromptReader(samples, processor), batch_size=None, sampler=order, num_workers=workers)
    stream, start, done = iter(loader), time.perf_counter(), share.total - share.left
    with tqdm(total=share.total, desc="tokens", initial=done, unit="sample", disable=not progress) as bar:
        for shard, batches in plan.items():
            with _shard_writer(shards, shard, layout) as write:
                for batch in islice(stream, len(batches)):
                    report.count(batch, shards.shard_path(shard).name)
                    check_broken(report.problems, share.total, broken_share)  # before the shard is written
                    write(batch, _tokens(body, batch, layout))
                    bar.update(len(batch.problems))
            report.seconds = time.perf_counter() - start
    return report


def _settings(body: TapModel, processor: TapProcessor) -> dict[str, Any]:
    """What else the tokens depend on."""
    pixels, side = processor.image_processor, body.config.vision_config.image_size
    if canvas_side(pixels) != side:
        raise InputError(f"the processor makes pictures of {canvas_side(pixels)} pixels, the TAP reads {side}")
    return {
        "compute_dtype": str(body.dtype).removeprefix("torch."),
        "image_mean": list(pixels.image_mean),
        "image_std": list(pixels.image_std),
    }


def _split(numbers: range, size: int) -> list[range]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


class PromptReader(Dataset[PromptBatch]):
    """Pictures and prompts of a data set, a list of samples at a time, picklable for the workers of a `DataLoader`.

    Args:
        samples: the data set.
        processor: of the TAP.
    """

    def __init__(self, samples: Sequence[RegionSample], processor: TapProcessor) -> None:
        self.samples = samples
        self.processor = TapProcessor(processor.image_processor)  # a tokenizer would travel for nothing

    def __getitem__(self, numbers: Sequence[int]) -> PromptBatch:
        """Samples by their numbers; never raises for what is wrong with their data."""
        parts, regions, problems = [], [], []
        for number in numbers:
            try:
                sample = self.samples[number]
                image, prompts = sample.load_image(), sample.prompts()
                parts.append(self.processor([image], [prompts]))
            except (InputError, OSError, LookupError, TypeError, AttributeError) as error:  # they break in many ways
                problems.append(with_place(self.samples, number, error))
            else:
                regions.append(len(prompts))
                problems.append("")
        return PromptBatch(_join(parts), regions, problems)


def _join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What the processor gives for all pictures at once, from what it gave for each."""
    if not parts:
        return {}
    longest = max(part["input_labels"].shape[1] for part in parts)
    missing = [longest - part["input_labels"].shape[1] for part in parts]
    padded = list(zip(parts, missing, strict=True))
    return {
        "pixel_values": torch.cat([part["pixel_values"] for part in parts]),
        "resized_sizes": torch.cat([part["resized_sizes"] for part in parts]),
        "input_points": torch.cat([pad(part["input_points"], (0, 0, 0, more)) for part, more in padded]),
        "input_labels": torch.cat([pad(part["input_labels"], (0, more), value=PAD) for part, more in padded]),
        "region_image_index": torch.cat([part["region_image_index"] + image for image, part in enumerate(parts)]),
    }


@torch.no_grad()
def _tokens(body: TapModel, batch: PromptBatch, layout: TokenLayout) -> RegionFeatures | None:
    """Features of the pictures of a batch as they are stored, on the CPU; None where all are broken."""
    if not batch.tensors:
        return None
    inputs = dict(batch.tensors)
    images = body.get_image_embeddings(inputs.pop("pixel_values").to(body.device, body.dtype))
    rows = {key: inputs.pop(key) for key in ("input_points", "input_labels", "region_image_index")}
    parts = [extract_features(body, image_embeddings=images, roi_grid=layout.roi_grid, global_grid=layout.global_grid,
                              **inputs)]  # fmt: skip
    for start in range(0, sum(batch.regions), REGIONS_AT_ONCE):
        chunk = {key: value[start : start + REGIONS_AT_ONCE] for key, value in rows.items()}
        parts.append(extract_features(body, image_embeddings=images, roi_grid=layout.roi_grid, global_grid=0,
                                      **inputs, **chunk))  # fmt: skip
    joined = {key: torch.cat([getattr(part, key) for part in parts]) for key in _ROWS}
    features = RegionFeatures(global_tokens=parts[0].global_tokens, **joined)
    stored = features.to(dtype=DTYPES[layout.dtype])
    for key in layout.shapes(0):
        if not torch.isfinite(getattr(stored, key)).all():
            raise InputError(
                f"TAP, computed in {body.dtype}, gives {key} that are not finite in {layout.dtype}: its weights are "
                "damaged, or one of the two dtypes is too small; try float32 or bfloat16"
            )
    return stored.to("cpu")


@contextmanager
def _shard_writer(
    shards: ShardFolder, shard: int, layout: TokenLayout
) -> Iterator[Callable[[PromptBatch, RegionFeatures | None], None]]:
    """Gives a function that writes batches; the file appears once the block ends well."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = layout.schema(shards.index, shard)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with whole_shard(shards.shard_path(shard)) as part, pq.ParquetWriter(part, schema, **options) as file:

        def write(batch: PromptBatch, features: RegionFeatures | None) -> None:
            for row in _rows(batch, features, layout, shards.shard_path(shard).name):
                file.write_table(pa.Table.from_pylist([row], schema=schema), row_group_size=1)

        yield write


def _rows(
    batch: PromptBatch, features: RegionFeatures | None, layout: TokenLayout, file: str
) -> Iterator[dict[str, Any]]:
    """A row per sample."""
    image, end = -1, 0
    counts = iter(batch.regions)
    for problem in batch.problems:
        if problem or features is None:
            yield {"regions": 0, "problem": f"{file}: {problem}"}
            continue
        image, start = image + 1, end
        end = start + next(counts)
        tensors = {key: getattr(features, key)[start:end] for key in layout.shapes(0) if key != "global_tokens"}
        tensors["global_tokens"] = features.global_tokens[image : image + 1]
        yield {"regions": end - start, **{key: to_bytes(tensor) for key, tensor in tensors.items()}}


__all__ = ["PromptReader", "TokenReport", "build_token_cache"]
