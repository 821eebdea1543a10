"""Procedural scenes of drawn shapes: the training world of the provisional bundled model ``tap-tiny``.

A scene is a textured background with a few coloured shapes that may cover each other. Every scene is a pure
function of its seed and size, comes with exact visible masks, and needs no data set:

    scene = draw_scene(seed=7)            # scene.image (256, 256, 3) uint8, scene.masks (M, 256, 256) bool
    scene.names[0], scene.captions[0]     # "star", "a small striped red star"
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Size = int | tuple[int, int]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 32, 36),
    "orange": (246, 138, 24),
    "yellow": (246, 220, 46),
    "green": (42, 158, 62),
    "blue": (36, 84, 206),
    "purple": (122, 46, 162),
    "pink": (246, 142, 184),
    "brown": (124, 76, 36),
    "white": (244, 244, 240),
    "black": (28, 28, 30),
}
TEXTURES = ("solid", "striped", "dotted")
MIN_VISIBLE = 0.4  # share of a shape that later shapes must leave uncovered
SMALL, LARGE = 0.12, 0.18  # radius over the geometric mean side: where "small" ends and "large" begins


@dataclass(frozen=True)
class Scene:
    """One drawn picture.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        masks: (M, H, W) bool, the visible pixels of each shape; no two masks overlap.
        names: M shape names out of `SHAPE_NAMES`.
        captions: M phrases; each holds the colour and the name.
        colours: M colour names out of `COLOURS`.
    """

    image: np.ndarray
    masks: np.ndarray
    names: list[str]
    captions: list[str]
    colours: list[str]


# Outlines: polygons around the origin, radius about 1, y down


def _regular(corners: int, inner: float = 1.0, width: float = 1.0) -> np.ndarray:
    """Regular polygon with a corner on top; `inner` < 1 alternates radii, which makes a star."""
    angles = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2
    radii = np.where(np.arange(corners) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles) * width, radii * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16


def _drop() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return np.stack([1.15 * np.sin(t) * np.sin(t / 2) ** 1.6, -np.cos(t)], axis=1)


def _flower() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 80, endpoint=False)
    radius = 0.72 + 0.28 * np.cos(6 * t)
    return np.stack([radius * np.cos(t), radius * np.sin(t)], axis=1)


def _cross(arm: float = 0.32) -> np.ndarray:
    top = np.array([(-arm, -arm), (-arm, -1), (arm, -1)])
    quarter = np.array([[0, 1], [-1, 0]])
    return np.concatenate([top @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])


def _arrow() -> np.ndarray:
    return np.array([(-1, -0.26), (0.1, -0.26), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.26), (-1, 0.26)])


def _square() -> np.ndarray:
    return np.array([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])


@dataclass(frozen=True)
class _Shape:
    """An outline, the largest turn in degrees, and an optional hole (offset x, radius), in radii."""

    outline: Callable[[], np.ndarray]
    max_turn: float = 25.0
    hole: tuple[float, float] | None = None


_SHAPES: dict[str, _Shape] = {
    "circle": _Shape(lambda: _regular(48)),
    "oval": _Shape(lambda: _regular(48, width=0.55), max_turn=40),
    "square": _Shape(_square, max_turn=12),
    "diamond": _Shape(lambda: _regular(4, width=0.62), max_turn=12),
    "triangle": _Shape(lambda: _regular(3)),
    "hexagon": _Shape(lambda: _regular(6)),
    "star": _Shape(lambda: _regular(10, inner=0.42)),
    "heart": _Shape(_heart),
    "ring": _Shape(lambda: _regular(48), hole=(0.0, 0.52)),
    "crescent": _Shape(lambda: _regular(48), hole=(0.46, 0.8)),
    "cross": _Shape(_cross, max_turn=15),
    "arrow": _Shape(_arrow),
    "drop": _Shape(_drop),
    "flower": _Shape(_flower),
}
SHAPE_NAMES: tuple[str, ...] = tuple(_SHAPES)
_OUTLINES: dict[str, np.ndarray] = {name: shape.outline() for name, shape in _SHAPES.items()}


def _shape_alpha(name: str, radius: float, turn: float) -> np.ndarray:
    """Antialiased cover in a square patch of side 2 * ceil(1.15 * radius), float32 in [0, 1]."""
    half = math.ceil(1.15 * radius)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array([[cos, sin], [-sin, cos]])
    canvas = Image.new("L", (4 * half, 4 * half))
    draw = ImageDraw.Draw(canvas)
    corners = (_OUTLINES[name] @ rotation) * (2 * radius) + 2 * half
    draw.polygon(corners.ravel().tolist(), fill=255)
    hole = _SHAPES[name].hole
    if hole is not None:
        x, y = np.array([hole[0], 0.0]) @ rotation * (2 * radius) + 2 * half
        r = hole[1] * 2 * radius
        draw.ellipse((x - r, y - r, x + r, y + r), fill=0)
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


# Colours and textures


def _turned_axes(width: int, height: int, turn: float, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Two (H, W) float32 coordinates, scaled, around the middle, of axes turned by `turn` radians."""
    x = ((np.arange(width) - width / 2) * scale).astype(np.float32)[None]
    y = ((np.arange(height) - height / 2) * scale).astype(np.float32)[:, None]
    return x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)


