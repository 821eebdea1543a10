"""Loads the language model, in 4 bits too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from ..download import is_hub_id
from ..errors import InputError
from ..loading import parse_device, parse_dtype


def load_llm(
    name: str | Path,
    four_bit: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | int | torch.device | None = None,
) -> Any:
    """Load a causal language model, never with code of its own.

    Args:
        name: folder or hub id.
        four_bit: quantise its linear layers to nf4 with bitsandbytes (QLoRA); head and embeddings stay as they are.
        dtype: "float32", "bfloat16", "float16"; that of the weights by default. In 4 bits what is computed in.
        device: where to; the CPU by default.

    Returns:
        The model in eval mode.

    Raises:
        InputError: unknown name, device or dtype, files that cannot be used, or no 4 bits here, with the reason.
    """
    weights_dtype, target = parse_dtype(dtype), parse_device(device) or torch.device("cpu")
    options: dict[str, Any] = {"quantization_config": _four_bit_config(target, weights_dtype)} if four_bit else {}
    llm = _load(AutoModelForCausalLM, name, dtype=weights_dtype, device_map={"": target}, **options)
    if four_bit:
        _prepare_four_bit(llm, str(name))
    return llm.eval()


def load_llm_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a causal language model, never with code of its own.

    Raises:
        InputError: unknown name, or files that cannot be used.
    """
    return _load(AutoTokenizer, name)


def _load(auto_class: Any, name: str | Path, **options: Any) -> Any:
    if not Path(name).expanduser().is_dir() and not is_hub_id(str(name)):
        raise InputError(
            f"there is no LLM {name}: give a folder made by save_pretrained, or a hub id organisation/model"
        )
    try:
        return auto_class.from_pretrained(Path(name).expanduser() if Path(name).exists() else name,
                                          trust_remote_code=False, **options)  # fmt: skip
    except Exception as error:  # damaged files surface as nearly any exception type
        reason = " ".join(str(error).split())
        raise InputError(f"the LLM {name} cannot be loaded: {type(error).__name__}: {reason}") from error


def _four_bit_config(device: torch.device, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    if device.type not in ("cpu", "cuda", "xpu"):
        raise InputError(f"4-bit models run on CUDA and on the CPU, not on {device.type!r}: load without 4 bits")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("4-bit models need bitsandbytes: pip install 'tap-llm[quant]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def four_bit_layers(llm: nn.Module) -> dict[str, Any]:
    """Layers in 4 bits, by path."""
    return {path: layer for path, layer in llm.named_modules() if type(layer).__name__ == "Linear4bit"
            and hasattr(layer, "quant_state")}  # fmt: skip


def _prepare_four_bit(llm: nn.Module, name: str) -> None:
    layers = four_bit_layers(llm)
    if not layers:
        raise InputError(f"the LLM {name} has no linear layer that bitsandbytes can quantise: load it without 4 bits")
    for layer in layers.values():
        # On CPUs with AVX512-BF16 the first step in eval mode would repack the weights for good, and training after
        # that would silently get no gradient through the layer.
        layer.support_avx512bf16_for_cpu = False


__all__ = ["four_bit_layers", "load_llm", "load_llm_tokenizer"]
