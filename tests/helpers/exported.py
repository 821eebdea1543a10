"""The bundled model as ONNX: exporting takes half a minute, so that all tests share one folder."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils import logging

from tap_llm import cli

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@dataclass(frozen=True)
class Exported:
    """What `tap-llm export` wrote and said; the folder is not to be changed."""

    folder: Path
    status: int
    printed: str
    noted: str
    _keeps: Any  # the temporary folder goes when this goes


@cache
def exported() -> Exported:
    """`tap-llm export` of tap-tiny, run once."""
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name) / "tap-onnx"
    printed, noted = io.StringIO(), io.StringIO()
    level = logging.get_verbosity()
    with redirect_stdout(printed), redirect_stderr(noted):
        status = cli.main(["export", str(folder)])
    logging.set_verbosity(level)
    logging.enable_progress_bar()
    return Exported(folder, status, printed.getvalue(), noted.getvalue(), temporary)


def run(path: Path, **inputs: Any) -> dict[str, np.ndarray]:
    """Outputs of a file by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    arrays = session.run(None, {name: np.asarray(value) for name, value in inputs.items()})
    return {output.name: array for output, array in zip(session.get_outputs(), arrays, strict=True)}
