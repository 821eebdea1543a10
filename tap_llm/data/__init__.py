"""Pictures with regions: one sample type, readers for public formats, writers, streaming, validation."""

from .broken import BrokenCount, SkipBroken, checked, skip_broken
from .readers import FORMATS, SampleReader, open_samples
from .samples import RegionSample
from .streaming import SampleStream, stream_samples
from .validate import Validation, validate
from .writers import write_jsonl, write_parquet

__all__ = [
    "FORMATS",
    "BrokenCount",
    "RegionSample",
    "SampleReader",
    "SampleStream",
    "SkipBroken",
    "Validation",
    "checked",
    "open_samples",
    "skip_broken",
    "stream_samples",
    "validate",
    "write_jsonl",
    "write_parquet",
]