def _pattern(rng: np.random.Generator, texture: str, side: int) -> np.ndarray:
    """(side, side) bool: the pixels of a patch that take the second colour of a striped or dotted shape."""
    if texture == "solid":
        return np.zeros((side, side), dtype=bool)
    period = max(7.0, side / rng.uniform(5, 8))
    turn = rng.uniform(0, math.pi)
    u, v = _turned_axes(side, side, turn, scale=2 * math.pi / period)
    return np.sin(u) > 0.1 if texture == "striped" else np.sin(u) + np.sin(v) > 0.75


def _paint(rng: np.random.Generator, colour: str, texture: str, side: int) -> np.ndarray:
    """(3, side, side) float32 paint: a jittered colour, a lighter or darker twin as pattern, soft light."""
    base = (COLOURS[colour] + rng.uniform(-14, 14, 3)).astype(np.float32)[:, None, None]
    lighter = base.mean() < 110
    second = base + (255 - base) * rng.uniform(0.35, 0.5) if lighter else base * rng.uniform(0.5, 0.65)
    paint = np.where(_pattern(rng, texture, side), second, base)
    ramp, _ = _turned_axes(side, side, rng.uniform(0, 2 * math.pi), scale=rng.uniform(0, 0.25) / side)
    return paint * (1 + ramp)


def _blobs(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W) float32 in [0, 1]: smooth noise."""
    cells = int(rng.integers(3, 12))
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _background_blend(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W) float32 in [0, 1]: how two background colours mix; a ramp, blobs, stripes, or checks."""
    kind = rng.choice(["ramp", "blobs", "stripes", "checks"])
    if kind == "blobs":
        return _blobs(rng, width, height)
    turn, side = rng.uniform(0, 2 * math.pi), max(width, height)
    u, v = _turned_axes(width, height, turn)
    if kind == "ramp":
        return np.clip(u / side + 0.5, 0, 1)
    frequency = 2 * math.pi / rng.uniform(0.04 * side, 0.3 * side)
    if kind == "stripes":
        return 0.5 + 0.5 * np.sin(u * frequency)
    return (np.sin(u * frequency) * np.sin(v * frequency) > 0).astype(np.float32)


