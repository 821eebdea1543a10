"""Procedural scenes: an endless, seeded source of pictures with exact masks, names and captions.

    composer = SceneComposer(SpriteLibrary.from_folders(["emoji", "grocery"]), backgrounds=["backgrounds/images"])
    scene = composer.scene(seed=7)             # 3 to 7 objects that may cover each other, (400, 300) pixels
    mosaic = composer.mosaic(seed=7)           # a grid of single objects: many labelled views per picture
    SceneComposer().scene(seed=7)              # drawn shapes on drawn backgrounds: needs no files

A scene is a pure function of the composer's settings, the seed and the size: workers need no common state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError
from ..images import check_image_size
from . import wording
from .backgrounds import Backgrounds, draw_background
from .canvas import Canvas, Patch, random_shadow, scale_and_turn, to_patch, to_picture
from .colours import name_colours
from .finish import roughen
from .shapes import SHAPE_COLOURS, SIZES, draw_shape
from .sprites import Sprite, SpriteLibrary
from .wording import Thing

if TYPE_CHECKING:
    from .samples import RegionSample

Size = tuple[int, int]

MIN_SIDE = 32  # of a picture
MIN_PIXELS = 30  # objects of which less is visible are not listed
LARGEST = 0.5  # longest side of an object, in shares of the picture's shorter side ...
SMALLEST = 0.16
MAX_ENLARGED = 1.25  # ... but sprites are never scaled up more than this
MAX_TURN = 22.0  # degrees
MAX_GRID = 15  # an id map has room for 255 objects
MIN_CELL = 16  # pixels
_TRIES = 6  # places tried for one object
_SCENE, _MOSAIC = 0, 1  # tags that keep the random numbers of both forms apart
_ONE_SIDED = ("left", "right", "quarter", "waxing", "waning", "o’clock")  # names that mirroring would make wrong


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows; objects back to front.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        masks: (M, H, W) bool, the visible pixels of each object: disjoint, none empty.
        things: M objects in words: name, phrase, colours, where they lie, what hides them.
        captions: M lists of captions (short, long, varied), empty where the phrase lacks the name.
        kinds: M of "shape", "emoji", "grocery", "garment", "object".
        attributes: M dicts; of shapes `shape`, `colour`, `texture`, `size`; else empty.
        visible: M shares of the object within the picture that no other object covers.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    things: list[Thing]
    captions: list[list[str]]
    kinds: list[str]
    attributes: list[dict[str, str]]
    visible: list[float]

    @property
    def names(self) -> list[str]:
        """M names, lower-case."""
        return [thing.name for thing in self.things]

    @property
    def phrases(self) -> list[str]:
        """M phrases, name with article."""
        return [thing.phrase for thing in self.things]

    @property
    def colours(self) -> list[list[str]]:
        """M lists of colour words, commonest first."""
        return [list(thing.colours) for thing in self.things]

    def to_sample(self) -> RegionSample:
        """The scene as a training sample; attributes, colours and so on ride along with each region.

        For conversations about it see `instructions`.
        """
        from .samples import RegionSample

        regions = [
            {
                "id": index,
                "mask": self.masks[index],
                "category": thing.name,
                "captions": self.captions[index],
                "attributes": self._attributes(index),
            }
            for index, thing in enumerate(self.things)
        ]
        return RegionSample(image=self.image, regions=regions, source="scenes")

    def _attributes(self, index: int) -> dict[str, Any]:
        thing = self.things[index]
        fixed = {"kind": self.kinds[index], "phrase": thing.phrase, "colours": list(thing.colours)}
        return {**fixed, "visible": round(self.visible[index], 3), **self.attributes[index]}


@dataclass(frozen=True)
class _Object:
    """One object on its way into a scene: words, and a patch that is ready to paste."""

    thing: Thing
    kind: str
    patch: Patch
    attributes: dict[str, str] = field(default_factory=dict)


class SceneComposer:
    """Composes scenes of sprites and drawn shapes.

    Args:
        sprites: objects to paste; without them all objects are drawn shapes.
        backgrounds: folders or files of pictures; without them backgrounds are drawn.
        shape_share: share of the objects that are drawn shapes.
        drawn_share: share of the backgrounds that are drawn although there are pictures.
        objects: least and most objects of a scene.

    Raises:
        InputError: a share outside 0..1, impossible numbers of objects, or no picture at `backgrounds`.
    """

    def __init__(
        self,
        sprites: SpriteLibrary | None = None,
        backgrounds: Sequence[str | Path] = (),
        shape_share: float = 0.15,
        drawn_share: float = 0.15,
        objects: tuple[int, int] = (3, 7),
    ) -> None:
        if not (0 <= shape_share <= 1 and 0 <= drawn_share <= 1):
            raise InputError(f"shape_share and drawn_share must lie in 0..1, got {shape_share} and {drawn_share}")
        if not 1 <= objects[0] <= objects[1] <= 200:
            raise InputError(f"objects: expected (least, most) within 1..200, got {objects}")
        self.sprites = sprites
        self.backgrounds = Backgrounds(backgrounds)
        self.shape_share = shape_share if sprites is not None else 1.0
        self.drawn_share = drawn_share if len(self.backgrounds) else 1.0
        self.objects = objects

    def scene(self, seed: int, size: Size = (400, 300)) -> Scene:
        """Objects of many sizes, the largest first, that may cover each other or stick out of the picture.

        Args:
            seed: non-negative.
            size: (width, height) in pixels.

        Raises:
            InputError: a negative seed, or a side below 32 pixels.
        """
        rng = _random(seed, _SCENE, size)
        canvas = Canvas(self._background(rng, size))
        scale = min(size)
        wanted = int(rng.integers(self.objects[0], self.objects[1] + 1))
        sides = np.sort(rng.uniform(SMALLEST, LARGEST, wanted))[::-1]
        placed = []
        for side in (sides * scale).tolist():
            item = self._object(rng, side, scale, picture=canvas.picture)
            if _find_place(rng, canvas, item.patch, side):
                placed.append(item)
        return _finish(rng, canvas, placed)

    def mosaic(self, seed: int, size: Size = (256, 256), grid: int | None = None) -> Scene:
        """A grid of single objects, each alone on a background of its own.

        Args:
            seed: non-negative.
            size: (width, height) in pixels.
            grid: cells a side; at random 3 to 5 by default.

        Raises:
            InputError: a negative seed, a side below 32 pixels, or more cells than fit.
        """
        rng = _random(seed, _MOSAIC, size)
        most = min(MAX_GRID, min(size) // MIN_CELL)
        grid = min(most, int(rng.integers(3, 6))) if grid is None else grid
        if not 1 <= grid <= most:
            raise InputError(f"mosaic of {size[0]}x{size[1]} pixels: 1 to {most} cells a side are possible, got {grid}")
        canvas = Canvas(Image.new("RGB", size))
        edges = [[round(length * i / grid) for i in range(grid + 1)] for length in size]
        placed = []
        for row in range(grid):
            for column in range(grid):
                left, top = edges[0][column], edges[1][row]
                cell = edges[0][column + 1] - left, edges[1][row + 1] - top
                placed += self._fill_cell(rng, canvas, (left, top), cell)
        return _finish(rng, canvas, placed)

    def _fill_cell(self, rng: np.random.Generator, canvas: Canvas, corner: Size, cell: Size) -> list[_Object]:
        """Background and object of one cell; no object where it covers no pixel by half."""
        item = self._object(rng, min(cell) * rng.uniform(0.5, 1.0), min(cell), room=cell)
        canvas.picture.paste(self._cell_background(rng, cell, item.patch), corner)
        shares = rng.random(2).tolist()
        x, y = (int((free - taken) * share) for free, taken, share in zip(cell, item.patch.size, shares, strict=True))
        return [item] if canvas.place(item.patch, corner[0] + x, corner[1] + y) else []

    # Backgrounds

    def _background(self, rng: np.random.Generator, size: Size) -> Image.Image:
        if rng.random() < self.drawn_share:
            return draw_background(rng, size)
        return self.backgrounds.crop(rng, size)

    def _cell_background(self, rng: np.random.Generator, cell: Size, patch: Patch) -> Image.Image:
        """Plain, drawn, a part of a picture, or plain in a colour near the object's own."""
        dice = rng.random()
        if dice < 0.15:
            return Image.new("RGB", cell, tuple(rng.integers(0, 256, 3).tolist()))
        if dice < 0.30:
            return Image.new("RGB", cell, _near_colour(rng, patch))
        if dice < 0.65 and len(self.backgrounds):
            return self.backgrounds.crop(rng, cell, least=0.2)
        return draw_background(rng, cell)

    # Objects

    def _object(
        self,
        rng: np.random.Generator,
        side: float,
        scale: float,
        room: Size | None = None,
        picture: Image.Image | None = None,
    ) -> _Object:
        """One object with that longest side, in a `room` of its own or on a `picture`."""
        if rng.random() < self.shape_share:
            return _shape_object(rng, side, scale, picture)
        assert self.sprites is not None
        return _sprite_object(rng, self.sprites.sample(rng), side, scale, room)


