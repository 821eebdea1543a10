"""TAP: the promptable model, its processor and its configuration."""

from .caption_decoder import TapCaptionDecoder, TapTextModel
from .configuration_tap import TapConfig, TapMaskDecoderConfig, TapPromptConfig, TapTextConfig, TapVisionConfig
from .image_processing_tap import TapImageProcessor
from .mask_decoder import TapMaskDecoder
from .modeling_tap import TapForConditionalGeneration, TapModel
from .outputs import TapOutput
from .processing_tap import TapProcessor
from .prompt_encoder import TapPromptEncoder
from .vision_encoder import TapVisionEncoder

__all__ = [
    "TapCaptionDecoder",
    "TapConfig",
    "TapForConditionalGeneration",
    "TapImageProcessor",
    "TapMaskDecoder",
    "TapMaskDecoderConfig",
    "TapModel",
    "TapOutput",
    "TapProcessor",
    "TapPromptConfig",
    "TapPromptEncoder",
    "TapTextConfig",
    "TapTextModel",
    "TapVisionConfig",
    "TapVisionEncoder",
]
