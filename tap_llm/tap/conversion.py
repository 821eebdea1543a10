"""Official TAP checkpoints to folders that `from_pretrained` loads, and back."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..concepts import ConceptSpace
from ..errors import InputError
from ..folders import check_free, new_folder
from .image_processing_tap import TapImageProcessor
from .modeling_tap import TapForConditionalGeneration
from .official_config import MASK_DECODER_HEAD_DIM, TEXT_HEAD_DIM, canvas_of, infer_config
from .official_keys import (
    REL_POS_INDEX,
    layout_from_official,
    layout_to_official,
    official_name,
    our_name,
)
from .processing_tap import TapProcessor
from .tokenization import load_tokenizer
from .unpickle import read_state_dict
from .vision_encoder import relative_position_index

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHOWN = 3  # names listed per kind of problem in an error


@dataclass
class ConversionReport:
    """What did not fit between a checkpoint and the model, by official names.

    Args:
        missing: tensors that the model needs and the checkpoint lacks.
        unexpected: tensors of the checkpoint that the model has no place for.
        mismatched: name, shape in the checkpoint, shape in the model.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the checkpoint fitted one-to-one."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{name} is {found} instead of {needed}" for name, found, needed in self.mismatched]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        return "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _official_layout(model: TapForConditionalGeneration) -> dict[str, Tensor]:
    """The model's tensors under official names and in the official layout."""
    text: Any = model.config.text_config
    layout = layout_to_official(model.state_dict(), text.num_attention_heads)
    names = {name: official_name(name) for name in layout}
    strangers = [name for name, official in names.items() if official is None]
    if strangers:
        raise InputError(f"official checkpoints have no place for {_some(strangers)}: export an unmodified TAP model")
    return {str(names[name]): value for name, value in layout.items()}


def _compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> ConversionReport:
    """Compare official tensors with those that the model needs."""
    report = ConversionReport()
    for name, needed in expected.items():
        if name not in state:
            if not name.endswith("num_batches_tracked"):  # released files lack these; they only count training steps
                report.missing.append(name)
        elif state[name].shape != needed.shape:
            report.mismatched.append((name, tuple(state[name].shape), tuple(needed.shape)))
    extra = [name for name in state if name not in expected and not name.startswith("pixel_")]
    report.unexpected = [name for name in extra if not REL_POS_INDEX.fullmatch(name)]
    return report


def _check_index(state: Mapping[str, Tensor], window: int) -> None:
    """Index tables are dropped; one that differs from ours would mean another order of the bias table."""
    tables = {name: value for name, value in state.items() if REL_POS_INDEX.fullmatch(name)}
    # The shape first: a window that no table of the file has could ask for any amount of memory.
    wrong = [name for name, value in tables.items() if value.shape != (window**2, window**2)]
    if tables and not wrong:
        expected = relative_position_index(window)
        wrong = [name for name, value in tables.items() if not torch.equal(value.long().cpu(), expected)]
    if wrong:
        raise InputError(f"{wrong[0]} is not TAP's table of relative positions for windows of {window}")