def _random(seed: int, tag: int, size: Size) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    check_image_size(*size, "scene")
    if min(size) < MIN_SIDE:
        raise InputError(f"scene: {size[0]}x{size[1]} is too small; both sides need at least {MIN_SIDE} pixels")
    return np.random.default_rng((seed, tag))


# Objects


def _shape_object(rng: np.random.Generator, side: float, scale: float, picture: Image.Image | None) -> _Object:
    """A drawn shape whose size is clearly small, medium or large; at times in a colour of what lies around."""
    size, side = ("", 0.92 * side) if picture is None else _clear_size(side, scale)
    colour = None
    if picture is not None and rng.random() < 0.15:
        around = np.asarray(picture.resize((8, 8), Image.Resampling.NEAREST))
        colour = next((word for word in name_colours(around) if word in SHAPE_COLOURS), None)
    shape = draw_shape(rng, side, colour)
    thing = Thing(
        name=shape.name,
        phrase=wording.with_article(shape.name),
        colours=shape.colours,
        kind="shape",
        texture="" if shape.texture == "solid" else shape.texture,
        size=_said_size(size),
    )
    attributes = {"shape": shape.name, "colour": shape.colours[0], "texture": shape.texture}
    return _Object(thing, "shape", to_patch(to_picture(shape.pixels)), attributes | ({"size": size} if size else {}))


