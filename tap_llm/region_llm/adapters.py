"""Adapters: LoRA on the LLM and a projector, trained, saved, loaded, swapped and merged apart from the models below.

    attach_lora(model, lora_config(model))             # LoRA and projector are now all that is trained
    save_adapter(model, "cats", processor)             # some megabytes
    model, processor = load_adapter("cats")            # on top of the TAP and the LLM that it names
    add_adapter(model, "dogs", "dogs")
    use_adapter(model, "dogs")
    merge(model).save_pretrained("whole")              # a plain checkpoint

LoRA sits in the LLM itself (Transformers' own PEFT support); the model stays a [`TapLlmForConditionalGeneration`].
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..loading import load_tap, parse_device
from ..tap.image_processing_tap import TapImageProcessor
from .adapter_files import (
    LORA,
    LORA_CONFIG,
    PROCESSOR,
    PROJECTOR,
    RECORD,
    SETTINGS,
    AdapterRecord,
    Base,
    is_adapter,
    read_lora,
    read_tensors,
    write_lora,
    write_tensors,
)
from .joining import name_of
from .llm_loading import load_llm, load_llm_tokenizer
from .lora import (
    DEFAULT,
    LLM_PATH,
    adapter_names,
    adapters_of,
    add_lora,
    attach_lora,
    freeze_for_alignment,
    lora_config,
    lora_names,
    use_adapter,
)
from .merging import merge
from .modeling_tap_llm import TapLlmForConditionalGeneration
from .processing_tap_llm import TapLlmProcessor
from .projectors import RegionProjector, find_projector

_PROJECTOR_PATH = "model.projector."


def save_adapter(
    model: TapLlmForConditionalGeneration,
    folder: str | Path,
    processor: TapLlmProcessor | None = None,
    name: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write an adapter: LoRA (if it has any), projector, and which TAP and LLM it needs; nothing of these two.

    Args:
        model: with the adapter, or with a trained projector alone.
        folder: made if it is not there; files of the same names are replaced.
        processor: written too (with the tokenizer), so that the adapter loads as it was used.
        name: of the adapter; the one in use by default.
        state_dict: of the model, in place of its own tensors; it may lack all that does not belong to the adapter.

    Raises:
        InputError: there is no such adapter, or the state lacks what belongs to it.
    """
    adapters, path = adapters_of(model), Path(folder)
    name = name or adapters.active or DEFAULT
    if name not in adapters.projectors and adapters.active is not None:
        raise InputError(f"there is no adapter {name!r}; there are {', '.join(adapters.projectors)}")
    if state_dict is not None and name != (adapters.active or name):
        raise InputError(f"a state holds the adapter in use, {adapters.active!r}, not {name!r}")
    has_lora = name in lora_names(model)
    lora = _lora_state(model, name, state_dict) if has_lora else None
    projector = adapters.projectors.get(name, model.model.projector)
    tensors = projector.state_dict()
    if state_dict is not None:
        own = {key.removeprefix(_PROJECTOR_PATH): value for key, value in state_dict.items()}
        tensors = _complete(own, tensors)
    path.mkdir(parents=True, exist_ok=True)
    for file in (RECORD, LORA, LORA_CONFIG):  # the record comes last: a folder without is not complete
        (path / file).unlink(missing_ok=True)
    if lora is not None:
        write_lora(model.model.language_model.peft_config[name], lora, path)
    write_tensors(tensors, path / PROJECTOR)
    if processor is not None:
        processor.save_pretrained(path)
    AdapterRecord.of(model, projector.scale, has_lora).write(path)


def load_adapter(
    folder: str | Path,
    tap: Any = None,
    llm: Any = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    name: str = DEFAULT,
    trainable: bool = False,
    four_bit: bool = False,
) -> tuple[TapLlmForConditionalGeneration, TapLlmProcessor]:
    """Load an adapter on top of the TAP and the LLM that it was trained with.

    Args:
        folder: from [`save_adapter`].
        tap: a loaded TAP, or its name (bundled, official, folder, hub id); by default the recorded name.
        llm: a loaded LLM, or its folder or hub id; by default the recorded name.
        device: where to; parts that are given stay where they are by default, others go to the CPU.
        dtype: of the parts loaded here; that of their weights by default. The adapter keeps its own.
        name: what to call the adapter.
        trainable: its tensors get gradients.
        four_bit: load the LLM in 4 bits, see [`load_llm`].

    Returns:
        The model in eval mode with the adapter in use, and its processor.

    Raises:
        InputError: not an adapter, a TAP or an LLM that cannot be loaded or is another than it was trained with.
    """
    path, target = Path(folder).expanduser(), parse_device(device)
    record = AdapterRecord.read(path)
    tap, image_processor = _base_tap(record, tap, path, dtype)
    if not isinstance(llm, PreTrainedModel):
        name_or_path = llm if llm is not None else _recorded(record.llm, "LLM", path)
        llm = load_llm(name_or_path, four_bit, dtype, device)
    if target is not None:
        tap.to(target)
        llm = llm.to(target) if getattr(llm, "hf_quantizer", None) is None else llm
    model = TapLlmForConditionalGeneration.from_tap_and_llm(
        tap,
        llm,
        **{key: value for key, value in record.settings.items() if key != "embedding_rms"},
        tap_name_or_path=name_of(tap) or record.tap.name,
        llm_name_or_path=name_of(llm) or record.llm.name,
    )
    add_adapter(model, path, name)
    use_adapter(model, name, trainable)
    return model, _processor(model, path, image_processor)