def _our_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], text_heads: int) -> dict[str, Tensor]:
    """Official tensors that fit, under our names and in our layout."""
    fitting = {name: state[name] for name, needed in expected.items() if _fits(state, name, needed)}
    counters = {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    renamed = {str(our_name(name)): value for name, value in {**counters, **fitting}.items()}
    return layout_from_official(renamed, text_heads)


def _fits(state: Mapping[str, Tensor], name: str, needed: Tensor) -> bool:
    return name in state and state[name].shape == needed.shape


def model_from_official(
    state_dict: Mapping[str, Tensor], strict: bool = True, dtype: str = "float32"
) -> tuple[TapForConditionalGeneration, ConversionReport]:
    """Build a model from the tensors of an official checkpoint.

    Args:
        state_dict: official names to tensors, from [`read_state_dict`].
        strict: refuse a checkpoint that does not fit one-to-one; otherwise what is missing starts at random.
        dtype: `float32`, `float16` or `bfloat16`, of the whole model; the frequencies of the prompt
            encoder alone stay in float32.

    Returns:
        The model in eval mode, and what did not fit.

    Raises:
        InputError: the checkpoint is not one of TAP or, with `strict`, does not fit; or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    config: Any = infer_config(state_dict)
    config.dtype = dtype
    with torch.device("meta"):
        expected = _official_layout(TapForConditionalGeneration(config))
    report = _compare(state_dict, expected)
    if strict and not report.fits:
        raise InputError(f"the checkpoint does not fit TAP: {report}")
    _check_index(state_dict, config.vision_config.window_size)
    with torch.device("meta" if report.fits else "cpu"):  # without gaps nothing needs initial values
        model = TapForConditionalGeneration(config)
    ours = _our_state(state_dict, expected, config.text_config.num_attention_heads)
    model.load_state_dict(ours, strict=report.fits, assign=True)
    return model.to(DTYPES[dtype]).eval(), report


def _shortest(value: float, exact: np.float32, back: int) -> float:
    """The shortest decimal near `value` whose power `back`, in 0..255, is `exact` in float32."""
    for digits in range(3, 17):
        rounded = round(value, digits)
        if rounded and np.float32((rounded * 255) ** back) == exact:
            return rounded
    return value


def image_processor_from_official(state_dict: Mapping[str, Tensor]) -> TapImageProcessor:
    """Image processor with the pixel statistics and canvas of an official checkpoint.

    Args:
        state_dict: official names to tensors; `pixel_mean` and `pixel_rsig` (1 / std) hold BGR in 0..255.

    Returns:
        The processor, with RGB in 0..1; without statistics in the checkpoint, those of the released models.

    Raises:
        InputError: not a TAP checkpoint, or statistics that are no colours.
    """
    options: dict[str, Any] = {"size": {"longest_edge": canvas_of(state_dict)}}
    statistics = (("pixel_mean", "image_mean", 1), ("pixel_rsig", "image_std", -1))
    for official, ours, power in statistics:
        if official in state_dict:
            values = state_dict[official].float().flip(0).numpy()
            if values.shape != (3,) or not np.all(np.isfinite(values)) or np.any(values <= 0):
                raise InputError(f"{official} must be three positive numbers, got {values.tolist()}")
            options[ours] = [_shortest(float(value) ** power / 255, value, power) for value in values]
    return TapImageProcessor(**options)


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    concepts: str | Path | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = True,
    dtype: str = "float32",
) -> ConversionReport:
    """Convert an official checkpoint to a folder for `from_pretrained` of model, processor and concepts.

    The folder appears only when it is complete.

    Args:
        checkpoint: `.pkl`, `.pth` or `.safetensors` with official names.
        output_dir: the new folder; may exist if it is empty.
        concepts: a concept file (`.pkl`) or folder to put in; none if None.
        tokenizer: the SentencePiece model of the caption decoder, or a tokenizer folder; no captions if None.
        strict: refuse a checkpoint that does not fit one-to-one.
        dtype: `float32`, `float16` or `bfloat16`.

    Returns:
        What did not fit; empty with `strict`.

    Raises:
        InputError: any of the files cannot be used, or the folder is not empty.
        MissingFileError: any of the files is not there.
    """
    output = Path(output_dir).absolute()
    check_free(output)
    state = read_state_dict(checkpoint)
    try:
        model, report = model_from_official(state, strict, dtype)
        image_processor = image_processor_from_official(state)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    config: Any = model.config
    words = load_tokenizer(tokenizer, config.text_config.vocab_size) if tokenizer is not None else None
    space = ConceptSpace.from_pretrained(concepts) if concepts is not None else None
    if space is not None:
        space.check_width(config.mask_decoder_config.semantic_embed_dim)
    with new_folder(output) as folder:
        if space is not None:
            space.save_pretrained(folder)
        TapProcessor(image_processor, words).save_pretrained(folder)
        model.save_pretrained(folder)
    return report


def _pixel_statistics(image_processor: TapImageProcessor) -> dict[str, np.ndarray]:
    mean, std = (
        np.asarray(values, dtype=np.float64) for values in (image_processor.image_mean, image_processor.image_std)
    )
    scale = 1 / image_processor.rescale_factor
    return {
        "pixel_mean": (mean[::-1] * scale).astype(np.float32),
        "pixel_rsig": (1 / (std[::-1] * scale)).astype(np.float32),
    }


def _to_numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def export_official(
    model: TapForConditionalGeneration, image_processor: TapImageProcessor
) -> OrderedDict[str, np.ndarray]:
    """A model as an official checkpoint; the inverse of [`model_from_official`], bit by bit.

    Args:
        model: the model.
        image_processor: its image processor, for the pixel statistics.

    Returns:
        Official names to arrays, in the dtype of the model (bfloat16, which NumPy lacks, becomes float32).

    Raises:
        InputError: the model has parts or head sizes that official checkpoints cannot express.
    """
    config: Any = model.config
    decoder, text = config.mask_decoder_config, config.text_config
    dims = {"mask decoder": (decoder, MASK_DECODER_HEAD_DIM), "caption decoder": (text, TEXT_HEAD_DIM)}
    for part, (sizes, head_dim) in dims.items():
        if sizes.hidden_size != sizes.num_attention_heads * head_dim:
            found = sizes.hidden_size // sizes.num_attention_heads
            raise InputError(f"official checkpoints need heads of {head_dim} channels in the {part}, not {found}")
    if model.model.vision_encoder.batch_norm_folded:
        raise InputError("this model's BatchNorm was folded for inference: load it again to export it")
    result = OrderedDict(_pixel_statistics(image_processor))
    index = relative_position_index(config.vision_config.window_size).numpy()
    for name, value in _official_layout(model).items():
        result[name] = _to_numpy(value)
        if name.endswith("rel_pos_embed.weight"):
            # A copy each: pickle would store a shared array once, and the file would look like a bomb.
            result[name.replace(".weight", ".index")] = index.copy()
    return result


def save_official(model: TapForConditionalGeneration, image_processor: TapImageProcessor, path: str | Path) -> None:
    """Write a model as an official checkpoint: a pickled OrderedDict of NumPy arrays.

    Args:
        model: the model.
        image_processor: its image processor.
        path: the `.pkl` file; replaced if it exists, and only when the new one is complete.

    Raises:
        InputError: see [`export_official`].
    """
    path = Path(path)
    content = export_official(model, image_processor)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            pickle.dump(content, file, protocol=4)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = [
    "ConversionReport",
    "convert_checkpoint",
    "export_official",
    "image_processor_from_official",
    "infer_config",
    "model_from_official",
    "save_official",
]
