"""Do the written files compute what torch computes? Each is run with onnxruntime on several sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..errors import InputError
from ..regions import BOTTOM_RIGHT, FOREGROUND, PAD, TOP_LEFT
from ..tap.modeling_tap import TapForConditionalGeneration
from ..tap.outputs import take_slots
from .graphs import CAPTION_STEP, IMAGE_ENCODER, REGION_DECODER, REGION_OUTPUTS

TOLERANCE = 1e-3  # absolute and relative

IMAGE_BATCHES = (1, 3)
REGION_SIZES = ((1, 1, 3), (2, 7, 9), (1, 7, 3), (2, 1, 9))  # images, regions, points
CAPTION_REGIONS = (1, 7)
CAPTION_STEPS = ((0, 2), (2, 3), (3, 4), (4, 9), (0, 9))  # ids in the cache before and after a step

Tensors = dict[str, Tensor]
Cases = Iterator[tuple[Tensors, Tensors]]


class Checker:
    """Runs files against a model.

    Args:
        model: in float32, on the CPU; any attention.
    """

    def __init__(self, model: TapForConditionalGeneration) -> None:
        self.model = model
        self._generator = torch.Generator().manual_seed(0)
        self._cases = {
            IMAGE_ENCODER: self._image_cases,
            REGION_DECODER: self._region_cases,
            CAPTION_STEP: self._caption_cases,
        }

    @torch.no_grad()
    def check(self, name: str, path: Path) -> dict[str, float]:
        """Compare one file with the model.

        Args:
            name: of the graph.
            path: of the file.

        Returns:
            Largest absolute difference of each output; of `slots` that of the predicted IoU of the chosen masks.

        Raises:
            InputError: the file does not run, or an output differs by more than `TOLERANCE`.
        """
        session, largest = _open(path), dict[str, float]()
        for inputs, expected in self._cases[name]():
            sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in inputs.items())
            where = f"{path.name}, on {sizes}"
            for key, (ours, theirs) in _paired(_run(session, inputs, where), expected).items():
                difference = _difference(ours, theirs, f"{key} of {where}")
                largest[key] = max(largest.get(key, 0.0), difference)
        return largest

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _image_cases(self) -> Cases:
        vision = self.model.config.vision_config
        for batch in IMAGE_BATCHES:
            pixels = self._normal(batch, vision.num_channels, vision.image_size, vision.image_size)
            yield {"pixel_values": pixels}, {"image_embeddings": self.model.get_image_embeddings(pixels)}

    def _region_cases(self) -> Cases:
        vision = self.model.config.vision_config
        pixels = self._normal(2, vision.num_channels, vision.image_size, vision.image_size)
        embeddings = self.model.get_image_embeddings(pixels)
        for images, regions, points in REGION_SIZES:
            inputs = {
                "image_embeddings": embeddings[:images],
                "input_points": torch.rand(regions, points, 2, generator=self._generator) * vision.image_size,
                "input_labels": prompt_labels(regions, points),
                "region_image_index": (torch.arange(regions) + 1) % images,
            }
            outputs = self.model.model(**inputs)
            yield inputs, {name: outputs[name] for name in REGION_OUTPUTS}

    def _caption_cases(self) -> Cases:
        text = self.model.config.text_config
        length = max(stop for _, stop in CAPTION_STEPS)
        for regions in CAPTION_REGIONS:
            tokens = self._normal(regions, text.semantic_size)
            ids = torch.randint(text.vocab_size, (regions, length), generator=self._generator)
            cache = DynamicCache(config=text)
            logits = self.model.caption_decoder(ids, tokens, past_key_values=cache, use_cache=True).logits
            keys, values = (torch.stack([getattr(layer, key) for layer in cache.layers]) for key in ("keys", "values"))
            for start, stop in CAPTION_STEPS:
                inputs = {
                    "semantic_tokens": tokens,
                    "input_ids": ids[:, start:stop],
                    "past_keys": keys[:, :, :, :start],
                    "past_values": values[:, :, :, :start],
                }
                after = {"keys": keys[:, :, :, :stop], "values": values[:, :, :, :stop]}
                yield inputs, {"logits": logits[:, stop - 1], **after}


def prompt_labels(regions: int, points: int) -> Tensor:
    """(N, n) labels, n >= 3: by turns box and points, points and TAP's pad, box and pads that only fill up."""
    labels = torch.full((regions, points), FOREGROUND)
    labels[0::3, :2] = labels[2::3, :2] = torch.tensor([TOP_LEFT, BOTTOM_RIGHT])
    labels[1::3, -1] = PAD
    labels[2::3, 2:] = PAD
    return labels


def _open(path: Path) -> Any:
    """A session on as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    with _failing_check(path.name):
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Tensors, where: str) -> Tensors:
    """Outputs by name."""
    with _failing_check(where):
        arrays = session.run(None, {name: value.contiguous().numpy() for name, value in inputs.items()})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(names, arrays, strict=True)}


@contextmanager
def _failing_check(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise InputError(f"the check failed: {where} does not run: {' '.join(str(error).split())}") from error


def _paired(ours: Tensors, expected: Tensors) -> dict[str, Any]:
    """Pairs to compare. Of two slots with nearly the same score either may be chosen: their scores count."""
    if "slots" in expected and ours["slots"].shape == expected["slots"].shape:
        scores = expected["iou_scores"]
        ours, expected = ({**side, "slots": take_slots(scores, side["slots"])} for side in (ours, expected))
    return {name: (ours[name], value) for name, value in expected.items()}


def _difference(ours: Tensor, expected: Tensor, where: str) -> float:
    if ours.shape != expected.shape:
        raise InputError(f"the check failed: {where} is {tuple(ours.shape)}, not {tuple(expected.shape)}")
    apart = (ours - expected).abs()
    if not (apart <= TOLERANCE * (1 + expected.abs())).all():  # so that NaN fails too
        raise InputError(f"the check failed: {where} differs from torch by {float(apart.max()):.2g}")
    return float(apart.max())


__all__ = ["TOLERANCE", "Checker", "prompt_labels"]
