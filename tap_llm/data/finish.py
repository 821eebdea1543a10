"""What a camera and a file do to a picture: noise on all, on some a slight blur or the marks of JPEG."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

_TILE = 768  # side of the stored noise, from which random parts are cut
_STRENGTHS = (1.0, 2.0, 3.5, 5.5)  # standard deviations of the noise, in grey levels
_BLURRED, _JPEG = 0.15, 0.4  # shares of the pictures


@cache
def _noise(strength: float, grain: bool) -> Image.Image:
    """Noise around 128; `grain` is the same in all channels."""
    rng = np.random.default_rng(int(strength * 10))
    values = rng.normal(128, strength, (_TILE, _TILE, 1 if grain else 3))
    return Image.fromarray(np.repeat(values, 3 // values.shape[2], axis=2).round().clip(0, 255).astype(np.uint8))


def _add_noise(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    strength = _STRENGTHS[int(rng.random() * len(_STRENGTHS))]
    tile = _noise(strength, bool(rng.random() < 0.5))
    width, height = min(picture.width, _TILE), min(picture.height, _TILE)
    x, y = int(rng.random() * (_TILE - width)), int(rng.random() * (_TILE - height))
    noise = tile.crop((x, y, x + width, y + height))
    if noise.size != picture.size:
        noise = noise.resize(picture.size, Image.Resampling.NEAREST)
    return ImageChops.add(picture, noise, offset=-128)


def roughen(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """An RGB picture of the same size, a little worse."""
    dice = rng.random(3).tolist()
    if dice[0] < _BLURRED:
        picture = picture.filter(ImageFilter.BoxBlur(0.2 + 0.6 * dice[1]))
    picture = _add_noise(rng, picture)
    if dice[2] > _JPEG:
        return picture
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(rng.integers(55, 94)))
    return Image.open(stream).convert("RGB")
