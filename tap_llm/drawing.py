"""Colours and anti-aliased shapes for `tap_llm.visualize`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
SUPERSAMPLING = 4
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_FIRST_HUE = math.radians(255)
_LIGHTNESS = (0.66, 0.70, 0.77, 0.60, 0.83, 0.73)  # six steps: indices of near equal hue (5, 8, 13 on) differ
_CHROMA = 0.19


# Colours


def _oklch_to_linear(lightness: float, chroma: float, hue: float) -> NDArray[np.float64]:
    """OKLCH (hue in radians) to linear sRGB, possibly outside [0, 1]; matrices of B. Ottosson, 2020."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    cones = np.array(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    return np.asarray(to_rgb @ cones**3, dtype=np.float64)


def region_color(index: int) -> Color:
    """sRGB colour (0 to 255) of the region with this index: golden-angle hues in OKLCH, always the same.

    Colours of neighbouring indices lie far apart. Chroma is reduced where sRGB cannot show it.
    """
    lightness, hue = _LIGHTNESS[index % len(_LIGHTNESS)], _FIRST_HUE + index * _GOLDEN_ANGLE
    chromas = np.linspace(_CHROMA, 0, 40)
    candidates = (_oklch_to_linear(lightness, chroma, hue) for chroma in chromas)
    linear = next(c for c in candidates if c.min() >= -1e-4 and c.max() <= 1 + 1e-4)
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = np.rint(255 * encoded).astype(int).tolist()
    return red, green, blue


def _luminance(color: Color) -> float:
    channels = np.array(color) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast_ratio(first: Color, second: Color) -> float:
    """WCAG contrast between two sRGB colours, 1 to 21."""
    dark, light = sorted((_luminance(first), _luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(color: Color) -> Color:
    """Black or white, whichever reads better on this colour; the contrast is always above 4.5."""
    return max((BLACK, WHITE), key=lambda ink: contrast_ratio(color, ink))


# Shapes


def paint(canvas: Image.Image, rect: Sequence[float], color: Color, opacity: float, draw: Callable[..., None]) -> None:
    """Pastes a colour through an anti-aliased mask.

    `draw(pen, at, factor)` draws with 255 on the mask; `at` maps canvas to mask coordinates, `factor` scales
    lengths. Only the part of `rect` inside the canvas is painted.
    """
    x0, y0 = (max(math.floor(value), 0) for value in rect[:2])
    x1, y1 = min(math.ceil(rect[2]), canvas.width), min(math.ceil(rect[3]), canvas.height)
    if x0 >= x1 or y0 >= y1:
        return
    area = (x1 - x0) * (y1 - y0)
    factor = SUPERSAMPLING if area < 4_000_000 else 2 if area < 16_000_000 else 1  # bounds the mask's memory
    mask = Image.new("L", ((x1 - x0) * factor, (y1 - y0) * factor))
    draw(ImageDraw.Draw(mask), lambda x, y: ((x - x0) * factor, (y - y0) * factor), factor)
    alpha = mask.reduce(factor).point(lambda value: value * opacity)
    canvas.paste(color, (x0, y0), alpha)


def disc(canvas: Image.Image, center: Point, radius: float, color: Color, opacity: float = 1.0) -> None:
    """A filled circle."""
    x, y = center
    rect = (x - radius, y - radius, x + radius, y + radius)

    def draw(pen: ImageDraw.ImageDraw, at: Callable[..., Point], factor: int) -> None:
        pen.ellipse([at(*rect[:2]), at(*rect[2:])], fill=255)

    paint(canvas, rect, color, opacity, draw)


def stroke(canvas: Image.Image, points: Sequence[Point], width: float, color: Color, opacity: float = 1.0) -> None:
    """A polyline with round joints and ends."""
    path, half = np.array(points, dtype=np.float64), width / 2
    low, high = path.min(0) - half - 1, path.max(0) + half + 1

    def draw(pen: ImageDraw.ImageDraw, at: Callable[..., Point], factor: int) -> None:
        corners = [at(x, y) for x, y in path.tolist()]
        if len(corners) > 1:
            pen.line(corners, fill=255, width=max(1, round(width * factor)))
        radius = half * factor
        for x, y in corners:
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)

    paint(canvas, (*low, *high), color, opacity, draw)


def rounded(canvas: Image.Image, rect: Sequence[float], radius: float, color: Color, opacity: float = 1.0) -> None:
    """A filled rectangle with round corners."""

    def draw(pen: ImageDraw.ImageDraw, at: Callable[..., Point], factor: int) -> None:
        (x0, y0), (x1, y1) = at(*rect[:2]), at(*rect[2:])
        pen.rounded_rectangle([x0, y0, x1 - 1, y1 - 1], radius * factor, fill=255)

    paint(canvas, rect, color, opacity, draw)


def frame(canvas: Image.Image, rect: Sequence[float], width: int, color: Color, opacity: float = 1.0) -> None:
    """An axis-aligned rectangle's outline, centred on the edge, on whole pixels (no blur)."""
    far = np.array([canvas.width, canvas.height] * 2) + 2 * width  # further out would only cost memory
    x0, y0, x1, y1 = np.rint(np.clip(rect, -2 * width, far) - width / 2).astype(int).tolist()
    tint = Image.new("L", (x1 - x0 + width, y1 - y0 + width))
    size = (0, 0, tint.width - 1, tint.height - 1)
    ImageDraw.Draw(tint).rectangle(size, outline=round(255 * opacity), width=width)
    canvas.paste(color, (x0, y0), tint)
