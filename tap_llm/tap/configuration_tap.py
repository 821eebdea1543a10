"""Configuration of TAP (Tokenize Anything via Prompting, arXiv:2312.09128)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

SubConfig = Any  # a config or a dict of its fields; Transformers turns it into the class


@strict
class TapVisionConfig(PreTrainedConfig):
    """Image encoder: a plain ViT whose blocks attend inside windows only; convolutional bottlenecks join the windows.

    Args:
        image_size: side of the square canvas, in pixels. A multiple of `patch_size * window_size`.
        patch_size: side of a patch, in pixels.
        window_size: side of an attention window, in patches.
        hidden_size: width C of the tokens.
        num_hidden_layers: number of transformer blocks, a multiple of `num_bottlenecks`.
        num_attention_heads: heads per block.
        mlp_ratio: width of the MLP over `hidden_size`.
        num_bottlenecks: cross-window convolution blocks, spread evenly, the last one after the last block.
        output_channels: width D of the image embeddings.
        num_channels: colour channels of the input.
        hidden_act: activation of the MLPs and bottlenecks.
        layer_norm_eps: epsilon of LayerNorm (SAM uses 1e-6, TAP 1e-5).
        batch_norm_eps: epsilon of BatchNorm.
        attention_dropout: dropout on attention probabilities, in training.
        drop_path_rate: stochastic depth, linear from 0 at the first block to this at the last, in training.
        initializer_range: standard deviation of initial weights.
    """

    model_type = "tap_vision"
    base_config_key = "vision_config"

    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float | int = 4.0
    num_bottlenecks: int = 4
    output_channels: int = 256
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    batch_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02

    @property
    def image_embedding_size(self) -> int:
        """Side G of the patch grid."""
        return self.image_size // self.patch_size

    @property
    def intermediate_size(self) -> int:
        """Hidden width of the MLPs."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def bottleneck_interval(self) -> int:
        """Number of blocks from one cross-window bottleneck to the next."""
        return self.num_hidden_layers // self.num_bottlenecks

    def validate_architecture(self) -> None:
        """Sizes that must divide each other; raises ValueError."""
        if self.image_size % (self.patch_size * self.window_size):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size * window_size = "
                f"{self.patch_size} * {self.window_size}: windows must tile the image"
            )
        if self.num_hidden_layers % self.num_bottlenecks:
            raise ValueError(
                f"num_hidden_layers {self.num_hidden_layers} is not a multiple of num_bottlenecks "
                f"{self.num_bottlenecks}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}")


@strict
class TapPromptConfig(PreTrainedConfig):
    """Prompt encoder: random Fourier features of a point plus a learned embedding of its label.

    Args:
        hidden_size: width D of the prompt tokens.
        image_size: side of the canvas that coordinates refer to, in pixels.
        num_point_embeddings: labels: 0 background, 1 foreground, 2 top-left, 3 bottom-right, 4 pad.
        scale: standard deviation of the random frequencies.
        initializer_range: standard deviation of initial weights.
    """

    model_type = "tap_prompt"
    base_config_key = "prompt_config"

    hidden_size: int = 256
    image_size: int = 1024
    num_point_embeddings: int = 5
    scale: float | int = 1.0
    initializer_range: float | int = 0.02


@strict
class TapMaskDecoderConfig(PreTrainedConfig):
    """Region decoder: two-way attention between region tokens and the image.

    Args:
        hidden_size: width D of tokens and image embeddings.
        num_hidden_layers: two-way blocks.
        num_attention_heads: heads; official models use D / 32.
        attention_downsample_rate: cross attention works at `hidden_size / attention_downsample_rate`.
        mlp_dim: hidden width of the MLPs in the blocks.
        num_masks: mask slots; slot 0 answers boxes, the others answer points.
        upscale_dim: channels after the first and (halved) second upscaling step.
        head_hidden_size: hidden width of the mask and IoU heads.
        semantic_hidden_size: hidden width of the semantic head.
        semantic_embed_dim: width E of the semantic embeddings, that of the concept space.
        hidden_act: activation of the MLPs in blocks and heads.
        layer_norm_eps: epsilon of LayerNorm.
        dropout: dropout in the blocks, in training.
        initializer_range: standard deviation of initial weights.
    """

    model_type = "tap_mask_decoder"
    base_config_key = "mask_decoder_config"

    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    attention_downsample_rate: int = 2
    mlp_dim: int = 2048
    num_masks: int = 4
    upscale_dim: int = 64
    head_hidden_size: int = 256
    semantic_hidden_size: int = 1024
    semantic_embed_dim: int = 1024
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-5
    dropout: float | int = 0.1
    initializer_range: float | int = 0.02

    def validate_architecture(self) -> None:
        """Sizes that must divide each other; raises ValueError."""
        inner = self.hidden_size // self.attention_downsample_rate
        if self.hidden_size % self.num_attention_heads or inner % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} and its cross-attention width {inner} must be multiples of "
                f"num_attention_heads {self.num_attention_heads}"
            )


