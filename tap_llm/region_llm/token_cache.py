"""What TAP knows of every region of a data set, stored once: region chat then trains with no image encoder in memory.

    build_token_cache(samples, tap, processor, "tokens", roi_grid=4)     # see `token_builder`
    cache = TokenCache.open("tokens")
    features = cache[7]  # RegionFeatures of sample 7: one image, all its regions in their order

A shard is a parquet file with a row group per sample, so that one sample is read without the others: the number of its
regions, its tensors as raw little-endian bytes (shapes and types are in the schema's metadata, see [`TokenLayout`]),
and what was wrong with it, if it was broken.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.shards import ShardCache, ShardFolder, ShardIndex, ShardKind
from ..errors import InputError
from ..tap.modeling_tap import TapForConditionalGeneration, TapModel
from .configuration_tap_llm import TapLlmConfig
from .features import RegionFeatures
from .projectors import find_projector

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

TOKENS = ShardKind("region tokens", "TAP", "tokens-{:06d}.parquet")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_METADATA_KEY = b"tap_llm"


@dataclass(frozen=True)
class TokenLayout:
    """Types and shapes of what is stored.

    Attributes:
        dtype: of all but the boxes, which are float32: float32, float16 or bfloat16.
        width: D, of semantic tokens and image embeddings.
        roi_grid: R; 0 where no grid over the boxes is stored.
        global_grid: g; 0 where no image tokens are stored.
        global_width: of an image token.
    """

    dtype: str
    width: int
    roi_grid: int
    global_grid: int
    global_width: int

    @classmethod
    def of_model(cls, config: Any, dtype: str, roi_grid: int, global_grid: int) -> TokenLayout:
        """Layout of what a TAP with this [`TapConfig`] gives.

        Raises:
            InputError: an unknown dtype, or grids that cannot be.
        """
        vision = config.vision_config
        width, side = vision.output_channels, vision.image_embedding_size
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: tokens are stored in {', '.join(DTYPES)}")
        if roi_grid < 0 or global_grid < 0 or (global_grid and side % global_grid):
            raise InputError(
                f"roi_grid {roi_grid} and global_grid {global_grid}: neither may be negative, and global_grid must "
                f"divide the side of TAP's grid, {side}"
            )
        unshuffle = side // global_grid if global_grid else 1
        return cls(dtype, width, roi_grid, global_grid, width * unshuffle**2)

    @classmethod
    def of_index(cls, index: ShardIndex) -> TokenLayout:
        """Layout of a cache."""
        return cls(**{name: index.settings[name] for name in cls.__dataclass_fields__})

    def shapes(self, regions: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a sample with so many regions."""
        return {
            "semantic_tokens": (regions, self.width),
            "boxes": (regions, 4),
            "roi": (regions, self.roi_grid**2, self.width),
            "global_tokens": (1, self.global_grid**2, self.global_width),
        }

    def dtype_of(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return torch.float32 if name == "boxes" else DTYPES[self.dtype]

    def schema(self, index: ShardIndex, shard: int) -> pa.Schema:
        """Schema of a shard, with the metadata that tells it from all others."""
        import pyarrow as pa

        tensors = [(name, pa.binary()) for name in self.shapes(0)]
        fields = [("regions", pa.int32()), *tensors, ("problem", pa.string())]
        about = {
            "format": index.format,
            "made_by": index.maker_hash,
            "made_from": index.data_hash,
            "first_sample": index.samples_of(shard).start,
            "samples": len(index.samples_of(shard)),
            "dtypes": {name: str(self.dtype_of(name)).removeprefix("torch.") for name in self.shapes(0)},
            "shapes": {name: [first or "regions", *rest] for name, (first, *rest) in self.shapes(0).items()},
        }
        return pa.schema(fields, metadata={_METADATA_KEY: json.dumps(about)})


class TokenCache(ShardCache["pq.ParquetFile"]):
    """Features of all regions of a data set, on disk, in the order of its samples.

    Args:
        shards: complete folder.
        roi: read `roi`; without it, it is empty, as if it was never stored.
        global_tokens: the same of `global_tokens`.
    """

    kind = TOKENS
    max_open = 32  # a footer of 256 samples takes 1.4 MB in memory, and a millisecond to read

    def __init__(self, shards: ShardFolder, roi: bool = True, global_tokens: bool = True) -> None:
        super().__init__(shards)
        self.layout = TokenLayout.of_index(shards.index)
        self._left_out = {name for name, kept in (("roi", roi), ("global_tokens", global_tokens)) if not kept}

    @classmethod
    def open(cls, folder: str | Path, roi: bool = True, global_tokens: bool = True) -> Self:
        """Open a complete cache; what a projector does not read may stay on disk.

        Raises:
            MissingFileError: there is no cache in the folder.
            InputError: it is damaged or not complete.
        """
        return cls(ShardFolder.open(folder, cls.kind), roi, global_tokens)

    def __getitem__(self, sample: int) -> RegionFeatures:
        """Features of one sample: B = 1 and its N regions, in the cache's dtype, on the CPU.

        Raises:
            IndexError: there is no such sample.
            InputError: it was broken when the cache was made, or its shard is damaged.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number, row = divmod(sample, self.index.shard_size)
        shard = self._shard(number)
        columns = [name for name in shard.schema_arrow.names if name not in self._left_out]
        try:
            table = shard.read_row_group(row, columns=columns, use_threads=False)
            values = {name: table.column(name)[0] for name in columns}
            problem = values.pop("problem").as_py()
            if problem is None:
                return self._features(int(values.pop("regions").as_py()), values)
        except Exception as error:  # damaged bytes surface as nearly any exception type
            raise self._shards.damaged(number, error) from None
        raise InputError(f"{self.folder} has no tokens of a sample that was broken: {problem}")

    def _features(self, regions: int, values: dict[str, Any]) -> RegionFeatures:
        shapes = self.layout.shapes(regions)
        for name in self._left_out:
            rows = shapes[name][0]
            shapes[name] = (rows, 0, self.layout.width)
        tensors = {
            name: _from_bytes(values[name].as_buffer() if name in values else b"", self.layout.dtype_of(name), shape)
            for name, shape in shapes.items()
        }
        return RegionFeatures(**tensors, region_image_index=torch.zeros(regions, dtype=torch.long))

    def _read(self, number: int) -> pq.ParquetFile:
        return open_shard(self._shards, number)

    def problems(self) -> list[str]:
        """Samples that were broken when the cache was made, with file and reason. No tensors are read for it."""
        return [text for number in range(self.index.shards) for text in shard_problems(self._shards, number)]

    def check_model(self, model: Any) -> None:
        """Raise InputError unless the cache was made by this TAP; its dtype may be another."""
        if weights_hash(model) != self.index.maker_hash:
            raise InputError(
                f"{self.folder} holds {self.kind.name} of another TAP: {self.index.maker} [{self.index.maker_hash}], "
                f"not this one [{weights_hash(model)}]; make {self.kind.name} with it"
            )

    def check_config(self, config: TapLlmConfig) -> None:
        """Raise InputError unless the cache holds all that the projector of this model reads."""
        reads, layout = find_projector(config.projector), self.layout
        needed = {"width": config.feature_size}
        needed |= {"roi_grid": config.roi_grid} if reads.uses_roi else {}
        needed |= {"global_grid": config.global_grid} if reads.uses_global else {}
        for name, value in needed.items():
            if getattr(layout, name) != value:
                raise InputError(
                    f"{self.folder} holds {self.kind.name} with {name} {getattr(layout, name)}, but the projector "
                    f'"{config.projector}" reads {value}: make {self.kind.name} for it'
                )


def open_shard(shards: ShardFolder, number: int) -> pq.ParquetFile:
    """Open a shard, mapped into memory; nothing but its footer is read.

    Raises:
        InputError: it is damaged, or belongs elsewhere.
    """
    import pyarrow.parquet as pq

    expected = TokenLayout.of_index(shards.index).schema(shards.index, number)
    try:
        file = pq.ParquetFile(shards.shard_path(number), memory_map=True, page_checksum_verification=True)
        fits = file.schema_arrow.equals(expected, check_metadata=True)
        groups = file.num_row_groups
    except Exception as error:  # damaged bytes surface as nearly any exception type
        raise shards.damaged(number, error) from None
    if not fits or groups != len(shards.index.samples_of(number)):
        raise shards.damaged(number, "it is of another cache")
    return file


def shard_problems(shards: ShardFolder, number: int) -> list[str]:
    """What was broken in a shard, the file's name in front.

    Raises:
        InputError: it is damaged.
    """
    file = open_shard(shards, number)
    try:
        found = file.read(columns=["problem"], use_threads=False).column(0).to_pylist()
    except Exception as error:  # as above
        raise shards.damaged(number, error) from None
    return [text for text in found if text is not None]


def to_bytes(tensor: Tensor) -> bytes:
    """Raw little-endian bytes of a CPU tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _from_bytes(content: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Undo [`to_bytes`], in memory of its own; raises ValueError for another number of bytes."""
    tensor = torch.empty(shape, dtype=dtype)
    source = np.frombuffer(content, dtype=np.uint8)
    if source.size != tensor.numel() * tensor.element_size():
        raise ValueError(f"{source.size} bytes for {tuple(shape)} of {dtype}")
    if source.size:
        tensor.flatten().view(torch.uint8).numpy()[:] = source
    return tensor


def tap_body(model: Any) -> TapModel:
    """The [`TapModel`] within a TAP; raises InputError for any other model."""
    body = model.model if isinstance(model, TapForConditionalGeneration) else model
    if not isinstance(body, TapModel):
        raise InputError(f"expected a TapModel or TapForConditionalGeneration, got {type(model).__name__}")
    return body


def weights_hash(model: Any) -> str:
    """Tells TAPs apart by all weights but the caption decoder's, rounded to bfloat16: copies in bfloat16 and float32
    are the same TAP. Raises InputError for any other model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tap_body(model).state_dict().items()):
        values = tensor.detach().cpu()
        values = values.to(torch.bfloat16) if values.is_floating_point() else values
        digest.update(repr((name, tuple(values.shape))).encode())
        digest.update(to_bytes(values))
    return digest.hexdigest()[:16]


__all__ = ["DTYPES", "TOKENS", "TokenCache", "TokenLayout", "weights_hash"]
