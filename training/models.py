"""Models for the recipes: built fresh or loaded, with processor and concept space, and saved as one folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn.functional import normalize

from tap_llm.concepts import ConceptSpace
from tap_llm.errors import InputError
from tap_llm.loading import load_concepts, load_tap
from tap_llm.tap.configuration_tap import (
    TapConfig,
    TapMaskDecoderConfig,
    TapPromptConfig,
    TapTextConfig,
    TapVisionConfig,
)
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.modeling_tap import TapForConditionalGeneration
from tap_llm.tap.processing_tap import TapProcessor

_PARTS: dict[str, type[Any]] = {
    "vision_config": TapVisionConfig,
    "prompt_config": TapPromptConfig,
    "mask_decoder_config": TapMaskDecoderConfig,
    "text_config": TapTextConfig,
}


@dataclass
class ModelConfig:
    """Which model is trained."""

    start: str | None = None
    """Model to start from: a folder, a hub id, a bundled or an official name; None for fresh weights."""
    variant: str = "tiny"
    """Size of a fresh model: `tiny`, `vit_b`, `vit_l`, `vit_h`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of a fresh model's configuration per part, e.g. `{vision_config: {drop_path_rate: 0.1}}`."""
    attention: str | None = None
    """Attention implementation; `eager` is the fastest to train on CPUs in bf16."""
    concepts: str | None = None
    """Concept space, if not the one beside `start`; None and nothing beside it: the names of the data."""
    freeze_encoder: bool = False
    """Leave the image encoder as it is: while a fresh decoder would send large gradients into it."""
    learn_concepts: bool = False
    """Train the concept weights: for names that no text encoder embeds."""
    concept_scale: float = 30.0
    """Length of the weights of a concept space that is made from names."""
    half: bool = False
    """Store matrices in half precision: half the size; they load as float32."""


def build_tap(
    config: ModelConfig, names: Iterable[str] = ()
) -> tuple[TapForConditionalGeneration, TapProcessor, ConceptSpace]:
    """A model to train, with its processor and concept space.

    Args:
        config: which model.
        names: names that occur in the data, asked for only where the model has no concept space: one is made of them.

    Returns:
        The model in training mode, in float32; a processor, without tokenizer for a fresh model; the concept space.

    Raises:
        InputError: a model or concept space that cannot be used, or no concept space and no names.
    """
    if config.start is not None:
        if config.overrides:
            raise InputError("model.overrides are for fresh models; set model.start to null or leave them out")
        model, processor, concepts = load_tap(config.start, concepts=config.concepts, dtype="float32")
    else:
        tap_config = _fresh_config(config)
        model = TapForConditionalGeneration(tap_config)
        side = tap_config.vision_config.image_size
        processor = TapProcessor(TapImageProcessor(size={"longest_edge": side}), None)
        concepts = load_concepts(config.concepts, "")
    if config.attention:
        _set_attention(model, config.attention)
    width = model.config.mask_decoder_config.semantic_embed_dim
    if concepts is None:
        concepts = random_concepts(sorted(set(names)), width, config.concept_scale)
    concepts.check_width(width)
    return model.train(), processor, concepts


def _fresh_config(config: ModelConfig) -> TapConfig:
    """Configuration of a fresh model; unknown fields are errors, which Transformers would take for remarks."""
    for part, fields in config.overrides.items():
        if part not in _PARTS:
            raise InputError(f"model.overrides: unknown part {part!r}; known are {', '.join(_PARTS)}")
        if not isinstance(fields, dict):
            raise InputError(f"model.overrides.{part} must be a group of settings, got {fields!r}")
        known = _PARTS[part]().to_dict()
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise InputError(f"model.overrides.{part}: unknown field {unknown[0]!r}")
    try:
        return TapConfig.from_variant(config.variant, **config.overrides)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model: {' '.join(str(error).split())}") from None


def _set_attention(model: TapForConditionalGeneration, implementation: str) -> None:
    """Choose the attention of all parts that attend; the prompt encoder, which does not, would cause a warning."""
    parts = [part for part in _PARTS if part != "prompt_config"]
    try:
        model.set_attn_implementation(dict.fromkeys(["", *parts], implementation))
    except (ValueError, ImportError) as error:
        raise InputError(f"model.attention: {error}") from None


def random_concepts(names: list[str], width: int, scale: float, seed: int = 0) -> ConceptSpace:
    """A space of random directions, one per name, for spaces that are learned or need no meaning.

    Raises:
        InputError: no names.
    """
    if not names:
        raise InputError("there is no concept space and the data has no names: set model.concepts")
    directions = torch.randn(width, len(names), generator=torch.Generator().manual_seed(seed))
    return ConceptSpace(names, scale * normalize(directions, dim=0), {"logit_scale": scale})


def save_tap(
    folder: Path,
    model: TapForConditionalGeneration,
    state: dict[str, Tensor],
    processor: TapProcessor,
    concepts: ConceptSpace,
    half: bool,
) -> None:
    """Write a folder that [`load_tap`] and the command line take.

    Args:
        folder: where to.
        model: gives configuration, and the parts that `state` lacks.
        state: trained tensors under the model's own keys, all of a part or none.
        processor: image processor and, if there is one, tokenizer.
        concepts: concept space.
        half: store matrices in half precision.
    """
    for name, part in model.named_children():
        if not any(key.startswith(f"{name}.") for key in state):
            state = {**state, **part.state_dict(prefix=f"{name}.")}
    if half:
        state = {key: v.half() if v.ndim > 1 and "coord_matrix" not in key else v for key, v in state.items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    concepts.save_pretrained(folder)
