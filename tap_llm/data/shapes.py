"""Drawn shapes: coloured, textured outlines on transparent ground; the objects of scenes that need no files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .wording import pick

Points = NDArray[np.float64]

SHAPE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 32, 36),
    "orange": (246, 138, 24),
    "yellow": (246, 220, 46),
    "green": (42, 158, 62),
    "blue": (36, 84, 206),
    "light blue": (126, 190, 240),
    "purple": (122, 46, 162),
    "pink": (246, 142, 184),
    "brown": (124, 76, 46),
    "beige": (213, 191, 160),
    "grey": (132, 134, 138),
    "white": (244, 244, 240),
    "black": (28, 28, 30),
}
TEXTURES = ("solid", "striped", "dotted", "checked")
SIZES: dict[str, tuple[float, float]] = {  # diameter in shares of the picture's shorter side; gaps keep words true
    "small": (0.16, 0.24),
    "medium": (0.28, 0.36),
    "large": (0.40, 0.50),
}
_FINE = 3  # outlines are drawn so many times larger
_MARGIN = 1.04  # of the patch around the outline's circle


@dataclass(frozen=True)
class DrawnShape:
    """A shape in colour.

    Attributes:
        name: out of `SHAPE_NAMES`.
        colours: its main colour, and the second one where it differs by more than shade.
        texture: out of `TEXTURES`.
        pixels: (side, side, 4) uint8, colours premultiplied by alpha.
    """

    name: str
    colours: tuple[str, ...]
    texture: str
    pixels: NDArray[np.uint8]


# Outlines: polygons around the origin, radius about 1, y down


def _regular(corners: int, inner: float = 1.0, width: float = 1.0, turn: float = 0.0) -> Points:
    """Regular polygon, a corner on top unless turned; `inner` < 1 alternates radii, which makes a star."""
    angles = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2 + turn
    radii = np.where(np.arange(corners) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles) * width, radii * np.sin(angles)], axis=1)


def _around(radius: Callable[[Points], Points], steps: int = 96) -> Points:
    """Closed curve of a radius by angle, the angle counted from the top."""
    t = np.linspace(0, 2 * math.pi, steps, endpoint=False)
    r = radius(t)
    return np.stack([r * np.sin(t), -r * np.cos(t)], axis=1)


def _disc(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> Points:
    return _regular(48) * radius + (x, y)


def _box(x: float, y: float) -> Points:
    return np.array([(-x, -y), (x, -y), (x, y), (-x, y)])


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16


def _drop() -> Points:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return np.stack([1.15 * np.sin(t) * np.sin(t / 2) ** 1.6, -np.cos(t)], axis=1)


def _cross(arm: float = 0.32) -> Points:
    top = np.array([(-arm, -arm), (-arm, -1), (arm, -1)])
    quarter = np.array([[0, 1], [-1, 0]])
    return np.concatenate([top @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])


def _gear() -> Points:
    return _around(lambda t: 0.87 + 0.13 * np.clip(6 * np.cos(9 * t), -1, 1), steps=360)


def _leaf() -> Points:
    t = np.linspace(-1, 1, 24)
    side = 0.5 * (1 - t**2)
    return np.concatenate([np.stack([side, t], axis=1), np.stack([-side, -t], axis=1)[1:-1]])


def _arc(start: float, end: float, steps: int = 40) -> Points:
    """Part of the unit circle, degrees from the right, clockwise on screen."""
    angles = np.radians(np.linspace(start, end, steps))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


_BOLT = [(0.15, -1), (-0.6, 0.15), (-0.1, 0.15), (-0.25, 1), (0.6, -0.25), (0.08, -0.25), (0.5, -1)]
_ARROW = [(-1, -0.26), (0.1, -0.26), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.26), (-1, 0.26)]
_CHEVRON = [(-0.75, -0.75), (0.05, -0.75), (0.8, 0), (0.05, 0.75), (-0.75, 0.75), (0, 0)]
_HOURGLASS = [(-0.62, -0.9), (0.62, -0.9), (0.12, 0), (0.62, 0.9), (-0.62, 0.9), (-0.12, 0)]
_KITE = [(0, -1), (0.58, -0.3), (0, 1), (-0.58, -0.3)]
_TRAPEZOID = [(-0.5, -0.55), (0.5, -0.55), (0.95, 0.55), (-0.95, 0.55)]
_PARALLELOGRAM = [(-0.5, -0.5), (1, -0.5), (0.5, 0.5), (-1, 0.5)]
_CLOUD = [_disc(0.42, -0.52, 0.15), _disc(0.55, -0.05, -0.12), _disc(0.42, 0.5, 0.12), _box(0.55, 0.2) + (0, 0.36)]
_CLOVER = [_disc(0.46, x, y) for x, y in ((-0.46, 0), (0.46, 0), (0, -0.46), (0, 0.46))]


@dataclass(frozen=True)
class _Outline:
    """Polygons to fill, polygons to take out again, and how far the shape may turn, in degrees."""

    filled: tuple[Points, ...]
    holes: tuple[Points, ...] = ()
    max_turn: float = 25.0


def _outline(*filled: Points | list[tuple[float, float]], hole: Points | None = None, turn: float = 25.0) -> _Outline:
    return _Outline(tuple(np.array(points) for points in filled), () if hole is None else (hole,), turn)


_OUTLINES: dict[str, _Outline] = {
    "circle": _outline(_disc()),
    "oval": _outline(_regular(48, width=0.55), turn=40),
    "semicircle": _outline(_arc(180, 360) + (0, 0.45)),
    "square": _outline(_box(0.82, 0.82), turn=12),
    "rectangle": _outline(_box(1.0, 0.5), turn=30),
    "diamond": _outline(_regular(4, width=0.62), turn=10),
    "triangle": _outline(_regular(3)),
    "pentagon": _outline(_regular(5), turn=15),
    "hexagon": _outline(_regular(6), turn=15),
    "octagon": _outline(_regular(8, turn=math.pi / 8), turn=10),
    "trapezoid": _outline(_TRAPEZOID, turn=15),
    "parallelogram": _outline(_PARALLELOGRAM, turn=12),
    "kite": _outline(_KITE, turn=15),
    "star": _outline(_regular(10, inner=0.42)),
    "burst": _outline(_regular(24, inner=0.72)),
    "heart": _outline(_heart()),
    "ring": _outline(_disc(), hole=_disc(0.55)),
    "frame": _outline(_box(0.85, 0.85), hole=_box(0.52, 0.52), turn=12),
    "crescent": _outline(_disc(), hole=_disc(0.8, 0.46)),
    "cross": _outline(_cross(), turn=12),
    "arrow": _outline(_ARROW),
    "chevron": _outline(_CHEVRON),
    "drop": _outline(_drop()),
    "leaf": _outline(_leaf(), turn=45),
    "flower": _outline(_around(lambda t: 0.74 + 0.26 * np.cos(6 * t))),
    "clover": _outline(*_CLOVER),
    "cloud": _outline(*_CLOUD, turn=10),
    "gear": _outline(_gear(), hole=_disc(0.33)),
    "bolt": _outline(_BOLT, turn=15),
    "hourglass": _outline(_HOURGLASS, turn=15),
    "wedge": _outline(np.concatenate([_arc(35, 325), [(0, 0)]])),
}
SHAPE_NAMES: tuple[str, ...] = tuple(_OUTLINES)


def shape_alpha(name: str, side: float, turn: float = 0.0) -> NDArray[np.uint8]:
    """Antialiased cover of a shape.

    Args:
        name: out of `SHAPE_NAMES`.
        side: diameter of the circle around the shape, in pixels.
        turn: degrees, anticlockwise.

    Returns:
        (n, n) uint8, n a little above `side`; 255 is full cover.
    """
    n = math.ceil(side * _MARGIN) + 2
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    matrix = np.array([[cos, -sin], [sin, cos]]) * (side / 2 * _FINE)
    canvas = Image.new("L", (n * _FINE, n * _FINE))
    draw = ImageDraw.Draw(canvas)
    outline = _OUTLINES[name]
    for fill, polygons in ((255, outline.filled), (0, outline.holes)):
        for points in polygons:
            draw.polygon((points @ matrix + n * _FINE / 2).ravel().tolist(), fill=fill)
    return np.asarray(canvas.reduce(_FINE))


# Paint


@cache
def _axes(side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    steps = np.arange(side, dtype=np.float32) - side / 2
    return steps[None], steps[:, None]


def _wave(side: int, turn: float, period: float) -> NDArray[np.float32]:
    x, y = _axes(side)
    scale = 2 * math.pi / period
    return np.sin(x * np.float32(scale * math.cos(turn)) + y * np.float32(scale * math.sin(turn)))


def _pattern(rng: np.random.Generator, texture: str, side: int) -> NDArray[np.float32]:
    """(side, side) in 0..1: how much of the second colour shows; it covers less than half."""
    period = max(6.0, side / rng.uniform(3.5, 7))
    turn = rng.uniform(0, math.pi)
    waves = _wave(side, turn, period)
    if texture == "striped":
        waves = waves - 0.15
    else:
        across = _wave(side, turn + math.pi / 2, period)
        waves = waves + across - 0.7 if texture == "dotted" else waves * across * 2 - 0.3
    return np.clip(waves * (period / 4) + 0.5, 0, 1)


def _second_colour(
    rng: np.random.Generator, colour: str, base: NDArray[np.float32]
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """A lighter or darker twin, or another colour; and the words for both."""
    if rng.random() < 0.5:
        dark = base.mean() < 110
        twin = base + (255 - base) * rng.uniform(0.35, 0.5) if dark else base * rng.uniform(0.5, 0.65)
        return (colour,), twin.astype(np.float32)
    palette = np.array(list(SHAPE_COLOURS.values()), dtype=np.float32)
    index = pick(rng, np.flatnonzero(np.abs(palette - base).sum(axis=1) > 150).tolist())
    return (colour, tuple(SHAPE_COLOURS)[index]), palette[index]


def draw_shape(rng: np.random.Generator, side: float, colour: str | None = None) -> DrawnShape:
    """A random shape.

    Args:
        rng: decides everything that is not given.
        side: diameter in pixels.
        colour: out of `SHAPE_COLOURS`.
    """
    name, texture = pick(rng, SHAPE_NAMES), pick(rng, TEXTURES)
    colour = colour or pick(rng, tuple(SHAPE_COLOURS))
    max_turn = _OUTLINES[name].max_turn
    alpha = shape_alpha(name, side, rng.uniform(-max_turn, max_turn))
    base = (SHAPE_COLOURS[colour] + rng.uniform(-14, 14, 3)).astype(np.float32)
    colours, second = ((colour,), base) if texture == "solid" else _second_colour(rng, colour, base)
    pattern = None if texture == "solid" else _pattern(rng, texture, len(alpha))
    return DrawnShape(name, colours, texture, _paint(rng, alpha, base, second, pattern))


def _paint(
    rng: np.random.Generator,
    alpha: NDArray[np.uint8],
    base: NDArray[np.float32],
    second: NDArray[np.float32],
    pattern: NDArray[np.float32] | None,
) -> NDArray[np.uint8]:
    """(n, n, 4) uint8, premultiplied: two colours mixed by a pattern, under light that falls off to one side."""
    n = len(alpha)
    x, y = _axes(n)
    light = 1 + x * np.float32(rng.uniform(-0.25, 0.25) / n) + y * np.float32(rng.uniform(-0.3, 0.1) / n)
    shade = light * (alpha * np.float32(1 / 255))
    pixels = np.empty((n, n, 4), dtype=np.uint8)
    for channel in range(3):
        plane = base[channel] if pattern is None else base[channel] + pattern * (second[channel] - base[channel])
        pixels[..., channel] = np.minimum(plane * shade, alpha)
    pixels[..., 3] = alpha
    return pixels