def _to_image(planes: np.ndarray) -> np.ndarray:
    """(3, H, W) float32 planes, which are fast to paint, as an (H, W, 3) uint8 picture."""
    return np.ascontiguousarray(np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(3, H, W) float32 background: two colours, blended, sometimes with thin lines."""
    first = (rng.uniform(50, 205) + rng.uniform(-45, 45, (3, 1, 1))).astype(np.float32)  # muted, unlike shapes
    second = np.clip(first + rng.uniform(-60, 60, (3, 1, 1)).astype(np.float32), 5, 250)
    canvas = first + _background_blend(rng, width, height) * (second - first)
    if rng.random() < 0.7:
        return canvas
    image = Image.fromarray(_to_image(canvas))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 9))):
        ends = (rng.uniform(0, 1, 4) * (width, height, width, height)).tolist()
        draw.line(ends, fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 5)))
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy()


# Scenes


class _Canvas:
    """The picture so far with its id map (0 = background, i + 1 = the i-th shape)."""

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.pixels = _background(rng, width, height)
        self.ids = np.zeros((height, width), dtype=np.int32)
        self.areas = np.zeros(0, dtype=np.int64)  # pixels of each shape when it was drawn ...
        self.visible = np.zeros(0, dtype=np.int64)  # ... and what later shapes left of them

    def _window(self, left: int, top: int, side: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where a patch lies: index into the canvas, and index into the patch (it may stick out)."""
        height, width = self.ids.shape
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
        inside = slice(y0, y1), slice(x0, x1)
        return inside, (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))

    def add(self, alpha: np.ndarray, paint: np.ndarray, left: int, top: int) -> bool:
        """Draw one shape; False, with nothing drawn, where it hides an earlier one or lies mostly outside."""
        where, part = self._window(left, top, len(alpha))
        cover = alpha[part] > 0.5
        visible = self.visible - np.bincount(self.ids[where][cover], minlength=len(self.areas) + 1)[1:]
        mostly_outside = cover.sum() < 0.7 * (alpha > 0.5).sum()
        if mostly_outside or np.any(visible < MIN_VISIBLE * self.areas):
            return False
        self._shadow(alpha, left, top)
        pixels = self.pixels[:, *where]
        pixels += alpha[part] * (paint[:, *part] - pixels)
        self.areas = np.append(self.areas, cover.sum())
        self.visible = np.append(visible, cover.sum())
        self.ids[where][cover] = len(self.areas)
        return True

    def _shadow(self, alpha: np.ndarray, left: int, top: int) -> None:
        if self.rng.random() < 0.5:
            return
        margin = max(2, len(alpha) // 12)
        soft = Image.fromarray((np.pad(alpha, margin) * 255).astype(np.uint8))
        soft = soft.filter(ImageFilter.BoxBlur(margin / 2))
        dx, dy = self.rng.integers(-margin, margin + 1, 2).tolist()
        where, part = self._window(left - margin + dx, top - margin + dy, soft.width)
        darkness = np.asarray(soft, dtype=np.float32)[part] * (self.rng.uniform(0.25, 0.6) / 255)
        self.pixels[:, *where] *= 1 - darkness


def _caption(rng: np.random.Generator, name: str, colour: str, texture: str, size: str) -> str:
    """A phrase with colour and name; size and texture are said most of the time."""
    words = [colour, name]
    tail = {"striped": " with stripes", "dotted": " with dots"}.get(texture, "")
    say_texture = texture != "solid" and rng.random() < 0.8
    say_as_tail = say_texture and rng.random() < 0.2
    if say_texture and not say_as_tail:
        words.insert(0, texture)
    if size and rng.random() < 0.6:
        words.insert(0, size)
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}{tail if say_as_tail else ''}"


def _size_word(radius: float, scale: float) -> str:
    return "small" if radius < SMALL * scale else "large" if radius > LARGE * scale else ""


