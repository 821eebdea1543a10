"""From names that a person types to a loaded model: weights, processor, concepts, device, dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .concepts import ConceptSpace
from .errors import InputError, MissingFileError
from .hub import OFFICIAL_MODELS, resolve_model
from .tap.configuration_tap import TapConfig
from .tap.modeling_tap import TapForConditionalGeneration
from .tap.processing_tap import TapProcessor
from .tap.tokenization import load_tokenizer

Concepts = ConceptSpace | str | Path


def load_tap(
    name: str | Path,
    tokenizer: str | Path | None = None,
    concepts: Concepts | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[TapForConditionalGeneration, TapProcessor, ConceptSpace | None]:
    """Load all that describes regions.

    Args:
        name: bundled name, folder, hub id, or official name such as `tap_vit_b_v1_1`.
        tokenizer: SentencePiece file or tokenizer folder in place of the model's own.
        concepts: a concept space, or the file, folder, hub id or official name of one, in place of the model's own.
        dtype: see [`parse_dtype`].

    Returns:
        Model in eval mode on the CPU, processor, and concept space (None where there is none).

    Raises:
        InputError: unknown name, not a TAP model, or files that cannot be used.
        MissingFileError: a file is not there.
    """
    weights_dtype = parse_dtype(dtype)
    official = str(name) in OFFICIAL_MODELS
    own = {"tokenizer": tokenizer, "concepts": None if isinstance(concepts, ConceptSpace) else concepts}
    folder = resolve_model(name, **(own if official else {}))
    model = _load_weights(folder, weights_dtype)
    processor = TapProcessor.from_pretrained(folder)
    if tokenizer is not None and not official:
        text: Any = model.config.text_config
        words = load_tokenizer(tokenizer, text.vocab_size)
        processor = TapProcessor(processor.image_processor, words)
    separate = concepts if isinstance(concepts, ConceptSpace) or not official else None
    return model, processor, load_concepts(separate, folder)


def _load_weights(folder: str, dtype: str | torch.dtype) -> TapForConditionalGeneration:
    """The model of a folder or hub id, only if every tensor is there."""
    load: Any = TapForConditionalGeneration.from_pretrained  # its type hint knows nothing of loading info
    try:
        kind = TapConfig.get_config_dict(folder)[0].get("model_type")
        if kind != TapConfig.model_type:
            raise InputError(f"{folder} is not a TAP model: its config says model_type {kind!r}")
        model, report = load(folder, dtype=dtype, output_loading_info=True)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load the model {folder}: {' '.join(str(error).split())}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"the model {folder} is incomplete: {len(missing)} tensors are missing, first {missing[0]}")
    return model.eval()


def load_concepts(concepts: Concepts | None, folder: str) -> ConceptSpace | None:
    """The space given, or else that of the model's folder; None where that has none.

    Raises:
        InputError: the files cannot be used.
        MissingFileError: the given ones are not there.
    """
    if isinstance(concepts, ConceptSpace):
        return concepts
    if concepts is not None:
        return ConceptSpace.from_pretrained(concepts)
    try:
        return ConceptSpace.from_pretrained(folder) if folder else None
    except MissingFileError:
        return None


def parse_device(device: str | int | torch.device | None) -> torch.device | None:
    """A torch device that works on this machine; None stays None.

    Raises:
        InputError: not a device, or not here.
    """
    if device is None:
        return None
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'device "{device}" cannot be used here ({reason}); try "cpu"') from error
    return parsed


def parse_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """A floating-point dtype; "auto" and None mean that of the weights, "auto".

    Raises:
        InputError: unknown name.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    parsed = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise InputError(f'dtype "{dtype}" cannot be used: choose auto, float32, bfloat16 or float16')
    return parsed


__all__ = ["load_concepts", "load_tap", "parse_device", "parse_dtype"]
