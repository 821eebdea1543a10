"""CaR with TAP at its end: masks that follow the objects, as regions to describe and to talk about."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..encoded import EncodedImage
from ..masks import BoolArray
from ..pipelines import DEFAULT_MODEL, RegionPipeline
from .configuration_car import CarConfig
from .loading import Clip
from .modeling import ClipAsRnn
from .outputs import Float32Array
from .picture import CarImage


class CarPipeline(ClipAsRnn):
    """Text in, masks out: [`ClipAsRnn`], refined by TAP unless `refine` says otherwise.

    Args:
        f: see [`ClipAsRnn`].
        g: see [`ClipAsRnn`].
        config: see [`ClipAsRnn`]; by default with `refine="tap"`.
        tap: a [`RegionPipeline`], or the name of its model; loaded when it is first needed.
        tap_options: of `RegionPipeline.from_pretrained`.
    """

    def __init__(
        self,
        f: Clip,
        g: Clip | None = None,
        config: CarConfig | None = None,
        tap: RegionPipeline | str | Path = DEFAULT_MODEL,
        **tap_options: Any,
    ) -> None:
        super().__init__(f, g, config or CarConfig(refine="tap"))
        self._tap, self._tap_options = tap, tap_options

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path = "tiny",
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        tap: RegionPipeline | str | Path = DEFAULT_MODEL,
        refine: str = "tap",
        **options: Any,
    ) -> CarPipeline:
        """Load a pair of CLIP models; TAP is loaded when it is first needed.

        Args:
            name: see `ClipAsRnn.from_pretrained`.
            device: of all models.
            dtype: of g and TAP.
            tap: a [`RegionPipeline`], or the name of its model.
            refine: "tap", "crf" or "none".
            options: see `ClipAsRnn.from_pretrained`.

        Raises:
            InputError: see there.
        """
        pipe: Any = super().from_pretrained(name, device, dtype, refine=refine, **options)
        pipe._tap, pipe._tap_options = tap, {"device": pipe.device, "dtype": dtype}
        return pipe

    @cached_property
    def tap(self) -> RegionPipeline:
        """The TAP model that refines masks.

        Raises:
            InputError: it cannot be loaded.
        """
        if isinstance(self._tap, RegionPipeline):
            return self._tap
        return RegionPipeline.from_pretrained(self._tap, **self._tap_options)

    def _refine_with_tap(
        self,
        picture: CarImage,
        masks: BoolArray,
        soft_masks: Float32Array,
        scores: Float32Array,
        config: CarConfig,
    ) -> BoolArray:
        from .tap_refine import refine_masks

        if not isinstance(picture.source, EncodedImage):
            picture.source = self.tap.encode(picture.image)  # once for all calls with this picture
        return refine_masks(
            self.tap,
            picture.source,
            masks,
            soft_masks,
            scores,
            min_iou=config.tap_min_iou,
            choice=config.tap_choice,
            sharpen=config.tap_sharpen,
            exclusive=config.mode == "semantic",
        )


__all__ = ["CarPipeline"]
