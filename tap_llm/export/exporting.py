"""A whole model as a folder that needs no torch: graphs, concepts, tokenizer, and what is to be known about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..concepts import ConceptSpace
from ..errors import InputError
from ..folders import check_free, new_folder
from ..loading import Concepts, load_tap
from ..tap.modeling_tap import TapForConditionalGeneration
from ..tap.processing_tap import TapProcessor
from .checking import Checker
from .graphs import GRAPHS, graphs_of
from .manifest import CONCEPTS_FILE, MANIFEST_FILE, TOKENIZER_FILE, describe_export, describe_graph
from .writing import require_extra, write_graph

_OUR_FILES = {
    MANIFEST_FILE, CONCEPTS_FILE, TOKENIZER_FILE,
    *(f"{name}{suffix}" for name in GRAPHS for suffix in (".onnx", ".onnx.data")),
}  # fmt: skip


def export_onnx(
    name: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    concepts: Concepts | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Write a model as ONNX, check every file against torch, and only then put the folder in its place.

    Args:
        name: bundled name, folder, hub id, or official name of a TAP.
        out: folder to write.
        tokenizer: SentencePiece file or tokenizer folder, where the model comes without.
        concepts: in place of the model's own; see [`load_tap`].
        overwrite: replace an earlier export.
        progress: is told what happens next.

    Returns:
        What `export.json` says.

    Raises:
        InputError: a package of the extra `export` is not installed, the model cannot be used, `out` is taken, or
            a written file does not compute what torch computes. Nothing is left behind.
    """
    out = Path(out)
    check_target(out, overwrite)
    require_extra()
    model, processor, space = load_tap(name, tokenizer, concepts, "float32")
    about = describe_export(name, model, processor, space is not None)
    with new_folder(out) as folder:
        about["graphs"] = _write_graphs(model, folder, progress)
        _write_words(processor, space, folder)
        text = json.dumps(about, ensure_ascii=False, indent=1)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        if overwrite and out.exists():
            out.replace(folder.with_name("replaced"))  # goes with the temporary folder
    return about


def check_target(out: Path, overwrite: bool) -> None:
    """Raise [`InputError`] where something else than an earlier export would be overwritten."""
    if not overwrite or not out.is_dir():
        return check_free(out)
    strangers = sorted(path.name for path in out.iterdir() if path.name not in _OUR_FILES)
    if strangers:
        raise InputError(
            f"overwrite replaces earlier exports only, and {out} also holds {strangers[0]}; choose another output"
        )
    return None


def _write_graphs(
    model: TapForConditionalGeneration, folder: Path, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Write all graphs, then check all; what `export.json` says about each."""
    graphs = graphs_of(model)
    model.set_attn_implementation("eager")
    for graph in graphs:
        progress(f"writing {graph.name}.onnx")
        write_graph(graph, folder / f"{graph.name}.onnx")
    model.set_attn_implementation("sdpa")  # compared with the model as everybody runs it
    checker, described = Checker(model), {}
    for graph in graphs:
        progress(f"checking {graph.name}.onnx against torch")
        path = folder / f"{graph.name}.onnx"
        described[graph.name] = describe_graph(graph, path, checker.check(graph.name, path))
    return described


def _write_words(processor: TapProcessor, space: ConceptSpace | None, folder: Path) -> None:
    """Concepts as arrays `weights` (E, K) float32 and `names` (K,), and the tokenizer."""
    if space is not None:
        np.savez(folder / CONCEPTS_FILE, weights=space.weights.numpy(), names=np.array(space.names))
    if processor.tokenizer is not None:
        backend: Any = processor.tokenizer.backend_tokenizer
        backend.save(str(folder / TOKENIZER_FILE))


__all__ = ["check_target", "export_onnx"]
