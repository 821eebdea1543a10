"""From names that a person types to a loaded model: weights, processor, concepts, device, dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .concepts import ConceptSpace, NoConceptsError
from .errors import InputError
from .hub import OFFICIAL_MODELS, resolve_model
from .tap.configuration_tap import TapConfig
from .tap.image_processing_tap import TapImageProcessor
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
    model, processor = _load_folder(folder, weights_dtype)
    if tokenizer is not None and not official:
        text: Any = model.config.text_config
        words = load_tokenizer(tokenizer, text.vocab_size)
        processor = TapProcessor(processor.image_processor, words)
    separate = concepts if isinstance(concepts, ConceptSpace) or not official else None
    return model, processor, load_concepts(separate, folder)


def _load_folder(folder: str, dtype: str | torch.dtype) -> tuple[TapForConditionalGeneration, TapProcessor]:
    """Model and processor of a folder or hub id, only if they are complete and fit together."""
    load: Any = TapForConditionalGeneration.from_pretrained  # its type hint knows nothing of loading info
    try:
        kind = TapConfig.get_config_dict(folder)[0].get("model_type")
        if kind != TapConfig.model_type:
            raise InputError(f"{folder} is not a TAP model: its config says model_type {kind!r}")
        model, report = load(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        _check_report(folder, report)
        processor = TapProcessor.from_pretrained(folder, trust_remote_code=False)
        _check_processor(folder, processor, model.config.vision_config.image_size)
    except InputError:
        raise
    except Exception as error:  # damaged files surface as nearly any exception type
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    return model.eval(), processor


def _check_report(folder: str, report: dict[str, Any]) -> None:
    """Every tensor has its place, and every place its tensor."""
    for kind, problem in (("missing_keys", "missing"), ("unexpected_keys", "more than its config tells of")):
        names = sorted(report[kind])
        if names:
            raise InputError(f"the model {folder} is damaged: {len(names)} tensors are {problem}, first {names[0]}")


def _check_processor(folder: str, processor: TapProcessor, side: int) -> None:
    """A trial run: whatever is wrong with its settings shows before the first photo."""
    found = type(processor.image_processor).__name__
    if not isinstance(processor.image_processor, TapImageProcessor):
        raise InputError(f"{folder} cannot be loaded: its image processor is a {found}, not a TapImageProcessor")
    pixels = processor(Image.new("RGB", (1, 1)))["pixel_values"]
    if pixels.shape != (1, 3, side, side) or not torch.isfinite(pixels).all():
        shape = "x".join(map(str, pixels.shape[1:]))
        raise InputError(
            f"{folder} cannot be loaded: its processor_config.json does not fit the model: "
            f"it makes {shape} pixel values, the model needs finite ones of 3x{side}x{side}"
        )


def load_concepts(concepts: Concepts | None, folder: str) -> ConceptSpace | None:
    """The space given, or else that of the model's folder or hub id; None where that has no concept files.

    Raises:
        InputError: the files cannot be used, or the hub cannot be reached.
        MissingFileError: the given ones are not there.
    """
    if isinstance(concepts, ConceptSpace):
        return concepts
    if concepts is not None:
        return ConceptSpace.from_pretrained(concepts)
    try:
        return ConceptSpace.from_pretrained(folder) if folder else None
    except NoConceptsError:
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
