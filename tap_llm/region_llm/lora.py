"""LoRA inside the LLM, and the projectors of several adapters: attached, trained, switched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from .modeling_tap_llm import TapLlmForConditionalGeneration
from .projectors import RegionProjector

DEFAULT = "default"
LLM_PATH = "model.language_model."


@dataclass(eq=False)
class Adapters:
    """Projectors of a model's adapters, and which adapter is in use."""

    projectors: dict[str, RegionProjector] = field(default_factory=dict)
    active: str | None = None


def lora_config(
    model: TapLlmForConditionalGeneration,
    r: int = 64,
    alpha: int = 128,
    dropout: float = 0.05,
    targets: str | Sequence[str] = "all",
) -> LoraConfig:
    """LoRA on the linear layers of the LLM: never on TAP, the projector, the head or the embeddings.

    Args:
        model: whose LLM it is for.
        r: rank.
        alpha: its updates are scaled by alpha / r.
        dropout: on the inputs of LoRA, in training.
        targets: "all", or last names of layers, such as `["q_proj", "v_proj"]`.

    Returns:
        A configuration that names its targets by their whole path.

    Raises:
        InputError: the LLM has no such layer.
    """
    layers = _linear_layers(model.model.language_model)
    wanted = [path for path in layers if targets == "all" or path.rpartition(".")[2] in targets]
    missing = set() if targets == "all" else set(targets) - {path.rpartition(".")[2] for path in layers}
    if missing or not wanted:
        known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in layers))
        raise InputError(f"the LLM has no linear layer {', '.join(sorted(missing)) or 'at all'}; it has {known}")
    patterns = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\\?\.)", r"\\d+", re.escape(path)) for path in wanted)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=f"({re.escape(LLM_PATH)})?({'|'.join(patterns)})",
        fan_in_fan_out=any(isinstance(layers[path], Conv1D) for path in wanted),
        task_type="CAUSAL_LM",
    )


def _linear_layers(llm: Any) -> dict[str, nn.Module]:
    """Linear layers of an LLM without its head, by path; those inside LoRA count as what they wrap."""
    head, layers = llm.get_output_embeddings(), {}
    for path, module in llm.named_modules():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        inside = ".lora_" in path or path.endswith(".base_layer")
        if isinstance(base, nn.Linear | Conv1D) and base is not head and not inside:
            layers[path] = base
    return layers


def attach_lora(
    model: TapLlmForConditionalGeneration, config: LoraConfig | None = None, name: str = DEFAULT
) -> TapLlmForConditionalGeneration:
    """Put new LoRA into the LLM. It and the projector are then the only tensors with gradients, in float32.

    Args:
        model: changed in place.
        config: from [`lora_config`]; that by default.
        name: of the adapter. One that has a projector alone (from alignment) gets LoRA too; a new one starts with a
            copy of the projector in use.

    Returns:
        The same model.

    Raises:
        InputError: this adapter has LoRA already.
    """
    adapters, llm = adapters_of(model), model.model.language_model
    if name in lora_names(model):
        raise InputError(
            f"the adapter {name!r} has LoRA already: go on training it with use_adapter(model, {name!r}, "
            "trainable=True), or give the new one another name"
        )
    if name not in adapters.projectors:
        own = adapters.active is None
        adapters.projectors[name] = model.model.projector if own else deepcopy(model.model.projector)
    add_lora(llm, deepcopy(config) if config is not None else lora_config(model), name)
    use_adapter(model, name, trainable=True)
    return model


def add_lora(llm: Any, config: LoraConfig, name: str) -> None:
    """New LoRA in float32, in the mode (training or not) that the LLM is in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        llm.add_adapter(config, name)
    cast_adapter_dtype(llm, name)
    llm.train(llm.training)


def freeze_for_alignment(model: TapLlmForConditionalGeneration) -> None:
    """Leave gradients to the projector alone; it becomes float32."""
    model.requires_grad_(False)
    model.model.projector.float().requires_grad_(True)


def adapter_names(model: TapLlmForConditionalGeneration) -> list[str]:
    """Names of a model's adapters, in the order in which they came."""
    return list(adapters_of(model).projectors)


def use_adapter(model: TapLlmForConditionalGeneration, name: str, trainable: bool = False) -> None:
    """Switch to an adapter: its LoRA and its projector.

    Args:
        model: changed in place.
        name: one of [`adapter_names`].
        trainable: its tensors get gradients, in float32; else nothing has gradients.

    Raises:
        InputError: there is no such adapter.
    """
    adapters, llm = adapters_of(model), model.model.language_model
    if name not in adapters.projectors:
        raise InputError(f"there is no adapter {name!r}; there are {', '.join(adapters.projectors) or 'none'}")
    device = next(model.model.projector.parameters()).device
    model.model.projector = adapters.projectors[name].to(device).train(model.training)
    model.config.embedding_rms = model.model.projector.scale
    adapters.active = name
    has_lora = name in lora_names(model)
    if has_lora:
        llm.enable_adapters()
        llm.set_adapter(name)
    elif lora_names(model):
        llm.disable_adapters()
    model.requires_grad_(False)
    if trainable:
        model.model.projector.float().requires_grad_(True)
        if has_lora:
            cast_adapter_dtype(llm, name)
            llm.set_adapter(name)  # which also lets gradients through


def adapters_of(model: Any) -> Adapters:
    """A model's adapters, also before there are any."""
    if not hasattr(model, "region_adapters"):
        model.region_adapters = Adapters()
    return model.region_adapters


def lora_names(model: Any) -> list[str]:
    """Names of the adapters that have LoRA."""
    return list(getattr(model.model.language_model, "peft_config", {}))


__all__ = ["adapter_names", "attach_lora", "freeze_for_alignment", "lora_config", "use_adapter"]