@strict
class TapTextConfig(PreTrainedConfig):
    """Caption decoder: a causal language model whose first position holds a semantic token.

    Official models: 12 layers of width 512, 37.8 M parameters in the blocks, 70.7 M with both 32,000-word tables.

    Args:
        vocab_size: number of word pieces.
        semantic_size: width D of the semantic token that fills the first position.
        hidden_size: width of the tokens.
        intermediate_size: hidden width of the MLPs.
        num_hidden_layers: transformer blocks.
        num_attention_heads: heads; official models use `hidden_size / 64`.
        max_position_embeddings: longest sequence, the semantic token included.
        rope_theta: base of the rotary frequencies.
        hidden_act: activation of the MLPs.
        layer_norm_eps: epsilon of LayerNorm.
        attention_dropout: dropout on attention probabilities, in training.
        dropout: dropout on residual branches, in training.
        bos_token_id: starts every caption.
        eos_token_id: ends every caption.
        pad_token_id: fills up; the last piece of the vocabulary unless given.
        semantic_token_id: placeholder that the semantic token replaces; `<unk>`, never generated.
        use_cache: whether generation keeps keys and values.
        initializer_range: standard deviation of initial weights.
    """

    model_type = "tap_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    semantic_size: int = 256
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 40
    rope_theta: float | int = 10000.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.1
    dropout: float | int = 0.1
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    semantic_token_id: int = 0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Sizes that must divide each other; raises ValueError."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.semantic_token_id == self.pad_token_id:
            raise ValueError(f"semantic_token_id and pad_token_id are both {self.pad_token_id}: they must differ")


# Sizes of the released models (they differ in the image encoder only) and of the bundled one.
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "vit_b": {"vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}},
    "vit_l": {"vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}},
    "vit_h": {"vision_config": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}},
    "tiny": {
        "vision_config": {
            "image_size": 256, "window_size": 8, "hidden_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "mlp_ratio": 2.0, "output_channels": 128,
        },
        "prompt_config": {"hidden_size": 128, "image_size": 256},
        "mask_decoder_config": {
            "hidden_size": 128, "num_attention_heads": 4, "mlp_dim": 512, "upscale_dim": 32, "head_hidden_size": 128,
            "semantic_hidden_size": 256, "semantic_embed_dim": 128,
        },
        "text_config": {
            "vocab_size": 1024, "semantic_size": 128, "hidden_size": 128, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 2,
        },
    },
}  # fmt: skip


@strict
class TapConfig(PreTrainedConfig):
    """Configuration of [`TapModel`] and [`TapForConditionalGeneration`]; defaults give the official ViT-B size.

    Args:
        vision_config: a [`TapVisionConfig`] or a dict of its fields.
        prompt_config: a [`TapPromptConfig`] or a dict.
        mask_decoder_config: a [`TapMaskDecoderConfig`] or a dict.
        text_config: a [`TapTextConfig`] or a dict.
        everything: settings of everything mode that suit the weights (fields of `EverythingConfig`).
        provisional: the weights are for trying things out; the command line says so.
        initializer_range: standard deviation of initial weights.
    """

    model_type = "tap"
    sub_configs_defaults = {
        "vision_config": TapVisionConfig,
        "prompt_config": TapPromptConfig,
        "mask_decoder_config": TapMaskDecoderConfig,
        "text_config": TapTextConfig,
    }

    vision_config: SubConfig = None
    prompt_config: SubConfig = None
    mask_decoder_config: SubConfig = None
    text_config: SubConfig = None
    everything: dict[str, Any] | None = None
    provisional: bool = False
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False

    @classmethod
    def from_variant(cls, name: str, **overrides: dict[str, Any]) -> TapConfig:
        """Configuration of a named size: `vit_b`, `vit_l`, `vit_h` (official) or `tiny` (bundled).

        Args:
            name: the size.
            overrides: fields per part, e.g. `text_config={"vocab_size": 500}`; they win over the size's own.

        Raises:
            ValueError: unknown name.
        """
        if name not in _VARIANTS:
            raise ValueError(f"unknown TAP size {name!r}; choose one of {', '.join(_VARIANTS)}")
        parts = {key: dict(value) for key, value in _VARIANTS[name].items()}
        for key, value in overrides.items():
            parts[key] = {**parts.get(key, {}), **value} if isinstance(value, dict) else value
        return cls(**parts)

    def validate_architecture(self) -> None:
        """Widths and canvas sizes of the parts must agree; raises ValueError."""
        vision, prompt, decoder, text = (
            self.vision_config,
            self.prompt_config,
            self.mask_decoder_config,
            self.text_config,
        )
        widths = {
            "vision_config.output_channels": vision.output_channels,
            "prompt_config.hidden_size": prompt.hidden_size,
            "mask_decoder_config.hidden_size": decoder.hidden_size,
            "text_config.semantic_size": text.semantic_size,
        }
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{key} {value}" for key, value in widths.items())
            raise ValueError(f"the parts of TAP must share one width, got {listed}")
        if prompt.image_size != vision.image_size:
            raise ValueError(
                f"prompt_config.image_size {prompt.image_size} differs from vision_config.image_size "
                f"{vision.image_size}"
            )


__all__ = ["TapConfig", "TapMaskDecoderConfig", "TapPromptConfig", "TapTextConfig", "TapVisionConfig"]
