"""Configuration of a language model that reads TAP's regions."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..tap.configuration_tap import SubConfig, TapConfig
from .projectors import find_projector


@strict
class TapLlmConfig(PreTrainedConfig):
    """Configuration of [`TapLlmForConditionalGeneration`]: a frozen TAP, a projector and any causal LM.

    Args:
        tap_config: a [`TapConfig`] or a dict of its fields. Its caption decoder is not part of the model.
        text_config: configuration of the LLM, or a dict with its `model_type`.
        projector: name in the registry: "lite", "base", "full", or one that was added.
        projector_hidden_size: width between the projector's two layers; None: that of the LLM's embeddings, which
            is too narrow for many names where the LLM is tiny.
        region_token_id: id of the LLM's vocabulary that keeps the place of image and region tokens; None until a
            processor chose it (`TapLlmProcessor.for_model`).
        roi_grid: a region's box is sampled at the centres of `roi_grid` x `roi_grid` cells.
        global_grid: an image becomes `global_grid` x `global_grid` tokens; must divide the side of TAP's grid.
        embedding_rms: root mean square of what the LLM's input embedding puts out; projected tokens start with it too.
        tap_name_or_path: where the TAP came from.
        llm_name_or_path: where the LLM came from.
        initializer_range: standard deviation of the projector's last layers at the start.
    """

    model_type = "tap_llm"
    sub_configs_defaults = {
        "tap_config": TapConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    attribute_map = {"image_token_id": "region_token_id"}  # the name that Transformers' generation asks for
    keys_to_ignore_at_inference = ["past_key_values"]

    tap_config: SubConfig = None
    text_config: SubConfig = None
    projector: str = "base"
    projector_hidden_size: int | None = None
    region_token_id: int | None = None
    roi_grid: int = 4
    global_grid: int = 8
    embedding_rms: float | int = 1.0
    tap_name_or_path: str = ""
    llm_name_or_path: str = ""
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False  # the LLM's own configuration decides about its table

    @property
    def tokens_per_region(self) -> int:
        """Placeholders that a region costs."""
        return find_projector(self.projector).count_region_tokens(self)

    @property
    def tokens_per_image(self) -> int:
        """Placeholders that an image costs; 0 where only its regions are read."""
        return find_projector(self.projector).count_image_tokens(self)

    @property
    def feature_size(self) -> int:
        """Width D of TAP's semantic tokens and image embeddings."""
        return self.tap_config.vision_config.output_channels

    @property
    def unshuffle(self) -> int:
        """Cells of TAP's grid, per axis, that become one image token."""
        return self.tap_config.vision_config.image_embedding_size // self.global_grid

    def validate_architecture(self) -> None:
        """The projector exists and its grids fit; raises ValueError."""
        find_projector(self.projector)
        if self.projector_hidden_size is not None and self.projector_hidden_size < 1:
            raise ValueError(f"projector_hidden_size must be at least 1, got {self.projector_hidden_size}")
        side = self.tap_config.vision_config.image_embedding_size
        if self.roi_grid < 1 or self.global_grid < 1:
            raise ValueError(f"roi_grid {self.roi_grid} and global_grid {self.global_grid} must be at least 1")
        if self.tokens_per_image and side % self.global_grid:
            raise ValueError(f"global_grid {self.global_grid} does not divide the side of TAP's grid, {side}")


__all__ = ["TapLlmConfig"]
