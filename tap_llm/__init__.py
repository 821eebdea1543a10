"""tap-llm: point at anything in an image and get its mask, its name, a caption and a conversation about it.

Importing the package registers its classes with Transformers' Auto classes and pipelines.
"""

from .concepts import ConceptSpace
from .errors import InputError, MissingFileError
from .pipelines import RegionPipeline, register_pipeline
from .region_llm import RegionFeatures, TapLlmConfig, TapLlmForConditionalGeneration, TapLlmModel, TapLlmProcessor
from .registration import register_auto_classes
from .tap import (
    TapCaptionDecoder,
    TapConfig,
    TapForConditionalGeneration,
    TapImageProcessor,
    TapModel,
    TapOutput,
    TapProcessor,
)
from .visualize import draw_regions

__version__ = "0.1.0"

register_auto_classes()
register_pipeline()

__all__ = [
    "ConceptSpace",
    "InputError",
    "MissingFileError",
    "RegionFeatures",
    "RegionPipeline",
    "TapCaptionDecoder",
    "TapConfig",
    "TapForConditionalGeneration",
    "TapImageProcessor",
    "TapLlmConfig",
    "TapLlmForConditionalGeneration",
    "TapLlmModel",
    "TapLlmProcessor",
    "TapModel",
    "TapOutput",
    "TapProcessor",
    "draw_regions",
]
