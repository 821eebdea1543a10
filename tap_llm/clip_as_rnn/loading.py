"""CLIP models for CaR: from names and folders to weights, tokenizer and the colours that they expect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from ..data.crops import CropSettings
from ..errors import InputError
from ..hub import OFFICIAL_MODELS, bundled_models, resolve_model
from .configuration_car import CONFIG_FILE, CarConfig
from .presets import BUNDLED_CLIP, PRESETS, get_preset

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


class Clip:
    """A CLIP model with what belongs to it.

    Args:
        model: a `CLIPModel`.
        tokenizer: None: texts must be embedded elsewhere.
        settings: side and colours of its pictures; by default its config's side and CLIP's colours.

    Raises:
        InputError: another kind of model.
    """

    def __init__(self, model: Any, tokenizer: Any = None, settings: CropSettings | None = None) -> None:
        if not isinstance(model, CLIPModel):
            raise InputError(f"CaR works with CLIP models (CLIPModel), not with a {type(model).__name__}")
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings or CropSettings.of_tower(model)

    def save_pretrained(self, folder: Path) -> None:
        """Write model, tokenizer and image processor as one folder that [`load_clip`] reads."""
        settings = self.settings
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": settings.size},
            crop_size={"height": settings.size, "width": settings.size},
            image_mean=list(settings.mean),
            image_std=list(settings.std),
        ).save_pretrained(folder)


def eager_float32(model: Any) -> Any:
    """The same model with eager attention, which shows its weights, in float32.

    A float32 model shares its weights with the result: only the modules are copied.
    """
    shared = model.dtype == torch.float32
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if shared else {}
    twin = copy.deepcopy(model, memo).float()
    twin.set_attn_implementation("eager")
    return twin


def load_clip(name: str | Path, dtype: str | torch.dtype = "auto") -> Clip:
    """Load a CLIP model, never with code of its own.

    Args:
        name: bundled name, folder or hub id.
        dtype: of the weights; "auto": as they are.

    Returns:
        The model in eval mode on the CPU, with tokenizer and image settings.

    Raises:
        InputError: unknown name, another kind of model, or files that cannot be used.
    """
    folder = _find_clip(str(name))
    load: Any = CLIPModel.from_pretrained  # its type hint knows nothing of loading info
    try:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != "clip":
            raise InputError(f"{name} is of model type {kind!r}; CaR works with CLIP models")
        model, report = load(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        missing = sorted(report["missing_keys"])
        if missing:
            raise InputError(f"the model {name} is damaged: {len(missing)} tensors are missing, first {missing[0]}")
        return Clip(model.eval(), _load_tokenizer(folder), _load_settings(folder, model))
    except InputError:
        raise
    except Exception as error:  # damaged files surface as nearly any exception type
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be loaded: {type(error).__name__}: {reason}") from error


def _find_clip(name: str) -> str:
    if name in OFFICIAL_MODELS:
        raise InputError(f"{name} is a TAP model; CaR works with CLIP models")
    if name == BUNDLED_CLIP and BUNDLED_CLIP not in bundled_models() and not Path(name).is_dir():
        raise InputError(
            f"{name} is not part of this version: name CLIP models of your own, or the preset 'default', "
            "which loads OpenAI's from the hub"
        )
    return resolve_model(name)


def _load_tokenizer(folder: str) -> Any:
    path = Path(folder)
    if path.is_dir() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _load_settings(folder: str, model: Any) -> CropSettings:
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError):
        return CropSettings.of_tower(model)
    return CropSettings.of_tower(model, processor)


def find_config(name: str | Path, **options: Any) -> CarConfig:
    """Settings of a preset, a folder of `save_pretrained`, or for one CLIP model that is f and g.

    Args:
        name: one of these.
        options: fields of [`CarConfig`] to change.

    Raises:
        InputError: an unknown name or option.
    """
    path = Path(name).expanduser()
    if str(name) in PRESETS:
        config = get_preset(str(name))
    elif (path / CONFIG_FILE).is_file():
        config = CarConfig.load(path)
        config = config.updated(f=_inside(path, config.f), g=_inside(path, config.g))
    else:
        try:
            _find_clip(str(name))
        except InputError as error:
            raise InputError(f"{error}; known presets: {', '.join(PRESETS)}") from None
        config = get_preset("default").updated(f=str(name), g=str(name))
    return config.updated(**options)


def _inside(folder: Path, name: str) -> str:
    return str(folder / name) if (folder / name).is_dir() else name


__all__ = ["Clip", "eager_float32", "find_config", "load_clip"]
