"""From a graph to an ONNX file, with torch's exporter."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .graphs import Graph

OPSET = 20  # torch's default; the first with GELU as one operator
_EXTRA = ("onnx", "onnxscript", "onnxruntime")


def require_extra() -> None:
    """Raise [`InputError`] unless all that exporting and checking needs is installed."""
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"export needs {name} ({error}): pip install 'tap-llm[export]'") from None


@torch.no_grad()
def write_graph(graph: Graph, path: Path) -> None:
    """Trace a graph and write it; weights above 1.5 GB lie beside it, in `<name>.onnx.data`.

    Args:
        graph: its module must use eager attention; others branch on lengths, which a file cannot.
        path: the file.

    Raises:
        InputError: torch cannot trace or translate it.
        OSError: the file cannot be written.
    """
    lengths = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in graph.axes.items()}
    try:
        with _silence():
            # Strict: the other way of tracing takes the result of len() for a constant.
            program = torch.export.export(
                graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=lengths, strict=True
            )
            onnx_program: Any = torch.onnx.export(
                program,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=graph.axes,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # the exporter lets nearly any exception type through
        reason = " ".join(str(error).split())
        raise InputError(
            f"torch {torch.__version__} cannot export {graph.name}: {type(error).__name__}: {reason}"
        ) from error
    onnx_program.save(path)


@contextmanager
def _silence() -> Iterator[None]:
    """Without the exporter's remarks on missing torchvision and on its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


__all__ = ["OPSET", "require_extra", "write_graph"]