def _add_shape(canvas: _Canvas, scale: float) -> tuple[str, str, str] | None:
    """Draw one random shape; its name, caption, and colour, or None where it found no place."""
    rng = canvas.rng
    name, colour = str(rng.choice(SHAPE_NAMES)), str(rng.choice(list(COLOURS)))
    texture = str(rng.choice(TEXTURES))
    radius = scale * rng.uniform(0.09, 0.22)
    turn = math.radians(rng.uniform(-1, 1) * _SHAPES[name].max_turn)
    alpha = _shape_alpha(name, radius, turn)
    height, width = canvas.ids.shape
    left, top = (rng.uniform(0, 1, 2) * (width, height) - len(alpha) / 2).astype(int).tolist()
    if not canvas.add(alpha, _paint(rng, colour, texture, len(alpha)), left, top):
        return None
    return name, _caption(rng, name, colour, texture, _size_word(radius, scale)), colour


def draw_scene(seed: int, size: Size = 256) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: non-negative; the same seed and size always give the same scene.
        size: the side in pixels, or (width, height).

    Returns:
        A scene with 3 to 6 shapes (fewer only where no free place was found).
    """
    width, height = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    canvas = _Canvas(rng, width, height)
    scale = min(math.sqrt(width * height), 1.5 * min(width, height))
    wanted = int(rng.integers(3, 7))
    shapes: list[tuple[str, str, str]] = []
    for _ in range(6 * wanted):  # attempts: a shape that finds no place is dropped
        shape = _add_shape(canvas, scale)
        if shape is not None:
            shapes.append(shape)
        if len(shapes) == wanted:
            break
    grain = (rng.integers(0, 256, (height, width), dtype=np.uint8) - np.float32(127.5)) * rng.uniform(0, 0.1)
    image = _to_image(canvas.pixels + grain)
    masks = canvas.ids[None] == np.arange(1, len(shapes) + 1)[:, None, None]
    names, captions, colours = (list(column) for column in zip(*shapes, strict=True))
    return Scene(image, masks, names, captions, colours)


def example_scene(seed: int = 7) -> Scene:
    """A larger scene that is not square (640 x 480), for pictures and tests."""
    return draw_scene(seed, (640, 480))


# Prompts


def box_region(mask: np.ndarray) -> dict[str, Any]:
    """The tight box of a mask; right and bottom edges are exclusive."""
    rows, columns = np.nonzero(mask)
    return {"box": [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]}


def point_region(rng: np.random.Generator, mask: np.ndarray, count: int) -> dict[str, Any]:
    """Random foreground points of a mask, x and y in pixels."""
    pixels = rng.choice(np.argwhere(mask), count)
    return {"points": [[float(x), float(y)] for y, x in pixels], "labels": [1] * count}


def random_size(rng: np.random.Generator, side: int) -> tuple[int, int]:
    """(width, height), the longer one `side` and the other at least half of it; half of the sizes are square."""
    if rng.random() < 0.5:
        return side, side
    short = int(rng.integers(side // 2, side))
    return (side, short) if rng.random() < 0.5 else (short, side)


def _looser_box(rng: np.random.Generator, mask: np.ndarray) -> dict[str, Any]:
    x0, y0, x1, y1 = box_region(mask)["box"]
    left, top, right, bottom = np.abs(rng.normal(0, 0.06, 4)).clip(0, 0.2).tolist()
    width, height = x1 - x0, y1 - y0
    return {"box": [x0 - left * width, y0 - top * height, x1 + right * width, y1 + bottom * height]}


def sample_region(rng: np.random.Generator, mask: np.ndarray) -> dict[str, Any]:
    """A prompt for a mask: about half boxes, drawn a little too large, else points, at times both.

    Several points come with one on the background in four of ten cases.
    """
    kind = rng.choice(["box", "point", "points", "both"], p=[0.45, 0.37, 0.09, 0.09])
    region = _looser_box(rng, mask) if kind in ("box", "both") else {}
    if kind != "box":
        region |= point_region(rng, mask, 1 if kind == "point" else int(rng.integers(2, 9 if kind == "points" else 5)))
    if kind == "points" and rng.random() < 0.4:
        region["points"] += point_region(rng, ~mask, 1)["points"]
        region["labels"] += [0]
    return region
