"""Makes the Auto classes of Transformers find ours."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    AutoProcessor,
)

from .region_llm import TapLlmConfig, TapLlmForConditionalGeneration, TapLlmModel, TapLlmProcessor
from .tap import (
    TapCaptionDecoder,
    TapConfig,
    TapImageProcessor,
    TapMaskDecoder,
    TapMaskDecoderConfig,
    TapModel,
    TapProcessor,
    TapPromptConfig,
    TapTextConfig,
    TapTextModel,
    TapVisionConfig,
    TapVisionEncoder,
)


def register_auto_classes() -> None:
    """Register configurations, models and processors; safe to call again."""
    for config in (TapConfig, TapVisionConfig, TapPromptConfig, TapMaskDecoderConfig, TapTextConfig, TapLlmConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(TapConfig, TapModel, exist_ok=True)
    AutoModel.register(TapVisionConfig, TapVisionEncoder, exist_ok=True)
    AutoModel.register(TapMaskDecoderConfig, TapMaskDecoder, exist_ok=True)
    AutoModel.register(TapTextConfig, TapTextModel, exist_ok=True)
    AutoModelForMaskGeneration.register(TapConfig, TapModel, exist_ok=True)
    AutoModelForCausalLM.register(TapTextConfig, TapCaptionDecoder, exist_ok=True)
    AutoModel.register(TapLlmConfig, TapLlmModel, exist_ok=True)
    AutoModelForImageTextToText.register(TapLlmConfig, TapLlmForConditionalGeneration, exist_ok=True)
    # One class for both back-ends: Pillow resizes wherever TAP runs.
    processors = {"pil": TapImageProcessor, "torchvision": TapImageProcessor}
    for config in (TapConfig, TapLlmConfig):
        AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
    AutoProcessor.register(TapConfig, TapProcessor, exist_ok=True)
    AutoProcessor.register(TapLlmConfig, TapLlmProcessor, exist_ok=True)
