"""What must hold of two loaded models before they are joined, and what the projector must know of the LLM."""

from __future__ import annotations

import inspect
from copy import copy, deepcopy
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..tap.configuration_tap import TapConfig
from ..tap.modeling_tap import TapForConditionalGeneration, TapModel

EMBEDDING_ROWS = 8192  # rows of the LLM's table looked up at a time


def check_parts(tap: Any, llm: Any) -> TapModel:
    """The TAP without its caption decoder.

    Raises:
        InputError: not a TAP, or not a causal LM.
    """
    body = tap.model if isinstance(tap, TapForConditionalGeneration) else tap
    if not isinstance(body, TapModel):
        raise InputError(f"tap must be a TapModel or TapForConditionalGeneration, got {type(tap).__name__}")
    if not isinstance(llm, PreTrainedModel) or llm.get_output_embeddings() is None:
        raise InputError(f"llm must be a causal LM of Transformers (adapters merged), got {type(llm).__name__}")
    return body


def shared_config(body: TapModel) -> TapConfig:
    """Configuration of a TAP within a joined model: the parts that are joined stay its own, live ones.

    The captions are not joined; a configuration without its model loses its attention, and TAP may still caption.
    """
    config = copy(body.config)
    config.text_config = deepcopy(body.config.text_config)
    return config


@torch.no_grad()
def embedding_rms(llm: Any) -> float:
    """Root mean square of what the input embedding puts out over the vocabulary (Gemma scales its table there).

    Raises:
        InputError: its embeddings are of another width than its layers.
    """
    embedding, width = llm.get_input_embeddings(), llm.config.hidden_size
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
    squares, count = 0.0, 0
    for chunk in ids.split(EMBEDDING_ROWS):
        values = embedding(chunk)
        if values.shape[-1] != width:
            raise InputError(
                f"{type(llm).__name__} embeds tokens in {values.shape[-1]} dimensions, but its layers have {width}: "
                "such models are not supported"
            )
        squares, count = squares + values.float().square().sum().item(), count + values.numel()
    return (squares / count) ** 0.5


@lru_cache
def argument_names(llm: Any) -> frozenset[str]:
    """Names that the `forward` of an LLM's class takes."""
    return frozenset(inspect.signature(llm.forward).parameters)


def name_of(model: Any) -> str:
    """Where a model came from; empty if it was made here."""
    return str(getattr(model.config, "_name_or_path", "") or "")


__all__ = ["argument_names", "check_parts", "embedding_rms", "name_of"]
