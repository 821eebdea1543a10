"""TAP's prompt encoder: points with labels to tokens (arXiv:2312.09128, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..regions import BOTTOM_RIGHT, PAD, TOP_LEFT
from .configuration_tap import TapPromptConfig


def attended_points(input_labels: Tensor) -> Tensor:
    """Which prompt tokens take part in attention.

    A pad is real only if its row has no box and it is the row's first pad: TAP was trained with exactly one pad
    behind prompts without a box. All other pads only make rows equally long.

    Args:
        input_labels: (N, n) int64.

    Returns:
        (N, n) bool.
    """
    is_pad = input_labels == PAD
    has_box = ((input_labels == TOP_LEFT) | (input_labels == BOTTOM_RIGHT)).any(dim=-1, keepdim=True)
    is_first_pad = is_pad & (is_pad.cumsum(dim=-1) == 1)
    return ~is_pad | (is_first_pad & ~has_box)


class TapPromptEncoder(nn.Module):
    """Random Fourier features of a position plus a learned embedding of its label."""

    coord_matrix: Tensor

    def __init__(self, config: TapPromptConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("coord_matrix", torch.randn(2, config.hidden_size // 2) * config.scale)
        self.point_embed = nn.Embedding(config.num_point_embeddings, config.hidden_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TapPromptEncoder:
        # Phases reach tens of radians: half precision would blur them, so casts leave the frequencies in float32.
        frequencies = self.coord_matrix
        super()._apply(fn, recurse)
        if self.coord_matrix.dtype != torch.float32 and not frequencies.is_meta:
            self.coord_matrix = frequencies.to(device=self.coord_matrix.device, dtype=torch.float32)
        return self

    def fourier_features(self, coordinates: Tensor) -> Tensor:
        """(..., 2) positions x, y in [0, 1], float32 -> (..., D) float32."""
        with torch.autocast(coordinates.device.type, enabled=False):
            phase = (2 * math.pi) * (2 * coordinates.float() - 1) @ self.coord_matrix.float()
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def grid_encoding(self, side: int) -> Tensor:
        """Position code of a side x side grid, row by row: (1, side * side, D) in the dtype of the weights."""
        centres = (torch.arange(side, device=self.coord_matrix.device, dtype=torch.float32) + 0.5) / side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        positions = torch.stack([columns, rows], dim=-1).view(1, side * side, 2)
        return self.fourier_features(positions).to(self.point_embed.weight.dtype)

    def forward(self, input_points: Tensor, input_labels: Tensor) -> Tensor:
        """Encode prompts.

        Args:
            input_points: (N, n, 2) x, y in canvas pixels.
            input_labels: (N, n) in {0 background, 1 foreground, 2 top-left, 3 bottom-right, 4 pad}.

        Returns:
            (N, n, D) prompt tokens.
        """
        coordinates = ((input_points.float() + 0.5) / self.config.image_size).clamp(0, 1)
        features = self.fourier_features(coordinates) * (input_labels != PAD).unsqueeze(-1)
        embedded = self.point_embed(input_labels)
        return features.to(embedded.dtype) + embedded


__all__ = ["TapPromptEncoder", "attended_points"]
