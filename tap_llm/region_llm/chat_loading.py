"""From the name of a region language model to a model ready to talk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..hub import OFFICIAL_MODELS, bundled_models, resolve_model
from ..loading import parse_device, parse_dtype
from .adapter_files import is_adapter
from .configuration_tap_llm import TapLlmConfig
from .modeling_tap_llm import TapLlmForConditionalGeneration
from .processing_tap_llm import TapLlmProcessor

DEFAULT_CHAT_MODEL = "tap-tiny-chat"


def load_chat_model(
    name: str | Path = DEFAULT_CHAT_MODEL,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tap: Any = None,
    llm: Any = None,
    four_bit: bool = False,
) -> tuple[TapLlmForConditionalGeneration, TapLlmProcessor]:
    """Load a region language model, whole or as an adapter on top of its TAP and LLM.

    Args:
        name: folder of an adapter, folder or hub id of a whole model, or a bundled name.
        device: where to; the first accelerator by default, else the CPU.
        dtype: "float32", "bfloat16", "float16"; that of the weights by default.
        tap: for adapters, see [`load_adapter`].
        llm: for adapters.
        four_bit: for adapters.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        InputError: unknown name, not a region language model, or files that cannot be used.
    """
    target = parse_device(device) or torch.accelerator.current_accelerator() or torch.device("cpu")
    if is_adapter(name):
        from .adapters import load_adapter  # PEFT takes seconds to import

        return load_adapter(name, tap, llm, target, dtype, four_bit=four_bit)
    if tap is not None or llm is not None or four_bit:
        raise InputError(f"{name} is not an adapter: TAP, LLM and 4 bits can be chosen for adapters only")
    if str(name) == DEFAULT_CHAT_MODEL and DEFAULT_CHAT_MODEL not in bundled_models():
        raise InputError(
            f"{name} is not part of this version: name a model with --model FOLDER (an adapter, or a whole model; how "
            "to make one: docs/region_chat.md)"
        )
    model, processor = _load_whole(str(name), parse_dtype(dtype))
    return model.to(target), processor  # type: ignore[arg-type]


def _load_whole(name: str, dtype: str | torch.dtype) -> tuple[TapLlmForConditionalGeneration, TapLlmProcessor]:
    if name in OFFICIAL_MODELS:
        raise InputError(_no_chat(name, "tap"))
    folder = resolve_model(name)
    load: Any = TapLlmForConditionalGeneration.from_pretrained  # its type hint knows nothing of loading info
    try:
        kind = TapLlmConfig.get_config_dict(folder)[0].get("model_type")
        if kind != TapLlmConfig.model_type:
            raise InputError(_no_chat(name, kind))
        model, report = load(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
        if wrong:
            raise InputError(f"the model {name} is damaged: {len(wrong)} tensors are missing or too many: {wrong[0]}")
        processor = TapLlmProcessor.from_pretrained(folder, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # damaged files surface as nearly any exception type
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be loaded: {type(error).__name__}: {reason}") from error
    return model.eval(), processor


def _no_chat(name: str, kind: Any) -> str:
    return (
        f"{name} cannot chat: it is of model type {kind!r}, not a TAP with a language model; join the two with "
        "TapLlmForConditionalGeneration.from_tap_and_llm and train them, see docs/region_chat.md"
    )


__all__ = ["DEFAULT_CHAT_MODEL", "load_chat_model"]
