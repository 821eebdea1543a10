"""Readers: one small file per format, each a sequence of samples with random access."""

from .base import SampleReader
from .coco import CocoSamples
from .flickr30k import Flickr30kSamples
from .gar import GarSamples
from .jsonl import JsonlSamples
from .llava import LlavaSamples
from .osprey import OspreySamples
from .parquet import ParquetSamples
from .refcoco import RefCocoSamples
from .registry import FORMATS, open_samples
from .sa1b import Sa1bSamples
from .shikra import ShikraSamples
from .vcr import VcrSamples
from .visual_genome import GritSamples, VisualGenomeSamples

__all__ = [
    "FORMATS",
    "CocoSamples",
    "Flickr30kSamples",
    "GarSamples",
    "GritSamples",
    "JsonlSamples",
    "LlavaSamples",
    "OspreySamples",
    "ParquetSamples",
    "RefCocoSamples",
    "Sa1bSamples",
    "SampleReader",
    "ShikraSamples",
    "VcrSamples",
    "VisualGenomeSamples",
    "open_samples",
]
