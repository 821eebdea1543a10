"""Stands where TAP would be in a model that works on stored features alone: training then needs no image encoder."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from ..errors import InputError
from .fingerprints import Fingerprint, fingerprint
from .modeling_tap_llm import TapLlmForConditionalGeneration


class LeftOutTap(nn.Module):
    """Remembers which TAP was there; has no weights.

    Args:
        tap: the TAP that is left out.
    """

    def __init__(self, tap: Any) -> None:
        super().__init__()
        self.config, self.fingerprint = tap.config, fingerprint(tap)
        self.device, self.dtype = tap.device, tap.dtype

    def get_image_embeddings(self, *_: Any) -> NoReturn:
        """Raises InputError: there is no image encoder."""
        raise InputError("TAP was left out of this model: give region_features in place of images")


def leave_out_tap(model: TapLlmForConditionalGeneration) -> None:
    """Take TAP out of a model, for good; features must be given from then on."""
    if not isinstance(model.model.tap, LeftOutTap):
        model.model.tap = LeftOutTap(model.model.tap)


def fingerprint_of_tap(tap: Any) -> Fingerprint:
    """Fingerprint of a TAP, or of the one that was left out."""
    return tap.fingerprint if isinstance(tap, LeftOutTap) else fingerprint(tap)


__all__ = ["LeftOutTap", "fingerprint_of_tap", "leave_out_tap"]