def add_adapter(model: TapLlmForConditionalGeneration, folder: str | Path, name: str) -> None:
    """Load one more adapter; the one in use stays in use. See [`use_adapter`].

    Args:
        model: changed in place.
        folder: from [`save_adapter`].
        name: what to call it.

    Raises:
        InputError: not an adapter, one for another TAP, LLM or preset, or a name that is taken.
    """
    path, adapters = Path(folder).expanduser(), adapters_of(model)
    if not name or "." in name or name in {*adapters.projectors, *lora_names(model)}:
        raise InputError(f"an adapter cannot be called {name!r}: the name is taken, empty, or has a dot in it")
    record = AdapterRecord.read(path)
    record.tap.check(model.model.tap, "TAP", path)
    record.llm.check(model.model.language_model, "LLM", path)
    _check_settings(record.settings, model.config, path)
    projector = _load_projector(record.settings, model, path)
    if record.lora:
        _load_lora(model.model.language_model, path, name)
    adapters.projectors[name] = projector
    if adapters.active is not None:
        learning = any(value.requires_grad for value in model.model.projector.parameters())
        use_adapter(model, adapters.active, learning)


def _lora_state(model: Any, name: str, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Tensors of LoRA by their paths in the LLM, without the adapter's name."""
    llm = model.model.language_model
    expected = get_peft_model_state_dict(llm, adapter_name=name, save_embedding_layers=False)
    if state_dict is None:
        return expected
    own = {key.removeprefix(LLM_PATH): value for key, value in state_dict.items() if key.startswith(LLM_PATH)}
    return _complete(get_peft_model_state_dict(llm, own, name, save_embedding_layers=False), expected)


def _complete(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise InputError(f"the state to save lacks {len(missing)} tensors of the adapter, first {missing[0]}")
    return {key: found[key] for key in expected}


def _check_settings(settings: dict[str, Any], config: Any, path: Path) -> None:
    for key in SETTINGS:
        own = getattr(config, key)
        if key != "embedding_rms" and settings[key] != own:  # that one belongs to the projector alone
            raise InputError(
                f"the adapter {path} does not fit the model: its {key} is {settings[key]!r}, not {own!r}; "
                "load it with load_adapter"
            )


def _load_projector(settings: dict[str, Any], model: Any, path: Path) -> RegionProjector:
    """The projector of a folder, in the dtype of its file, on the model's device."""
    config = deepcopy(model.config)
    config.embedding_rms = settings["embedding_rms"]
    with torch.device("meta"):
        projector = find_projector(settings["projector"])(config)
    try:
        projector.load_state_dict(read_tensors(path / PROJECTOR), assign=True)
    except RuntimeError as error:
        raise InputError(f"the adapter {path} is damaged: {PROJECTOR}: {' '.join(str(error).split())}") from error
    return projector.to(next(model.model.projector.parameters()).device).requires_grad_(False)


def _load_lora(llm: Any, path: Path, name: str) -> None:
    """LoRA of a folder into the LLM, in float32."""
    config, tensors = read_lora(path)
    try:
        add_lora(llm, config, name)
        result: Any = set_peft_model_state_dict(llm, tensors, name)
        missing = [key for key in result.missing_keys if f".{name}." in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"tensors are missing or too many, first {[*missing, *result.unexpected_keys][0]}")
    except (ValueError, RuntimeError) as error:
        if name in getattr(llm, "peft_config", {}):
            llm.delete_adapter(name)
        raise InputError(f"the adapter {path} is damaged: {LORA}: {' '.join(str(error).split())}") from error


def _recorded(base: Base, kind: str, path: Path) -> str:
    if not base.name:
        raise InputError(f"the adapter {path} does not say where its {kind} is: give it ({kind.lower()}=...)")
    return base.name


def _base_tap(record: AdapterRecord, tap: Any, path: Path, dtype: Any) -> tuple[Any, TapImageProcessor]:
    """A loaded TAP and its image processor."""
    if isinstance(tap, PreTrainedModel):
        return tap, TapImageProcessor(size={"longest_edge": tap.config.vision_config.image_size})
    tap, processor, _ = load_tap(tap if tap is not None else _recorded(record.tap, "TAP", path), dtype=dtype)
    return tap, processor.image_processor


def _processor(model: Any, path: Path, image_processor: TapImageProcessor) -> TapLlmProcessor:
    """The adapter's own processor, or one made of the tokenizer that the LLM came with."""
    if not (path / PROCESSOR).is_file():
        if not model.config.llm_name_or_path:
            raise InputError(f"the adapter {path} was saved without a processor, and its LLM comes from nowhere")
        tokenizer = load_llm_tokenizer(model.config.llm_name_or_path)
        return TapLlmProcessor.for_model(model, image_processor, tokenizer)
    try:
        return TapLlmProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # damaged files surface as nearly any exception type
        raise InputError(f"the adapter {path} is damaged: its processor: {' '.join(str(error).split())}") from error


__all__ = [
    "adapter_names",
    "add_adapter",
    "attach_lora",
    "freeze_for_alignment",
    "is_adapter",
    "load_adapter",
    "load_llm",
    "lora_config",
    "merge",
    "save_adapter",
    "use_adapter",
]
