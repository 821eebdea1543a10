"""Anything a user calls an image -> one upright RGB `PIL.Image.Image`.

* EXIF orientation is applied, so that coordinates mean what a viewer shows.
* Transparency is composited on white.
* Deep grey images are scaled to 8 bits, never clipped.
* Size is checked before a pixel is decoded; whatever is wrong becomes one [`InputError`].
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .errors import InputError, MissingFileError

MAX_IMAGE_PIXELS = 200_000_000
# What files may hold. Others stay closed: Pillow hands EPS, for one, to an interpreter outside.
FILE_FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO", "TGA",
)  # fmt: skip

_URL = re.compile(r"^([a-z][a-z0-9+.-]+:/|data:)", re.IGNORECASE)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_FLOAT_SLACK = 1e-3  # a resize in float arithmetic may overshoot [0, 1] by rounding
_pillow_limit_lock = threading.Lock()


def load_image(image: Any) -> Image.Image:
    """Load one image as an upright RGB picture that owns its pixels.

    Args:
        image: a `PIL.Image.Image` of any mode, the path of an image file (`str` or `Path`), a uint8 numpy
            array (H, W) or (H, W, C), or a torch tensor (H, W) or (C, H, W), uint8 or floating point in
            [0, 1]. C is 1, 3 or 4 (grey, RGB, RGBA).

    Returns:
        A new image of mode RGB without metadata (loading it again does not rotate it again). Transparent
        pixels are composited on white. 16-bit grey is divided by 257. 32-bit integer grey is kept where it
        fits 0..255, divided by 257 where it fits 0..65535, else stretched from its minimum..maximum;
        floating-point grey is taken as 0..1 where it fits, else as 0..255 where it fits, else stretched.

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is damaged or not an image, the image has more than `MAX_IMAGE_PIXELS` pixels,
            or the array has another shape, dtype or range.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(_load_upright(image, "image"))
    if isinstance(image, (str, Path)):
        return _to_rgb(open_image(image))
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image, "array (H, W, C)"))
    if isinstance(image, torch.Tensor):
        return _to_rgb(_from_array(_tensor_to_array(image), "tensor (C, H, W)"))
    raise InputError(
        f"image: cannot read a {type(image).__name__}; pass one PIL image, path, numpy (H, W, C) uint8 array "
        "or torch (C, H, W) tensor"
    )


def open_image(path: str | Path, what: str = "image") -> Image.Image:
    """Read an image file in its own mode (palette indices, 16 bits, ... as they are), upright by EXIF.

    Args:
        path: the file.
        what: how error messages call it.

    Raises:
        MissingFileError: there is no such file.
        InputError: a folder, a URL, a damaged file, not an image, or more than `MAX_IMAGE_PIXELS` pixels.
    """
    if _URL.match(str(path)):
        raise InputError(f"{what}: {_shorten(path)} is a URL; download it first and pass the file's path")
    try:
        with open(path, "rb") as stream, open_header(stream) as image:
            return _load_upright(image, f"{what} {_shorten(path)}")
    except FileNotFoundError:
        raise MissingFileError(f"{what}: there is no file {_shorten(path)}") from None
    except IsADirectoryError:
        raise InputError(f"{what}: {_shorten(path)} is a folder; pass the path of one image file") from None
    except UnidentifiedImageError:
        known = ", ".join(FILE_FORMATS)
        raise InputError(f"{what}: {_shorten(path)} is damaged, or not an image of a known format ({known})") from None
    except InputError:
        raise
    except Exception as error:  # a damaged header surfaces as nearly any exception type
        raise InputError(f"{what}: cannot read {_shorten(path)} ({error})") from error


def check_image_size(width: int, height: int, what: str = "image") -> None:
    """Raise [`InputError`] for an image without pixels or with more than `MAX_IMAGE_PIXELS`."""
    if width < 1 or height < 1:
        raise InputError(f"{what}: {width}x{height} has no pixels")
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(
            f"{what}: {width}x{height} is too large ({width * height:,} pixels, the limit is "
            f"{MAX_IMAGE_PIXELS:,}); shrink it or cut it into tiles"
        )


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Silence Pillow's own size limit, whose error cannot name width and height; ours follows at once."""
    with _pillow_limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def open_header(stream: Any) -> Image.Image:
    """Open an image in one of the formats that we read, without decoding it; Pillow's own errors pass through."""
    Image.init()
    known = [name for name in FILE_FORMATS if name in Image.OPEN]  # some need a newer Pillow, or a plug-in
    with _without_pillow_limit():
        return Image.open(stream, formats=known)


def _load_upright(image: Image.Image, what: str) -> Image.Image:
    """Decode, then turn by the EXIF tag. Pixels only: rewriting the EXIF block itself fails on odd tags."""
    check_image_size(*image.size, what)
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise nearly any exception type
        raise InputError(f"{what}: the data is damaged or truncated ({error})") from error
    turn = _UPRIGHT.get(_orientation(image))
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.format = image.format
    return upright


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata must not cost a good picture
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_to_grey(image)
    try:
        rgb = _on_white(image) if image.has_transparency_data else image.convert("RGB")
    except ValueError as error:
        raise InputError(f"image: cannot convert mode {image.mode} to RGB; save it as RGB first") from error
    rgb.info = {}  # the orientation is applied: nobody may apply it twice
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _deep_to_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError("image: contains NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    steps = {"F": (1.0, 255.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    full = next((step for step in steps if low >= 0 and high <= step), None)
    if full is None:
        values, full = values - low, high - low
    return Image.fromarray(np.rint(values * 255.0 / full).astype(np.uint8))


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    """(C, H, W) or (H, W) tensor -> (H, W, C) or (H, W) array; floats are checked and scaled to uint8."""
    values = tensor.detach().cpu()
    if values.is_floating_point():
        values = _unit_to_uint8(values.float())
    return (values.movedim(0, -1) if values.ndim == 3 else values).numpy()


def _unit_to_uint8(values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise InputError("image: the tensor contains NaN or infinite values")
    low, high = (values.min().item(), values.max().item()) if values.numel() else (0.0, 0.0)
    if low < -_FLOAT_SLACK or high > 1 + _FLOAT_SLACK:
        raise InputError(
            f"image: a floating-point tensor must lie in [0, 1], got {low:g} to {high:g}; undo any "
            "normalisation, or convert 0..255 values to torch.uint8"
        )
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _from_array(array: np.ndarray, layout: str) -> Image.Image:
    """uint8 (H, W) or (H, W, C) array -> image of mode L, RGB or RGBA."""
    if array.dtype != np.uint8:
        raise InputError(f"image: the {layout} must be uint8, got {array.dtype}; scale it to 0..255 first")
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in _CHANNEL_MODES:
        raise InputError(
            f"image: expected one {layout} with 1, 3 or 4 channels, got shape {_given_shape(array, layout)}; "
            "pass a batch as a list of images (numpy: channels last, torch: channels first)"
        )
    check_image_size(array.shape[1], array.shape[0])
    pixels = array[..., 0] if array.ndim == 3 and channels == 1 else array
    return Image.fromarray(np.ascontiguousarray(pixels))


def _given_shape(array: np.ndarray, layout: str) -> tuple[int, ...]:
    channels_first = layout.startswith("tensor") and array.ndim == 3
    return (array.shape[2], *array.shape[:2]) if channels_first else array.shape


def _shorten(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= 200 else text[:197] + "...")
