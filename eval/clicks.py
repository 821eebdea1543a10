"""Clicks of a careful user: the first deepest inside the object, each further one deepest inside the largest error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tap_llm.regions import PAD, Region
from training.prompts import centre_click, click_error_centre

from .overlap import Mask


class Clicks:
    """Clicks on N regions of one picture; starts with one on each.

    Args:
        masks: (N, H, W), the true ones, none empty.
    """

    def __init__(self, masks: np.ndarray) -> None:
        self._wanted = torch.from_numpy(masks)
        self._points: list[list[list[int]]] = [[] for _ in masks]
        self._labels: list[list[int]] = [[] for _ in masks]
        self._add(*centre_click(self._wanted))

    def prompts(self) -> list[Region]:
        """One per region: all its clicks so far."""
        return [{"points": p, "labels": kinds} for p, kinds in zip(self._points, self._labels, strict=True)]

    def correct(self, predicted: Sequence[Mask]) -> None:
        """Click once more on each region, after (N) masks of (H, W); one without any error gets no further click."""
        self._add(*click_error_centre(self._wanted, torch.from_numpy(np.stack(predicted))))

    def _add(self, pixels: Tensor, kinds: Tensor) -> None:
        for row, (pixel, kind) in enumerate(zip(pixels.tolist(), kinds.tolist(), strict=True)):
            if kind != PAD:
                self._points[row] = [*self._points[row], pixel]
                self._labels[row] = [*self._labels[row], kind]
