"""Is this the model that an adapter was trained on? Told by a few sizes and a few hundred weights.

Weights are compared as numbers, within the rounding of half precision, so that a base loaded in another dtype is still
the same base. Layers that are quantised are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SAMPLES = 64  # weights of each tensor
MATRICES = 6  # weight matrices that are looked at, spread over the layers
RELATIVE, ABSOLUTE = 0.01, 1e-6  # bfloat16 rounds by 0.004, float16 by 6e-8 near zero
_SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "image_size", "patch_size", "output_channels")  # fmt: skip

Fingerprint = dict[str, Any]


def fingerprint(model: Any) -> Fingerprint:
    """Sizes and samples of a model.

    Args:
        model: a TAP or an LLM; LoRA layers inside count as what they wrap.

    Returns:
        JSON-ready `sizes` and `weights`, numbers by the tensor's name.
    """
    tensors = _own_tensors(model)
    samples = {name: _sample(tensors[name]) for name in _chosen(tensors)}
    return {"sizes": _sizes(model.config), "weights": {name: row for name, row in samples.items() if row is not None}}


def difference(recorded: Fingerprint, model: Any) -> str | None:
    """What tells a model from the recorded one; None if nothing does."""
    sizes = _sizes(model.config)
    for key, value in recorded["sizes"].items():
        if sizes.get(key) != value:
            return f"{key} is {sizes.get(key)}, not {value}"
    tensors = _own_tensors(model)
    for name, row in recorded["weights"].items():
        sample = _sample(tensors[name]) if name in tensors else None  # a part may have been left out to save memory
        if sample is not None and not _equal(sample, row):
            return f"{name} has other weights"
    return None


def _sizes(config: Any) -> dict[str, Any]:
    """Sizes as far as a configuration, or that of its vision part, states them."""
    parts = (config, getattr(config, "vision_config", None))
    found = {key: next((getattr(part, key) for part in parts if hasattr(part, key)), None) for key in _SIZES}
    return {key: value for key, value in found.items() if isinstance(value, int | str)}


def _own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters by the names that they have without adapters."""
    named = model.named_parameters()
    return {name.replace(".base_layer.", "."): value for name, value in named if ".lora_" not in name}


def _chosen(tensors: dict[str, Tensor]) -> list[str]:
    """The embedding table, some weight matrices from first to last, and the last vector."""
    matrices = [name for name in tensors if name.endswith(".weight") and "norm" not in name.lower()]
    vectors = [name for name, value in tensors.items() if value.ndim == 1]
    last = len(matrices) - 1
    spread = [matrices[round(last * step / (MATRICES - 1))] for step in range(MATRICES)] if matrices else []
    return list(dict.fromkeys([*spread, *vectors[-1:]]))


def _sample(tensor: Tensor) -> list[float] | None:
    """Weights at even distances; None where they are not here, or quantised."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return None
    places = torch.linspace(0, tensor.numel() - 1, min(SAMPLES, tensor.numel()), device="cpu").long().unique()
    indices = torch.unravel_index(places.to(tensor.device), tensor.shape)
    return [float(f"{value:.5g}") for value in tensor.detach()[indices].float().tolist()]


def _equal(sample: list[float], row: list[float]) -> bool:
    if len(sample) != len(row):
        return False
    return torch.allclose(torch.tensor(sample), torch.tensor(row), rtol=RELATIVE, atol=ABSOLUTE)


__all__ = ["Fingerprint", "difference", "fingerprint"]
