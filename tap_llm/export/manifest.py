"""`export.json`: all that a program needs to know to run the files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..tap.image_processing_tap import canvas_side
from ..tap.modeling_tap import TapForConditionalGeneration
from ..tap.processing_tap import TapProcessor
from .graphs import Graph, cache_shape
from .writing import OPSET

FORMAT = 1
MANIFEST_FILE, CONCEPTS_FILE, TOKENIZER_FILE = "export.json", "concepts.npz", "tokenizer.json"


def describe_export(
    name: str | Path, model: TapForConditionalGeneration, processor: TapProcessor, has_concepts: bool
) -> dict[str, Any]:
    """What belongs to the export as a whole.

    Args:
        name: of the model, as the user gave it; of a folder only the last part is told.
        model: in float32.
        processor: its processor.
        has_concepts: whether there is a concept space.

    Returns:
        JSON-ready dict; the files are described by [`describe_graph`].
    """
    from .. import __version__

    return {
        "format": FORMAT,
        "source": {"model": Path(name).name, "sha256": hash_weights(model)},
        "made_with": {"tap_llm": __version__, "torch": torch.__version__, "opset": OPSET},
        "dtype": "float32",
        "image": _image(processor),
        "captions": _captions(model),
        "concepts": CONCEPTS_FILE if has_concepts else None,
        "tokenizer": TOKENIZER_FILE if processor.tokenizer is not None else None,
    }


def describe_graph(graph: Graph, path: Path, differences: dict[str, float]) -> dict[str, Any]:
    """Inputs and outputs of a written file: lengths as numbers, those that are free by name.

    Args:
        graph: what was written.
        path: the file.
        differences: largest difference from torch of each output.
    """
    import onnx

    written = onnx.load(path, load_external_data=False).graph
    return {
        "file": path.name,
        "inputs": {value.name: _tensor_type(value) for value in written.input},
        "outputs": {value.name: _tensor_type(value) for value in written.output},
        "largest_difference": {name: float(f"{differences[name]:.2g}") for name in graph.outputs},
    }


def hash_weights(model: TapForConditionalGeneration) -> str:
    """SHA-256 of names and values of all tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _image(processor: TapProcessor) -> dict[str, Any]:
    """Sizes and colours: longest side to `size`, the rest of the square filled, scaled to 0..1, normalised."""
    settings: Any = processor.image_processor
    mean = [float(value) for value in settings.image_mean]
    fill = np.floor(np.array(mean) / settings.rescale_factor + 1e-6).astype(int)
    return {
        "size": canvas_side(settings),
        "resample": "bilinear",
        "fill": fill.tolist(),
        "mean": mean,
        "std": [float(value) for value in settings.image_std],
    }


def _captions(model: TapForConditionalGeneration) -> dict[str, Any]:
    """What the greedy loop needs: ids, longest caption, and the shape of an empty cache for one region."""
    text = model.config.text_config
    settings = model._caption_config(None, {})
    eos = settings.eos_token_id
    longest = settings.max_new_tokens or settings.max_length - 2  # placeholder and BOS count for the latter
    return {
        "prompt": [text.semantic_token_id, text.bos_token_id],
        "eos": eos if isinstance(eos, list) else [eos],
        "suppressed": settings.suppress_tokens,
        "max_new_tokens": longest,
        "empty_cache": list(cache_shape(model, 1, 0)),
    }


def _tensor_type(value: Any) -> dict[str, Any]:
    import onnx

    kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    axes = value.type.tensor_type.shape.dim
    return {"dtype": str(kind), "shape": [axis.dim_param or axis.dim_value for axis in axes]}


__all__ = ["CONCEPTS_FILE", "MANIFEST_FILE", "TOKENIZER_FILE", "describe_export", "describe_graph"]
