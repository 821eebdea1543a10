"""CaR: finds what texts name in a picture, without training (arXiv:2312.07661).

    car = ClipAsRnn.from_pretrained("default")
    found = car("photo.jpg", ["a dog", "the red kite"])
    found.regions()

To ask several times, `encoded = car.encode("photo.jpg")` runs f once: pass it in place of the picture.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..encoded import EncodedImage
from ..errors import InputError
from ..images import load_image
from ..loading import parse_device, parse_dtype
from ..masks import BoolArray
from .cam import encode_patches, patch_pixels
from .classifier import embed_pictures
from .configuration_car import CarConfig, Mode
from .loading import Clip, eager_float32, find_config, load_clip
from .notes import checked_queries
from .outputs import CarOutput, Float32Array
from .pair_texts import PairTexts
from .passes import FoundMasks, Pass, assemble, plan_passes
from .picture import CarImage, is_one_colour, shrunk_pixels
from .postprocess import against_background, drop_large, refined_masks
from .recurrence import Alive, RecurrentUnit
from .text import PassTexts, TextEmbeddings, TextEncoder

_FIXED = ("f", "g")  # what a call cannot change
_FIXED_BY_ENCODING = ("max_side", "f_max_side")
_BARS_FROM = 50  # queries
ONE_COLOUR = "the picture is of one colour: there is nothing to find in it"


class ClipAsRnn:
    """Finds what texts name, with the weights of CLIP alone.

    Args:
        f: CLIP model that proposes masks. It is used in float32, with weights that need no gradient.
        g: CLIP model that judges them; by default f.
        config: settings; its f and g are names only. By default those of [`CarConfig`].

    Attributes:
        config: settings; calls can differ in any but the models.
    """

    def __init__(self, f: Clip, g: Clip | None = None, config: CarConfig | None = None) -> None:
        self._source_f, self._source_g = f, g or f
        self.config = config or CarConfig()
        shared = self._source_f.model is self._source_g.model
        self.g = self._source_g.model.eval().requires_grad_(False)
        self.f = eager_float32(f.model).eval().requires_grad_(False)
        texts_f = TextEncoder(self.f, f.tokenizer)
        self._texts = PairTexts(texts_f, texts_f if shared else TextEncoder(self.g, self._source_g.tokenizer))

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> ClipAsRnn:
        """Load a pair of CLIP models.

        Args:
            name: a preset of the paper (`presets.PRESETS`: "default", "tiny", "voc", "refcoco", ...), a folder of
                `save_pretrained`, or a CLIP model (bundled name, folder, hub id) that is then both f and g.
            device: such as "cpu" or "cuda:0"; the first accelerator by default, else the CPU.
            dtype: of g, such as "bfloat16"; by default that of its weights, on the CPU float32. f is in float32.
            options: fields of [`CarConfig`] to change, such as `f` and `g` (names) or `keep_threshold`.

        Raises:
            InputError: an unknown name, option, device or dtype, or files that cannot be used.
        """
        config = find_config(name, **options)
        target = parse_device(device) or torch.accelerator.current_accelerator() or torch.device("cpu")
        weights = torch.float32 if dtype is None and target.type == "cpu" else parse_dtype(dtype)
        g = load_clip(config.g, weights)
        f = g if config.f == config.g else load_clip(config.f, torch.float32)
        for clip in (f, g):
            clip.model.to(target)
        return cls(f, g, config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save both models and the settings as one folder that `from_pretrained` reads."""
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        shared = self._source_f.model is self._source_g.model
        self._source_f.save_pretrained(path / "f")
        if not shared:
            self._source_g.save_pretrained(path / "g")
        self.config.updated(f="f", g="f" if shared else "g").save(path)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.f.device

    @property
    def clips(self) -> tuple[Clip, Clip]:
        """f and g as they were given, with tokenizers and image settings."""
        return self._source_f, self._source_g

    def forget_texts(self) -> None:
        """Empty the memory of embedded texts; it fills again by itself."""
        self._texts.forget()

    @torch.inference_mode(False)
    def encode(self, image: Any, **options: Any) -> CarImage:
        """Run f once; pass the result in place of the picture, any number of times, with any queries and settings.

        Args:
            image: PIL picture, path, (H, W, 3) uint8 array, (3, H, W) tensor, or TAP's `EncodedImage`.
            options: `max_side`, `f_max_side`, in place of the settings'.

        Raises:
            InputError: the picture cannot be read.
        """
        config = self.config.updated(**options)
        picture = upright(image)
        pixels = shrunk_pixels(picture, config.max_side)
        side, settings = self.f.config.vision_config.patch_size, self._source_f.settings
        inputs = patch_pixels(pixels, side, config.f_max_side, settings)
        features = encode_patches(self.f, inputs.to(self.device))
        if not torch.isfinite(features.embedding).all():
            raise InputError("f answers with NaN or infinite values: its weights are damaged")
        return CarImage(picture, pixels, features, owner=self, source=image)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        queries: Sequence[str],
        mode: Mode | None = None,
        background: Sequence[str] | None = None,
        text_embeddings: TextEmbeddings | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> CarOutput:
        """Find what the queries name.

        Equal queries are several: each keeps its index, they share their score, and the first takes the pixels.

        Args:
            image: a picture as for `encode`, or the result of `encode`.
            queries: N texts.
            mode: "semantic" or "referring", see [`CarConfig`].
            background: words that compete with the queries, in place of the settings'.
            text_embeddings: the texts embedded elsewhere; `queries` are then names only, and no background words
                are taken from the settings.
            progress: show bars; by default on terminals, with many queries.
            options: fields of [`CarConfig`] for this call, such as `refine="none"`.

        Raises:
            InputError: no query, a picture or an option that cannot be used, or models that answer with NaN.
        """
        config = self._call_config(image, mode, background, options)
        names = checked_queries(queries)
        encoded = image if isinstance(image, CarImage) else None
        picture = encoded.image if encoded else upright(image)
        size = picture.height, picture.width
        if is_one_colour(picture, config.min_contrast):
            return assemble(names, [], size, config.mode, [ONE_COLOUR])
        sizes = {name: getattr(config, name) for name in _FIXED_BY_ENCODING}
        encoded = encoded or self.encode(image, **sizes)
        bars = len(names) >= _BARS_FROM and sys.stderr.isatty() if progress is None else progress
        given, notes = self._texts.prepare(names, text_embeddings, config, bars)
        texts = self._prepare_texts(given, len(names), config)
        found = [self._find(encoded, part, texts, config, bars, notes) for part in plan_passes(names, config)]
        return assemble(names, found, size, config.mode, notes)

    def _call_config(
        self, image: Any, mode: Mode | None, background: Sequence[str] | None, options: dict[str, Any]
    ) -> CarConfig:
        """Settings of a call."""
        encoded = isinstance(image, CarImage)
        for name in options.keys() & {*_FIXED, *(_FIXED_BY_ENCODING if encoded else ())}:
            raise InputError(f"{name} cannot be changed here: it was decided by from_pretrained or encode")
        if encoded and image.owner is not self:
            raise InputError("this picture was encoded by another ClipAsRnn: encode it with this one")
        given = {"mode": mode, "background": background}
        return self.config.updated(**options, **{name: value for name, value in given.items() if value is not None})

    def _prepare_texts(self, given: TextEmbeddings, count: int, config: CarConfig) -> PassTexts:
        widths = self.f.config.projection_dim, self.g.config.projection_dim
        texts = given.prepared(count, *widths, self.device)
        if config.g_background and texts.g_background is None:
            raise InputError("g_background=True needs text_embeddings with g_background")
        return texts

    def _find(
        self,
        picture: CarImage,
        part: Pass,
        texts: PassTexts,
        config: CarConfig,
        progress: bool,
        notes: list[str],
    ) -> FoundMasks:
        """One pass: what is left of its queries, with their masks."""
        alive = self._recur(picture, part, texts.of_pass(part.ids, part.rivals), config, progress)
        soft, masks = refined_masks(picture.image, alive.maps, config)
        scores = alive.scores.numpy()
        if config.refine == "tap" and masks.any():
            certain = against_background(soft, config.bg_factor)
            masks = self._refine_with_tap(picture, masks, certain, scores, config)
        found = FoundMasks([part.ids[row] for row in alive.ids], scores, soft, masks, part.global_trace(alive.trace))
        large = drop_large(masks, config.max_area)
        if large.any():
            notes.append(f"dropped: masks over more than {config.max_area:.0%} of the picture")
        return found.rows(np.flatnonzero(~large).tolist())

    def _recur(self, picture: CarImage, part: Pass, texts: PassTexts, config: CarConfig, progress: bool) -> Alive:
        embed = partial(
            embed_pictures,
            self.g,
            self._source_g.settings,
            batch_size=config.g_batch,
            resize=config.g_resize,
            skip_last_block=config.compat.g_skip_last_block,
        )
        scales = _scale(self.f), _scale(self.g)
        return RecurrentUnit(picture, texts, config, part.prompts, scales, embed, progress).run()

    def _refine_with_tap(
        self,
        picture: CarImage,
        masks: BoolArray,
        soft_masks: Float32Array,
        scores: Float32Array,
        config: CarConfig,
    ) -> BoolArray:
        raise InputError("refine='tap' needs a TAP model: use CarPipeline, or refine='crf'")


def _scale(model: Any) -> float:
    return float(model.logit_scale.detach().float().exp())


def upright(image: Any) -> Image.Image:
    """The RGB picture of whatever `load_image` takes, or of TAP's `EncodedImage`."""
    return image.image if isinstance(image, EncodedImage) else load_image(image)


__all__ = ["ClipAsRnn"]
