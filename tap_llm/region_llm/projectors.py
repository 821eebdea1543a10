"""Projectors: TAP's features to tokens of a language model's width, and the registry of their names.

Every token is a feature through LayerNorm, Linear, GELU, Linear, plus the sine code of its box through a Linear. Both
halves put out the same RMS at the start, and their sum that of the LLM's own embeddings, so that the LLM meets nothing
unusual in the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import initialization as init

from ..errors import InputError
from .features import WHOLE, RegionFeatures, grid_cells

if TYPE_CHECKING:
    from .configuration_tap_llm import TapLlmConfig

OCTAVES = 8  # the finest wave of the box code is 1/128 of the photo long
GELU_RMS = 0.652  # root mean square of GELU over a standard normal

PROJECTORS: dict[str, type[RegionProjector]] = {}
AnyProjector = TypeVar("AnyProjector", bound="type[RegionProjector]")


def register_projector(name: str) -> Callable[[AnyProjector], AnyProjector]:
    """Class decorator that makes a [`RegionProjector`] available as `projector=name`."""

    def register(projector: AnyProjector) -> AnyProjector:
        PROJECTORS[name] = projector
        return projector

    return register


def find_projector(name: str) -> type[RegionProjector]:
    """The class behind a name.

    Raises:
        InputError: unknown name.
    """
    if name not in PROJECTORS:
        raise InputError(f"unknown projector {name!r}: choose one of {', '.join(PROJECTORS)}, or register your own")
    return PROJECTORS[name]


def box_code(boxes: Tensor) -> Tensor:
    """(..., 4) shares -> (..., 8 * OCTAVES) sines and cosines; the squares of a row sum to half its length."""
    frequencies = math.pi * 2.0 ** torch.arange(OCTAVES, device=boxes.device)
    angles = (boxes.float().unsqueeze(-1) * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FeatureMlp(nn.Module):
    """LayerNorm, Linear, GELU, Linear; unit RMS at the start.

    Args:
        inputs: width of the features.
        hidden: width between the layers.
        outputs: width of the tokens.
        std: of the last layer's weights at the start.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, std: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.linear_1 = nn.Linear(inputs, hidden)
        self.linear_2 = nn.Linear(hidden, outputs)
        self.std = std
        self.gain = 1 / (std * math.sqrt(hidden) * GELU_RMS)

    def init_weights(self) -> None:
        """Weights with which a standard normal stays one up to the GELU."""
        init.normal_(self.linear_1.weight, std=self.linear_1.in_features**-0.5)
        init.normal_(self.linear_2.weight, std=self.std)

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.linear_2(gelu(self.linear_1(self.norm(features)))) * self.gain


class BoxPosition(nn.Module):
    """Sine code of (cx, cy, w, h), then Linear; unit RMS at the start.

    Args:
        outputs: width of the tokens.
        std: of the weights at the start.
    """

    def __init__(self, outputs: int, std: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8 * OCTAVES, outputs)
        self.std = std
        self.gain = 1 / (std * math.sqrt(4 * OCTAVES))

    def init_weights(self) -> None:
        """Normal weights."""
        init.normal_(self.linear.weight, std=self.std)

    def forward(self, boxes: Tensor) -> Tensor:
        """(..., 4) -> (..., outputs)."""
        return self.linear(box_code(boxes).to(self.linear.weight.dtype)) * self.gain


class BoxedTokens(nn.Module):
    """Features at boxes to tokens; unit RMS at the start.

    Args:
        inputs: width of the features.
        hidden: width between the layers.
        outputs: width of the tokens.
        std: of the last layers' weights at the start.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, std: float) -> None:
        super().__init__()
        self.feature = FeatureMlp(inputs, hidden, outputs, std)
        self.position = BoxPosition(outputs, std)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """(..., inputs) and (..., 4) -> (..., outputs)."""
        return (self.feature(features) + self.position(boxes)) * math.sqrt(0.5)


class RegionProjector(nn.Module):
    """Semantic token first; with `uses_roi` then R*R tokens of the box; with `uses_global` g*g tokens per image.

    Own projectors derive from this class, override what they need, and are added with [`register_projector`].

    Args:
        config: of the whole model.
    """

    uses_roi: ClassVar[bool] = False
    uses_global: ClassVar[bool] = False

    def __init__(self, config: TapLlmConfig) -> None:
        super().__init__()
        self.tokens_per_region = self.count_region_tokens(config)
        self.tokens_per_image = self.count_image_tokens(config)
        self.roi_grid = config.roi_grid if self.uses_roi else 0
        self.global_grid = config.global_grid if self.uses_global else 0
        self.scale = float(config.embedding_rms)
        width, tokens, std = config.feature_size, config.text_config.hidden_size, float(config.initializer_range)
        hidden = config.projector_hidden_size or tokens
        self.semantic = BoxedTokens(width, hidden, tokens, std)
        if self.uses_roi:
            self.roi = BoxedTokens(width, hidden, tokens, std)
        if self.uses_global:
            self.image = BoxedTokens(width * config.unshuffle**2, hidden, tokens, std)

    @classmethod
    def count_region_tokens(cls, config: TapLlmConfig) -> int:
        """Tokens k that a region costs."""
        return 1 + (config.roi_grid**2 if cls.uses_roi else 0)

    @classmethod
    def count_image_tokens(cls, config: TapLlmConfig) -> int:
        """Tokens m that an image costs."""
        return config.global_grid**2 if cls.uses_global else 0

    def forward(self, features: RegionFeatures) -> tuple[Tensor, Tensor]:
        """Project N regions and B images of the LLM's width d.

        Args:
            features: on the projector's device, in its dtype.

        Returns:
            (N, k, d) tokens of the regions and (B, m, d) tokens of the images.

        Raises:
            ValueError: the features lack what this projector reads.
        """
        regions = self.semantic(features.semantic_tokens, features.boxes)[:, None]
        if self.uses_roi:
            _check_count("roi", features.roi, self.roi_grid)
            cells = grid_cells(features.boxes, self.roi_grid)
            regions = torch.cat([regions, self.roi(features.roi, cells)], dim=1)
        return regions * self.scale, self._image_tokens(features, regions) * self.scale

    def _image_tokens(self, features: RegionFeatures, like: Tensor) -> Tensor:
        if not self.uses_global:
            return like.new_zeros(features.num_images, 0, like.shape[-1])
        _check_count("global_tokens", features.global_tokens, self.global_grid)
        photo = torch.tensor([WHOLE], device=features.global_tokens.device)
        cells = grid_cells(photo, self.global_grid)
        return self.image(features.global_tokens, cells.expand(features.num_images, -1, -1))


def _check_count(name: str, tensor: Tensor, grid: int) -> None:
    if tensor.shape[1] != grid**2:
        raise ValueError(
            f"the region features hold {tensor.shape[1]} {name} per row, this projector reads {grid**2} "
            f"({grid} x {grid}): extract them with the grids of the model's config"
        )


@register_projector("lite")
class LiteProjector(RegionProjector):
    """One token per region: the routed semantic token."""


@register_projector("base")
class BaseProjector(RegionProjector):
    """Lite, and a grid of image features over the box."""

    uses_roi = True


@register_projector("full")
class FullProjector(RegionProjector):
    """Base, and tokens of the whole image."""

    uses_roi = True
    uses_global = True


__all__ = ["PROJECTORS", "RegionProjector", "box_code", "find_projector", "register_projector"]
