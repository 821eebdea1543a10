"""Settings of CaR, and the behaviour of the authors' code that can be switched back on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import InputError, MissingFileError
from .vocabulary import BACKGROUND, ORIGAMI, TEMPLATES

CONFIG_FILE = "car_config.json"

Mode = Literal["semantic", "referring"]
Refine = Literal["none", "crf", "tap"]
TapChoice = Literal["each", "agreeing"]
Cam = Literal["clip_es", "grad_cam"]
Resize = Literal["crop", "squash"]
Prompt = Literal["blur", "gray", "black", "circle", "rectangle", "contour"]
PROMPTS: tuple[Prompt, ...] = get_args(Prompt)  # in the order in which they are drawn

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "refine": get_args(Refine),
    "tap_choice": get_args(TapChoice),
    "cam": get_args(Cam),
    "g_resize": get_args(Resize),
}
_SHARES = ("mask_threshold", "box_threshold", "max_area", "tap_min_iou")
_COUNTS = ("max_steps", "g_batch", "max_side", "f_max_side")
_LISTS = ("prompts", "stuff_prompts", "templates", "f_templates", "background", "stuff")


@dataclass(frozen=True)
class Compat:
    """What the authors' code does differently, each off by default; for studies of parity.

    Args:
        first_step_raw: f sees the bare query in the first step, and the wrapped one from the second on.
        one_more_step: there are always two steps, even where the first one dropped nothing.
        background_keeps_queries: background words that equal a query stay in the background.
        probability_target: Grad-CAM of the probability itself, which can underflow, in place of the scale-free form.
        box_clip: boxes of the CAM end one cell before the right and bottom border.
        gray_weights: the visual prompt "gray" takes the weights of red and blue for each other.
        g_skip_last_block: the classifier leaves out the last block of its image encoder.
        crf_image: the CRF sees BGR minus the mean, wrapped around at zero.
    """

    first_step_raw: bool = False
    one_more_step: bool = False
    background_keeps_queries: bool = False
    probability_target: bool = False
    box_clip: bool = False
    gray_weights: bool = False
    g_skip_last_block: bool = False
    crf_image: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, bool):
                raise InputError(f"compat: {name} must be true or false, got {value!r}")


@dataclass(frozen=True)
class CarConfig:
    """Settings of CaR (arXiv:2312.07661, section 3 and appendix); lists and tuples are taken alike.

    Args:
        f: CLIP model that proposes masks: bundled name, folder or hub id.
        g: CLIP model that judges them; may be the same.
        mode: "semantic": the queries compete for the pixels; "referring": they mean one thing and are merged.
        mask_threshold: eta: what of a soft mask the visual prompt shows, 0..1.
        keep_threshold: theta: a query survives above it; 0 filters nothing.
        box_threshold: lambda: the boxes around a CAM hold what is above this share of its maximum, 0..1.
        prompts: visual prompts, of "blur", "gray", "black", "circle", "rectangle", "contour".
        templates: texts with `{}` that g is asked with; empty: the first of `f_templates` and one softmax only.
        f_templates: texts with `{}` that f is asked with; of several, the mean.
        background: words that compete with the queries in f.
        refine: after the last step: "none", the dense "crf", or "tap": the CRF, then TAP.
        tap_min_iou: TAP's mask is taken where its IoU with the CRF's is above this.
        tap_choice: "each": for each part of a mask TAP's answer that fits it best; "agreeing": only answers that agree
            with the soft mask, so that false parts are dropped.
        tap_sharpen: a CRF moves the edges of TAP's masks, for TAP models with small masks.
        bg_factor: exponent of the background's probability in the CRF.
        stuff: names of queries that are stuff: found in a pass of their own, with the others as background.
        stuff_prompts: visual prompts of that pass; empty: `prompts`.
        mutual_background: the other queries' pass also has the stuff as its background, in place of `background`.
        cam: "clip_es" (competing texts, refined by attention) or plain "grad_cam".
        max_steps: end after so many steps, with all that are alive then; None: when nothing changes any more.
        keep_at_least_one: where no query survives, the best one does.
        g_background: the background words compete in g too, as one more class: a query can then fail alone.
        min_similarity: least cosine of prompted picture and text (mean over the templates); None: any.
        max_area: masks that cover more of the picture than this share are dropped.
        min_contrast: pictures whose values differ by less than this in every colour channel (of 0..255) are of one
            colour: nothing is found in them.
        g_resize: g sees the centre ("crop", as CLIP does) or all, distorted ("squash").
        g_batch: pictures that g sees at once; bounds memory.
        max_side: larger pictures are shrunk to this many pixels on the long side, and the masks enlarged again.
        f_max_side: the same, for what f sees; its memory grows with the fourth power.
        compat: see [`Compat`].

    Raises:
        InputError: a value that cannot be used.
    """

    f: str = "openai/clip-vit-base-patch16"
    g: str = "openai/clip-vit-large-patch14"
    mode: Mode = "semantic"
    mask_threshold: float = 0.5
    keep_threshold: float = 0.45
    box_threshold: float = 0.4
    prompts: tuple[Prompt, ...] = ("blur", "gray")
    templates: tuple[str, ...] = TEMPLATES
    f_templates: tuple[str, ...] = (ORIGAMI,)
    background: tuple[str, ...] = BACKGROUND
    refine: Refine = "crf"
    tap_min_iou: float = 0.7
    tap_choice: TapChoice = "each"
    tap_sharpen: bool = False
    bg_factor: float = 1.0
    stuff: tuple[str, ...] = ()
    stuff_prompts: tuple[Prompt, ...] = ()
    mutual_background: bool = False
    cam: Cam = "clip_es"
    max_steps: int | None = None
    keep_at_least_one: bool = True
    g_background: bool = False
    min_similarity: float | None = None
    max_area: float = 1.0
    min_contrast: int = 4
    g_resize: Resize = "crop"
    g_batch: int = 16
    max_side: int = 1000
    f_max_side: int = 800
    compat: Compat = field(default_factory=Compat)

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if isinstance(self.compat, Mapping):
            object.__setattr__(self, "compat", _from_mapping(Compat, self.compat, "compat"))
        _check(self)

    @property
    def g_templates(self) -> tuple[str, ...]:
        """Texts with `{}` that g is asked with, at least one."""
        return self.templates or self.f_templates[:1]

    def updated(self, **options: Any) -> CarConfig:
        """A copy with other values.

        Raises:
            InputError: an unknown name, or a value that cannot be used.
        """
        _check_names(CarConfig, options, "option")
        return replace(self, **options)

    def save(self, folder: str | Path) -> None:
        """Write `car_config.json`."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        (Path(folder) / CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> CarConfig:
        """Read `car_config.json` of a folder.

        Raises:
            MissingFileError: there is none.
            InputError: it is damaged.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MissingFileError(f"there is no {CONFIG_FILE} in {folder}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} is damaged: it must hold one JSON object")
        return _from_mapping(cls, values, str(path))


def _from_mapping(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    _check_names(kind, values, where)
    return kind(**values)


def _check_names(kind: type[Any], values: Mapping[str, Any], where: str) -> None:
    known = [entry.name for entry in fields(kind)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise InputError(f"{where}: unknown name {name!r}; {hint}")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple) or not all(isinstance(t, str) for t in value):
        raise InputError(f"{name} must be a list of texts, got {value!r}")
    return tuple(value)


def _check(config: CarConfig) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
    for prompt in config.prompts + config.stuff_prompts:
        if prompt not in PROMPTS:
            raise InputError(f"unknown visual prompt {prompt!r}; known are {', '.join(PROMPTS)}")
    for template in config.templates + config.f_templates:
        if "{}" not in template:
            raise InputError(f"a template must have {{}} in the place of the query, got {template!r}")
    if not config.f_templates:
        raise InputError("f_templates must hold at least one text with {} in the place of the query")
    _check_numbers(config)


def _check_numbers(config: CarConfig) -> None:
    for name in _SHARES:
        if not _is_number(getattr(config, name)) or not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{name} must lie between 0 and 1, got {getattr(config, name)!r}")
    for name in ("keep_threshold", "bg_factor", "min_contrast"):
        if not _is_number(getattr(config, name)) or not getattr(config, name) >= 0:
            raise InputError(f"{name} must be a number of at least 0, got {getattr(config, name)!r}")
    if config.min_similarity is not None and not _is_number(config.min_similarity):
        raise InputError(f"min_similarity must be a number or None, got {config.min_similarity!r}")
    for name in _COUNTS:
        value = getattr(config, name)
        if value is None and name == "max_steps":
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


__all__ = ["CONFIG_FILE", "PROMPTS", "CarConfig", "Compat", "Mode", "Prompt", "Refine"]
