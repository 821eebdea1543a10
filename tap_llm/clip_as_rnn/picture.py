"""A picture as CaR works with it: encoded once, asked any number of times."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..masks import BoolArray
from .cam import PatchFeatures
from .configuration_car import CarConfig, Prompt
from .visual_prompts import Pixels, PromptPainter


@dataclass(eq=False)
class CarImage:
    """A picture after f, with all that g has seen of it so far.

    Attributes:
        image: upright RGB picture.
        pixels: (h, w, 3) uint8, what prompts are drawn on: the picture, shrunk to `CarConfig.max_side`.
        features: of f.
        owner: the model that it belongs to.
        source: what was encoded; TAP's `EncodedImage` is reused.
        embeddings: unit image embeddings of g by what it was shown.
    """

    image: Image.Image
    pixels: Pixels
    features: PatchFeatures
    owner: Any = field(repr=False)
    source: Any = field(default=None, repr=False)
    embeddings: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _painters: dict[Any, PromptPainter] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        return self.image.height, self.image.width

    def painter(self, prompts: tuple[Prompt, ...], config: CarConfig) -> PromptPainter:
        """The painter of some visual prompts; made once."""
        key = (prompts, config.compat.gray_weights)
        if key not in self._painters:
            self._painters[key] = PromptPainter(self.pixels, *key)
        return self._painters[key]


def shrunk_pixels(image: Image.Image, max_side: int) -> Pixels:
    """(h, w, 3) uint8 of a picture, at most `max_side` on its long side."""
    shrink = min(1.0, max_side / max(image.size))
    width, height = (max(1, round(side * shrink)) for side in image.size)
    return np.asarray(image if shrink == 1 else image.resize((width, height), Image.Resampling.BICUBIC))


def is_one_colour(image: Image.Image, min_contrast: float) -> bool:
    """Whether the values of every colour channel (0..255) differ by less than `min_contrast`."""
    channels: Any = image.getextrema()  # of an RGB picture one pair per channel
    return all(high - low < min_contrast for low, high in channels)


def view_key(mask: BoolArray, prompts: tuple[Prompt, ...], config: CarConfig) -> Any:
    """Equal for masks, prompts and settings that show g the same."""
    if not mask.any():
        prompts = ()
    digest = blake2b(np.packbits(mask).tobytes(), digest_size=16).digest() if prompts else b""
    compat = config.compat
    return digest, frozenset(prompts), config.g_resize, compat.gray_weights, compat.g_skip_last_block


__all__ = ["CarImage", "is_one_colour", "shrunk_pixels", "view_key"]
