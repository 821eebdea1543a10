"""CLIP as zero-shot classification and retrieval use it: whole pictures and texts as unit vectors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tap_llm.clip_as_rnn import Clip
from tap_llm.clip_as_rnn.classifier import embed_pictures
from tap_llm.clip_as_rnn.configuration_car import Resize
from tap_llm.clip_as_rnn.loading import load_clip
from tap_llm.clip_as_rnn.text import TextEncoder
from tap_llm.errors import InputError
from tap_llm.loading import parse_device, parse_dtype

from .base import describe_modules
from .command import common_arguments

BUNDLED = "tap-tiny-clip"
_RESIZE: tuple[Resize, ...] = ("crop", "squash")


class ClipEncoder:
    """Embeds pictures and texts.

    Args:
        clip: any `CLIPModel` with its tokenizer.
        resize: "crop": the shortest side to the model's, then its centre, as CLIP does; "squash": all of it, distorted.
        batch_size: pictures, and texts, embedded at once.

    Raises:
        InputError: there is no tokenizer.
    """

    def __init__(self, clip: Clip, resize: Resize = "crop", batch_size: int = 64) -> None:
        if clip.tokenizer is None:
            raise InputError("the CLIP model comes without a tokenizer, so that texts cannot be embedded")
        self.clip, self.resize, self.batch_size = clip, resize, batch_size
        self._texts = TextEncoder(clip.model, clip.tokenizer, batch_size)

    def settings(self) -> dict[str, Any]:
        """How pictures are resized."""
        return {"resize": self.resize}

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, E) float32 unit vectors on the CPU."""
        if not images:
            return torch.zeros(0, self.clip.model.config.projection_dim)
        pixels = (np.asarray(image) for image in images)
        embedded: Tensor = embed_pictures(self.clip.model, self.clip.settings, pixels, self.batch_size, self.resize)
        return embedded.float().cpu()

    def texts(self, texts: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """(N, E) float32 unit vectors on the CPU: the mean over templates of what each gives, made unit again."""
        return self._texts.embed_mean(list(texts), list(templates)).float().cpu()


# The command


def clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --resize and what all commands have."""
    common_arguments(
        parser, model=BUNDLED, model_help="CLIP of Transformers: folder, hub id or bundled name",
        batch="pictures embedded at once", pipeline=False,
    )  # fmt: skip
    parser.add_argument("--resize", choices=_RESIZE, default="crop", help="centre of the picture, or all of it [crop]")


def load_encoder(args: argparse.Namespace) -> tuple[ClipEncoder, dict[str, Any]]:
    """The model of the command line, and its description.

    Raises:
        InputError: it cannot be used.
    """
    device = parse_device(args.device) or torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = torch.float32 if args.dtype is None and device.type == "cpu" else parse_dtype(args.dtype)
    clip = load_clip(args.model, dtype)
    clip.model.to(device)
    return ClipEncoder(clip, args.resize, args.batch_size), describe_modules(args.model, clip.model)
