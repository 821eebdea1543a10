"""Region chat: TAP's tokens in any causal language model."""

from .configuration_tap_llm import TapLlmConfig
from .features import RegionFeatures, extract_features
from .modeling_tap_llm import TapLlmForConditionalGeneration, TapLlmModel
from .placeholders import find_placeholder
from .processing_tap_llm import TapLlmProcessor
from .projectors import PROJECTORS, RegionProjector, register_projector
from .templates import BUNDLED_TEMPLATES

__all__ = [
    "BUNDLED_TEMPLATES",
    "PROJECTORS",
    "RegionFeatures",
    "RegionProjector",
    "TapLlmConfig",
    "TapLlmForConditionalGeneration",
    "TapLlmModel",
    "TapLlmProcessor",
    "extract_features",
    "find_placeholder",
    "register_projector",
]