def _clear_size(side: float, scale: float) -> tuple[str, float]:
    """The word for a size, and the size moved out of the gaps between words."""
    share = side / scale
    word = min(SIZES, key=lambda word: max(SIZES[word][0] - share, share - SIZES[word][1]))
    low, high = SIZES[word]
    return word, min(max(share, low), high) * scale


def _sprite_object(rng: np.random.Generator, sprite: Sprite, side: float, scale: float, room: Size | None) -> _Object:
    """A sprite, turned on half of the occasions; in a room of its own also mirrored, and without a word for size."""
    dice = rng.random(4).tolist()
    picture = to_picture(sprite.pixels)
    side = min(side, MAX_ENLARGED * max(picture.size))
    turn = MAX_TURN * (2 * dice[2] - 1) if dice[1] < 0.5 else 0.0
    picture = scale_and_turn(rng, picture, side, turn, room)
    if room is not None and dice[0] < 0.5 and not any(word in sprite.name for word in _ONE_SIDED):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    kind = sprite.group if sprite.group in wording.KIND_WORDS else sprite.kind
    size = "" if room is not None else _said_size(_clear_size(side, scale)[0])
    thing = Thing(sprite.name, sprite.phrase, sprite.colours, kind, size=size)
    return _Object(thing, sprite.kind, to_patch(picture, 0.82 + 0.3 * dice[3]))


def _said_size(word: str) -> str:
    return "" if word == "medium" else word


def _near_colour(rng: np.random.Generator, patch: Patch) -> tuple[int, ...]:
    """A colour near the mean of a patch, so that colour alone does not give the mask away."""
    colour, alpha = (np.asarray(part.reduce(max(part.size))).ravel() for part in (patch.colour, patch.alpha))
    mean = colour * (255 / max(int(alpha[0]), 1)) + rng.uniform(-25, 25, 3)
    return tuple(mean.clip(0, 255).astype(int).tolist())


def _find_place(rng: np.random.Generator, canvas: Canvas, patch: Patch, side: float) -> bool:
    """Try some random places. Most let the object stick out a little, some by half its size."""
    height, width = canvas.ids.shape
    shadow = random_shadow(rng, side)
    out = 0.5 if rng.random() < 0.2 else 0.12
    for x, y in rng.random((_TRIES, 2)).tolist():
        left, top = (
            int(share * (whole - (1 - 2 * out) * length) - out * length)
            for share, whole, length in zip((x, y), (width, height), patch.size, strict=True)
        )
        if canvas.place(patch, left, top, shadow):
            return True
    return False


# Words


def _finish(rng: np.random.Generator, canvas: Canvas, placed: list[_Object]) -> Scene:
    """Roughen the picture, list what is visible, and describe it."""
    keep = [index for index in range(len(placed)) if canvas.visible[index] >= MIN_PIXELS]
    place_of = {index: new for new, index in enumerate(keep)}
    middles = canvas.middles()
    things = [
        replace(
            placed[index].thing,
            middle=middles[index],
            area=canvas.visible[index] / canvas.ids.size,
            hidden_by=_hiders(canvas.hidden_by[index], place_of),
        )
        for index in keep
    ]
    objects = [placed[index] for index in keep]
    return Scene(
        image=np.asarray(roughen(rng, canvas.picture)),
        masks=canvas.masks(keep),
        things=things,
        captions=[wording.captions(rng, things, index) for index in range(len(things))],
        kinds=[item.kind for item in objects],
        attributes=[item.attributes for item in objects],
        visible=[canvas.visible[index] / canvas.areas[index] for index in keep],
    )


def _hiders(taken: dict[int, int], place_of: dict[int, int]) -> tuple[int, ...]:
    """Listed objects that took pixels, by how many they took."""
    return tuple(place_of[index] for index in sorted(taken, key=lambda i: -taken[i]) if index in place_of)
