"""Sizes of an official TAP checkpoint, read off the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..errors import InputError
from .configuration_tap import TapConfig

NUM_MASKS = 4
# Heads are not visible in the weights: official models have heads of this many channels.
MASK_DECODER_HEAD_DIM, TEXT_HEAD_DIM = 32, 64


class _Sizes:
    """Sizes read off the shapes of official tensors."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}

    def size(self, name: str, axis: int = 0) -> int:
        """Length of an axis of a tensor; raises InputError if there is no such tensor or axis."""
        shape = self.shapes.get(name)
        if shape is None:
            raise InputError(f"this is not an official TAP checkpoint: it has no {name}")
        if axis >= len(shape):
            raise InputError(f"this is not an official TAP checkpoint: {name} is {shape}")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """Number of layers: of numbers 0, 1, … that can stand in place of `*`."""
        number = 0
        while pattern.replace("*", str(number)) in self.shapes:
            number += 1
        return number

    def root(self, name: str, axis: int) -> int:
        """Side of a square table stored flat along an axis."""
        size = self.size(name, axis)
        if math.isqrt(size) ** 2 != size:
            raise InputError(f"{name} has {size} entries, which is no square: only square images are supported")
        return math.isqrt(size)

    def heads(self, width: int, head_dim: int, part: str) -> int:
        """Number of heads of a width."""
        if width % head_dim:
            raise InputError(f"the {part} has width {width}, which is not a multiple of {head_dim}")
        return width // head_dim


def _check_parts(sizes: _Sizes) -> None:
    if not any(name.startswith("text_decoder.") for name in sizes.shapes):
        raise InputError(
            "this checkpoint has no text_decoder.* tensors: the caption decoder is missing; "
            "use a complete official checkpoint such as tap_vit_b_v1_1.pkl"
        )
    counts = {
        "mask tokens": sizes.size("image_decoder.mask_tokens.weight"),
        "semantic tokens": sizes.size("image_decoder.sem_tokens.weight"),
        "mask heads": sizes.count("image_decoder.mask_pred.*.layers.0.weight"),
        "predicted scores": sizes.size("image_decoder.iou_pred.layers.2.weight"),
    }
    for part, count in counts.items():
        if count != NUM_MASKS:
            raise InputError(f"TAP has {NUM_MASKS} {part}, this checkpoint has {count}: it is of another model")


def _canvas(sizes: _Sizes) -> int:
    grid = sizes.root("image_encoder.pos_embed.weight", 0)
    return grid * sizes.size("image_encoder.patch_embed.proj.weight", 2)


def canvas_of(state_dict: Mapping[str, Tensor]) -> int:
    """Side of the square canvas of an official checkpoint, in pixels; InputError if it is none."""
    return _canvas(_Sizes(state_dict))


def _vision_fields(sizes: _Sizes) -> dict[str, int | float]:
    encoder = "image_encoder"
    width = sizes.size(f"{encoder}.pos_embed.weight", 1)
    patch = sizes.size(f"{encoder}.patch_embed.proj.weight", 2)
    table = f"{encoder}.blocks.0.attn.rel_pos_embed.weight"
    return {
        "image_size": _canvas(sizes),
        "patch_size": patch,
        "window_size": (sizes.root(table, 1) + 1) // 2,
        "hidden_size": width,
        "num_hidden_layers": sizes.count(f"{encoder}.blocks.*.norm1.weight"),
        "num_attention_heads": sizes.size(table),
        "mlp_ratio": sizes.size(f"{encoder}.blocks.0.mlp.fc1.weight") / max(width, 1),
        "num_bottlenecks": sizes.count(f"{encoder}.cross_conv.*.conv1.weight"),
        "output_channels": sizes.size(f"{encoder}.neck.output_conv.0.0.weight"),
        "num_channels": sizes.size(f"{encoder}.patch_embed.proj.weight", 1),
    }


def _mask_decoder_fields(sizes: _Sizes) -> dict[str, int]:
    decoder = "image_decoder"
    blocks = f"{decoder}.transformer.blocks"
    width = sizes.size(f"{decoder}.mask_tokens.weight", 1)
    inner = sizes.size(f"{blocks}.0.cross_attn_token_to_image.q_proj.weight")
    return {
        "hidden_size": width,
        "num_hidden_layers": sizes.count(f"{blocks}.*.norm1.weight"),
        "num_attention_heads": sizes.heads(width, MASK_DECODER_HEAD_DIM, "image decoder"),
        "attention_downsample_rate": width // max(inner, 1),
        "mlp_dim": sizes.size(f"{blocks}.0.mlp.fc1.weight"),
        "num_masks": NUM_MASKS,
        "upscale_dim": sizes.size(f"{decoder}.output_conv.0.weight", 1),
        "head_hidden_size": sizes.size(f"{decoder}.iou_pred.layers.0.weight"),
        "semantic_hidden_size": sizes.size(f"{decoder}.sem_pred.layers.0.weight"),
        "semantic_embed_dim": sizes.size(f"{decoder}.sem_pred.layers.2.weight"),
    }


def _text_fields(sizes: _Sizes) -> dict[str, int]:
    decoder = "text_decoder.transformer"
    vocabulary = sizes.size(f"{decoder}.tok_embeddings.weight")
    width = sizes.size(f"{decoder}.tok_embeddings.weight", 1)
    return {
        "vocab_size": vocabulary,
        "semantic_size": sizes.size("text_decoder.encoder.weight", 1),
        "hidden_size": width,
        "intermediate_size": sizes.size(f"{decoder}.blocks.0.mlp.fc1.weight"),
        "num_hidden_layers": sizes.count(f"{decoder}.blocks.*.norm1.weight"),
        "num_attention_heads": sizes.heads(width, TEXT_HEAD_DIM, "text decoder"),
        "pad_token_id": vocabulary - 1,
    }


def infer_config(state_dict: Mapping[str, Tensor]) -> TapConfig:
    """Read every size off the tensors of an official checkpoint.

    Args:
        state_dict: official names to tensors (any device, also `meta`).

    Returns:
        The configuration.

    Raises:
        InputError: not a complete TAP checkpoint, or sizes that do not fit together.
    """
    sizes = _Sizes(state_dict)
    vision = _vision_fields(sizes)
    _check_parts(sizes)
    prompt = {
        "hidden_size": sizes.size("prompt_encoder.point_embed.weight", 1),
        "image_size": vision["image_size"],
        "num_point_embeddings": sizes.size("prompt_encoder.point_embed.weight"),
    }
    decoder, text = _mask_decoder_fields(sizes), _text_fields(sizes)
    try:
        return TapConfig(vision_config=vision, prompt_config=prompt, mask_decoder_config=decoder, text_config=text)
    except (ValueError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the sizes in this checkpoint do not fit together: {reason}") from None


__all__ = ["MASK_DECODER_HEAD_DIM", "TEXT_HEAD_DIM", "canvas_of", "infer_config"]
