"""The paper's settings by name (arXiv:2312.07661, appendix; where paper and code differ, the code's)."""

from __future__ import annotations

import difflib

from ..errors import InputError
from .configuration_car import CarConfig
from .vocabulary import CONTEXT_STUFF

BASE_16, LARGE_14 = "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14"
BUNDLED_CLIP = "tap-tiny-clip"

_CONTEXT = CarConfig(
    mask_threshold=0.6, keep_threshold=0.25, box_threshold=0.4, prompts=("blur", "circle"),
    stuff=CONTEXT_STUFF, stuff_prompts=("blur", "gray"),
)  # fmt: skip
_ADE = CarConfig(mask_threshold=0.6, keep_threshold=0.25, box_threshold=0.7, prompts=("gray", "blur"))
_REFCOCO = CarConfig(
    g=BASE_16, mode="referring", mask_threshold=0.5, keep_threshold=0.3, box_threshold=0.5, prompts=("circle",),
    templates=(),
)  # fmt: skip
_DEFAULT = CarConfig(
    mask_threshold=0.6, keep_threshold=0.3, box_threshold=0.6, prompts=("gray", "blur"), max_area=0.95
)  # fmt: skip

# The names of stuff in ADE and Context-459 are the user's to give: `config.updated(stuff=[...])`.
PRESETS: dict[str, CarConfig] = {
    "default": _DEFAULT,
    # tap-tiny-clip learned from distorted views, not cropped ones, and background words for what is no object; its maps
    # are low beside their peaks (bg_factor). The last three are what tap-tiny makes of such masks. Found on scenes.
    "tiny": _DEFAULT.updated(
        f=BUNDLED_CLIP,
        g=BUNDLED_CLIP,
        g_resize="squash",
        g_background=True,
        mask_threshold=0.4,
        keep_threshold=0.1,
        bg_factor=8.0,
        tap_min_iou=0.2,
        tap_choice="agreeing",
        tap_sharpen=True,
    ),
    "voc": CarConfig(mask_threshold=0.4, keep_threshold=0.6, box_threshold=0.4, prompts=("circle", "blur")),
    "coco_object": CarConfig(mask_threshold=0.5, keep_threshold=0.3, box_threshold=0.5, prompts=("blur", "gray")),
    "context": _CONTEXT,
    "context_paper": _CONTEXT.updated(keep_threshold=0.2, mutual_background=True),
    "ade150": _ADE,
    "ade847": _ADE,
    "context459": CarConfig(mask_threshold=0.4, keep_threshold=0.25, box_threshold=0.7, prompts=("gray", "blur")),
    "refcoco": _REFCOCO,
    "refcoco_paper": _REFCOCO.updated(prompts=("circle", "blur")),
    "refcoco+": _REFCOCO.updated(mask_threshold=0.2, keep_threshold=0.1, prompts=("circle", "blur")),
    "refcocog": _REFCOCO.updated(keep_threshold=0.1, box_threshold=0.6, prompts=("circle", "blur")),
    "gres": _REFCOCO.updated(g=LARGE_14, keep_threshold=0.0, box_threshold=0.3),
}


def get_preset(name: str) -> CarConfig:
    """Settings by name.

    Raises:
        InputError: there is no such name.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(PRESETS)}"
        raise InputError(f"unknown preset {name!r}; {hint}")
    return PRESETS[name]


__all__ = ["BASE_16", "BUNDLED_CLIP", "LARGE_14", "PRESETS", "get_preset"]
