"""CaR: text to masks with CLIP alone, no training (arXiv:2312.07661)."""

from .configuration_car import CarConfig, Compat
from .loading import Clip
from .modeling import ClipAsRnn
from .outputs import CarOutput, CarStep
from .picture import CarImage
from .pipeline import CarPipeline
from .presets import PRESETS, get_preset
from .text import TextEmbeddings

__all__ = [
    "PRESETS",
    "CarConfig",
    "CarImage",
    "CarOutput",
    "CarPipeline",
    "CarStep",
    "Clip",
    "ClipAsRnn",
    "Compat",
    "TextEmbeddings",
    "get_preset",
]
