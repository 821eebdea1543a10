"""CaR: the recurrent unit on a pair of CLIP models. Being written: the signatures below stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .configuration_car import CarConfig, Mode
from .outputs import CarOutput


class ClipAsRnn:
    """Finds what texts name, without training.

    Args:
        f: `CLIPModel` that proposes masks.
        g: `CLIPModel` that judges them, or the same.
        tokenizer_f, tokenizer_g, config ...
    """

    config: CarConfig

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        f: Any = None,
        g: Any = None,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> ClipAsRnn:
        """name: preset, folder of `save_pretrained`, or a CLIP (bundled name, folder, hub id) for both f and g.

        f, g: CLIP names in place of the preset's. options: fields of CarConfig.
        """
        raise NotImplementedError

    def encode(self, image: Any) -> Any:
        """-> CarImage; pass it in place of the picture."""
        raise NotImplementedError

    def __call__(
        self,
        image: Any,
        queries: Sequence[str],
        mode: Mode | None = None,
        background: Sequence[str] | None = None,
        text_embeddings: Any = None,
        progress: bool | None = None,
        **options: Any,
    ) -> CarOutput:
        """options: fields of CarConfig for this call, such as refine="none", keep_threshold=0.4."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """One folder that from_pretrained reads."""
        raise NotImplementedError


# in pipeline.py:
# class CarPipeline(ClipAsRnn-like):
#   from_pretrained(name="tiny", tap="tap-tiny", device=None, dtype=None, **options)
#   __call__(image, queries, ..., refine="tap" by default) -> CarOutput; image may be the EncodedImage of pipe.tap
#   .car: ClipAsRnn; .tap: RegionPipeline
