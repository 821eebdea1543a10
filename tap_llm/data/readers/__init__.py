"""Readers: one small file per format, each a sequence of samples with random access."""

from .base import SampleReader
from .coco import CocoSamples
from .jsonl import JsonlSamples
from .parquet import ParquetSamples
from .refcoco import RefCocoSamples
from .registry import FORMATS, open_samples
from .sa1b import Sa1bSamples
from .visual_genome import GritSamples, VisualGenomeSamples

__all__ = [
    "FORMATS",
    "CocoSamples",
    "GritSamples",
    "JsonlSamples",
    "ParquetSamples",
    "RefCocoSamples",
    "Sa1bSamples",
    "SampleReader",
    "VisualGenomeSamples",
    "open_samples",
]
