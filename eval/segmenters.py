"""Models that turn words into masks: what they are asked for, and CaR as one of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from tap_llm.clip_as_rnn import CarImage, CarPipeline
from tap_llm.clip_as_rnn.configuration_car import Refine
from tap_llm.errors import InputError
from tap_llm.pipelines import DEFAULT_MODEL

from .base import describe_modules
from .command import common_arguments
from .overlap import Mask

LabelMap = NDArray[np.int32]
_REFINE: tuple[Refine, ...] = ("none", "crf", "tap")
_NAMES = ("f", "g", "g_batch")  # what the description of the model holds, or changes nothing


class Segmenter(Protocol):
    """Finds classes by their names."""

    def settings(self) -> dict[str, Any]:
        """What decides its answers, beside the weights."""
        ...

    def segment(self, image: Image.Image, class_names: Sequence[str]) -> LabelMap:
        """(H, W): 0 for none of the classes, else 1 + the index of the class."""
        ...


class Referrer(Protocol):
    """Finds what expressions mean."""

    def settings(self) -> dict[str, Any]:
        """What decides its answers, beside the weights."""
        ...

    def refer(self, image: Image.Image, expressions: Sequence[Sequence[str]]) -> list[Mask]:
        """One (H, W) mask for each list of expressions that mean the same object."""
        ...


class CarSegmenter:
    """CaR as [`Segmenter`] and [`Referrer`].

    Args:
        car: the model with its settings.
    """

    def __init__(self, car: CarPipeline) -> None:
        self.car = car

    def settings(self) -> dict[str, Any]:
        """Those of CaR that decide what it finds."""
        return {name: value for name, value in asdict(self.car.config).items() if name not in _NAMES}

    def segment(self, image: Image.Image, class_names: Sequence[str]) -> LabelMap:
        """All classes compete."""
        return self.car(image, class_names, mode="semantic", progress=False).label_map

    def refer(self, image: Image.Image, expressions: Sequence[Sequence[str]]) -> list[Mask]:
        """Each list is asked alone and merged; the picture is encoded once."""
        encoded = self.car.encode(image)
        return [self._merged(encoded, texts) for texts in expressions]

    def _merged(self, encoded: CarImage, texts: Sequence[str]) -> Mask:
        found = self.car(encoded, texts, mode="referring", progress=False).merged_mask
        return np.zeros(encoded.size, dtype=bool) if found is None else found


# The command


def car_arguments(parser: argparse.ArgumentParser, refine: Refine = "crf") -> None:
    """Add --model, --f, --g, --refine, --tap, --set and what all commands have."""
    common_arguments(
        parser, model="tiny", model_help="preset of CaR (tiny, voc, refcoco, …), folder, or a CLIP model",
        batch="prompted pictures judged at once", pipeline=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--f", metavar="NAME", help="CLIP that proposes, in place of the preset's")
    add("--g", metavar="NAME", help="CLIP that judges, in place of the preset's")
    add("--refine", choices=_REFINE, default=refine, help=f"edges by none, by the CRF, or by CRF and TAP [{refine}]")
    add("--tap", default=DEFAULT_MODEL, metavar="NAME", help=f"model for --refine tap [{DEFAULT_MODEL}]")
    add(
        "--set", nargs="+", action="extend", type=_setting, default=[], metavar="NAME=VALUE", dest="changes",
        help="other settings of CaR, such as keep_threshold=0.4",
    )  # fmt: skip


def _setting(text: str) -> tuple[str, Any]:
    """A setting of `CarConfig`, such as keep_threshold=0.4."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE, such as keep_threshold=0.4")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text}: the value cannot be read; quote it as in YAML") from None


def load_car(args: argparse.Namespace) -> CarPipeline:
    """CaR as the command line wants it.

    Raises:
        InputError: a model or setting that cannot be used.
    """
    named = {"f": args.f, "g": args.g}
    changes = {name: value for name, value in named.items() if value is not None} | dict(args.changes)
    changes.setdefault("g_batch", args.batch_size)
    if "refine" in changes:
        raise InputError("--set refine=…: use --refine")
    return CarPipeline.from_pretrained(args.model, args.device, args.dtype, tap=args.tap, refine=args.refine, **changes)


def describe_car(car: CarPipeline, name: str, tap: bool | None = None) -> dict[str, Any]:
    """What identifies the models in a results file.

    Args:
        car: the models.
        name: as the user gave it.
        tap: whether TAP takes part; by default what the settings say.
    """
    with_tap = car.config.refine == "tap" if tap is None else tap
    first, second = car.clips
    clips = [car.g] if first.model is second.model else [car.f, car.g]
    return describe_modules(name, *clips, *([car.tap.model] if with_tap else []))
