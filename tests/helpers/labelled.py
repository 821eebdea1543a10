"""Pictures and label maps of a few pixels, and a segmenter that reads its answer from the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.base import Benchmark, Run, run

MODEL = {"name": "made up", "sha256": "1", "device": "cpu"}


class RedChannel:
    """A segmenter whose answer is the red channel of the picture; 200 makes an answer of another size."""

    def settings(self) -> dict[str, Any]:
        return {"channel": "red"}

    def segment(self, image: Image.Image, class_names: Sequence[str]) -> np.ndarray:
        labels = np.asarray(image)[..., 0].astype(np.int32)
        return labels[:, :1] if (labels == 200).any() else labels


def write_answer(path: Path, labels: Any) -> None:
    """A picture that `RedChannel` answers with these labels."""
    red = np.asarray(labels, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([red, 0 * red, 0 * red], axis=2)).save(path)


def write_labels(path: Path, labels: Any, palette: bool = False) -> None:
    """A label map of grey values or palette indices; of 16 bits where the values need it."""
    values = np.asarray(labels)
    image = Image.fromarray(values.astype(np.uint8 if values.max() < 256 else np.uint16))
    if palette:
        image = Image.fromarray(values.astype(np.uint8), mode="P")
        image.putpalette([channel for index in range(256) for channel in (index, 255 - index, 7)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def run_quietly(benchmark: Benchmark, out: Path, batch_size: int = 1, **options: Any) -> Run:
    """A whole run without a word."""
    finished = run(benchmark, out, MODEL, report=lambda line: None, progress=False, batch_size=batch_size, **options)
    assert finished is not None
    return finished
