"""Makes an adapter part of the weights, for a base in 4 bits too."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..loading import parse_dtype
from .llm_loading import four_bit_layers

if TYPE_CHECKING:
    from .modeling_tap_llm import TapLlmForConditionalGeneration


@torch.no_grad()
def merge(
    model: TapLlmForConditionalGeneration, dtype: str | torch.dtype | None = None
) -> TapLlmForConditionalGeneration:
    """Add the LoRA in use to the weights of the LLM; other adapters go.

    A base in 4 bits is dequantised first, and never quantised again: what LoRA learned on top of the rounded weights
    stays exact. Logits are then those of the adapter up to the rounding of `dtype`.

    Args:
        model: changed in place.
        dtype: of all weights afterwards; as they are by default, those in 4 bits as the LLM's embeddings.

    Returns:
        The same model without adapters in eval mode; its `save_pretrained` writes a plain checkpoint.

    Raises:
        InputError: a kind of LoRA, or of quantisation, that cannot be merged.
    """
    llm: Any = model.model.language_model
    wanted = parse_dtype(dtype)
    target: torch.dtype = wanted if isinstance(wanted, torch.dtype) else llm.get_input_embeddings().weight.dtype
    layers = {path: layer for path, layer in llm.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in layers.items():
        _check(path, layer)
    deltas = {path: _delta(layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        llm.set_submodule(path, layer.get_base_layer())
    _dequantise(llm, target)
    for path, delta in deltas.items():
        if delta is not None:
            module = llm.get_submodule(path)
            module.weight.copy_(module.weight.float() + _as_stored(delta, module))
    _forget_adapters(model)
    if wanted != "auto":
        model.to(target)
    # A checkpoint is loaded in one dtype, that of its first tensor: TAP's must hold what the LLM's weights hold.
    model.model.tap.to(torch.promote_types(model.model.tap.dtype, target))
    model.model.projector.to(target)
    return model.requires_grad_(False).eval()


def _check(path: str, layer: Any) -> None:
    """Plain LoRA on a plain layer, or on one in 4 bits."""
    weight = layer.get_base_layer().weight
    if layer.lora_variant or any(layer.lora_bias.values()):
        raise InputError(f"{path}: only plain LoRA can be merged here, not DoRA and other kinds")
    if not weight.is_floating_point() and type(weight).__name__ != "Params4bit":
        raise InputError(f"{path}: its base is quantised as {weight.dtype}, which cannot be merged; load it as float")


def _delta(layer: Any) -> Tensor | None:
    """(out, in) float32 sum of the LoRA in use; None where it is switched off."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not names:
        return None
    parts = (layer.lora_B[n].weight.float() @ layer.lora_A[n].weight.float() * layer.scaling[n] for n in names)
    return torch.stack(list(parts)).sum(0)


def _as_stored(weight: Tensor, module: nn.Module) -> Tensor:
    """GPT-2's Conv1D keeps its weights the other way round."""
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _dequantise(llm: Any, dtype: torch.dtype) -> None:
    """Turn layers in 4 bits into plain ones."""
    layers = four_bit_layers(llm)
    if not layers:
        return
    from bitsandbytes.functional import dequantize_4bit

    llm.hf_quantizer.remove_quantization_config(llm)
    with torch.device("meta"):
        plain = type(llm)(deepcopy(llm.config))
    for path, layer in layers.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise InputError(f"{path} was repacked for the CPU and cannot be merged: load the base with load_llm")
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        module = plain.get_submodule(path)
        module.weight = nn.Parameter(_as_stored(weight, module))
        module.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype))
        llm.set_submodule(path, module)
    llm.is_loaded_in_4bit = False


def _forget_adapters(model: Any) -> None:
    llm = model.model.language_model
    if getattr(llm, "_hf_peft_config_loaded", False):
        del llm.peft_config
        llm._hf_peft_config_loaded = False
    if hasattr(model, "region_adapters"):
        del model.region_adapters


__all__ = ["merge"]
