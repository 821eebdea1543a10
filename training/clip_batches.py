"""Pictures with masks and phrases for a small CLIP: scenes, mosaics, and a view of one object of each.

Batch n is a function of its number and the seed alone, whatever process or worker makes it.
Symbols: D pictures, V = D views, S side, g = S / patch cells a side, R regions, T phrases, K background words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tap_llm.data.scenes import Scene, SceneComposer
from tap_llm.data.shapes import SHAPE_COLOURS, SHAPE_NAMES
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.data.wording import Thing, pick, with_article
from tap_llm.errors import InputError

from .clip_phrases import Phrase, draw_background_words, draw_caption, draw_phrase
from .clip_views import random_blob, view_of
from .sources import VALIDATION_SEED, DataConfig, make_composers

LEAST_CELLS = 0.75  # of which less is visible has no phrase
NOTHING = -1


@dataclass
class ClipDataConfig:
    """What is shown and said."""

    sprites: list[str] = field(default_factory=list)
    """Folders of named cut-outs (see `SpriteLibrary`); none: drawn shapes only."""
    backgrounds: list[str] = field(default_factory=list)
    """Folders of pictures behind the objects; none: drawn backgrounds."""
    hold_out: float = 0.0
    """Share of the sprite names of each subgroup that is never shown."""
    shape_share: float = 0.15
    """Share of drawn shapes among the objects."""
    bundled_share: float = 0.0
    """Share of pictures that show the bundled pictograms and drawn shapes alone, half of them on drawn backgrounds."""
    mosaic_share: float = 0.5
    """Share of pictures that are mosaics of single objects, from which names are learned fastest."""
    mosaic_grid: list[int] = field(default_factory=lambda: [2, 4])
    """Fewest and most cells a side of mosaics."""
    scene_side: list[int] = field(default_factory=lambda: [192, 320])
    """Smallest and largest longer side of scenes in pixels; a random window of them is shown."""
    aspect: float = 1.5
    """Largest ratio of the sides of scenes; what is shown of them is squashed into a square, as CaR does for g."""
    alone_share: float = 0.15
    """Share of views that show one large object by itself."""
    background_share: float = 0.1
    """Share of views that point at a place without object."""
    distractors: int = 48
    """Phrases of a batch about what is not in it."""
    background_words: int = 12
    """Words of a batch for what lies behind objects."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be."""
        for name in ("bundled_share", "mosaic_share", "alone_share", "background_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.alone_share + self.background_share > 1:
            raise InputError("data.alone_share and data.background_share must add up to at most 1")
        if self.bundled_share and self.hold_out:
            raise InputError("data.bundled_share would show names that data.hold_out leaves out: set one of them to 0")
        if not 1 <= self.aspect <= 4:
            raise InputError(f"data.aspect must lie between 1 and 4, got {self.aspect}")
        if self.distractors < 0 or self.background_words < 1:
            raise InputError("data.distractors must not be negative, and data.background_words at least 1")
        for name, pair in (("scene_side", self.scene_side), ("mosaic_grid", self.mosaic_grid)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise InputError(f"data.{name} must be two positive numbers, the smaller first, got {pair}")


@dataclass
class ClipPicture:
    """A picture, its regions, and a view of one of them.

    Attributes:
        image: (S, S, 3) uint8.
        ids: (S, S) int64, index of the object that is visible, -1 for none.
        things: its objects.
        view: (S, S, 3) uint8.
        viewed: what the view points at; None for background.
    """

    image: NDArray[np.uint8]
    ids: NDArray[np.int64]
    things: list[Thing]
    view: NDArray[np.uint8]
    viewed: Thing | None


class ClipPictures:
    """Picture n of an endless stream.

    Args:
        config: the mixture.
        side: S.
        patch: side of a patch in pixels.
        seed: another seed, other pictures.
        composers: of scenes with all objects, and with the bundled ones; made by default.

    Raises:
        InputError: settings that cannot be, or data that cannot be read.
    """

    def __init__(
        self,
        config: ClipDataConfig,
        side: int,
        patch: int,
        seed: int = 0,
        composers: tuple[SceneComposer, SceneComposer] | None = None,
    ) -> None:
        config.check()
        self.config, self.side, self.patch, self.seed = config, side, patch, seed
        self.composers = composers or _composers(config)
        used = self.composers if config.bundled_share else self.composers[:1]
        self.vocabulary = list(dict.fromkeys(thing for composer in used for thing in things_of(composer)))
        self.names = {thing.name for thing in self.vocabulary}

    def for_validation(self) -> ClipPictures:
        """Other pictures of the same kind."""
        return ClipPictures(self.config, self.side, self.patch, VALIDATION_SEED, self.composers)

    def texts(self, count: int) -> Iterator[str]:
        """What may be said of every object, several times in other words, to train a tokenizer on."""
        rng = np.random.default_rng((self.seed, 7))
        for _ in range(count):
            yield from (draw_phrase(rng, thing).text for thing in self.vocabulary)
            yield from draw_background_words(rng, 100, self.names)

    def __getitem__(self, number: int) -> ClipPicture:
        rng = np.random.default_rng((self.seed, number))
        config, seed, side = self.config, int(rng.integers(2**62)), self.side
        composer = self.composers[int(rng.random() < config.bundled_share)]
        if rng.random() < config.mosaic_share:
            low, high = config.mosaic_grid
            scene = composer.mosaic(seed, (side, side), grid=int(rng.integers(low, high + 1)))
            image, ids = scene.image, painted(scene)
        else:
            scene = composer.scene(seed, self._scene_size(rng))
            image, ids = window(rng, scene.image, painted(scene), side)
        view, viewed = self._view(rng, image, ids, scene.things, composer)
        return ClipPicture(image, ids, scene.things, view, viewed)

    def _scene_size(self, rng: np.random.Generator) -> tuple[int, int]:
        """Width and height, either the longer."""
        longer = int(rng.integers(self.config.scene_side[0], self.config.scene_side[1] + 1))
        shorter = round(longer / rng.uniform(1, self.config.aspect))
        return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)

    def _view(
        self,
        rng: np.random.Generator,
        image: NDArray[np.uint8],
        ids: NDArray[np.int64],
        things: list[Thing],
        composer: SceneComposer,
    ) -> tuple[NDArray[np.uint8], Thing | None]:
        """One object of the picture or its background pointed at, or another object alone."""
        kind, config = rng.random(), self.config
        visible = np.unique(ids[ids >= 0]).tolist()
        blob = random_blob(rng, ids < 0) if kind < config.background_share else None
        if blob is not None and blob.any():
            return view_of(rng, image, blob, self.patch), None
        if not visible or kind < config.background_share + config.alone_share:
            scene = composer.mosaic(int(rng.integers(2**62)), (self.side, self.side), grid=1)
            return scene.image, scene.things[0] if scene.things else None
        chosen = pick(rng, visible)
        return view_of(rng, image, ids == chosen, self.patch), things[chosen]


class ClipBatches:
    """Micro-batch n as tensors.

    Args:
        pictures: picture n.
        tokenizer: of the CLIP.
        batch_size: D.
        length: number of batches; None for an endless run.
    """

    def __init__(
        self, pictures: ClipPictures, tokenizer: PreTrainedTokenizerBase, batch_size: int, length: int | None = None
    ) -> None:
        self.pictures, self.tokenizer, self.batch_size, self.length = pictures, tokenizer, batch_size, length

    def __len__(self) -> int:
        return self.length if self.length is not None else 2**40

    def take_problems(self) -> list[str]:
        """Nothing can be broken here."""
        return []

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """A batch.

        Returns:
            `images` (D + V, S, S, 3) uint8, the views last; `cover` (R, g * g) float32, share of each cell that shows
            the region, and `region_image_index` (R,); `picked` (D,) one region of each picture, -1 for none;
            `input_ids` (T + K + D, L) of phrases, background words and captions of the pictures; `positives`
            (R + V, T + K) bool, which of the first two are true of each region and each view; `is_background` (T + K,)
            bool. A place without object fits all background words, for nobody knows which.
        """
        first = number * self.batch_size
        shown = [self.pictures[which] for which in range(first, first + self.batch_size)]
        rng = np.random.default_rng((self.pictures.seed, number, 3))
        cover, owners, rows = _regions(shown, self.pictures.side // self.pictures.patch)
        views: list[Thing | None] = [picture.viewed for picture in shown]
        config = self.pictures.config
        others = [pick(rng, self.pictures.vocabulary) for _ in range(config.distractors)]
        phrases = _phrases(rng, [*(thing for thing in [*rows, *views] if thing is not None), *others])
        words = draw_background_words(rng, config.background_words, self.pictures.names)
        captions = [draw_caption(rng, picture.things) if picture.things else "background" for picture in shown]
        texts = [*(phrase.text for phrase in phrases), *words, *captions]
        ids = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        images = np.stack([*(picture.image for picture in shown), *(picture.view for picture in shown)])
        return {
            "images": torch.from_numpy(images),
            "cover": torch.from_numpy(cover),
            "region_image_index": torch.from_numpy(owners),
            "picked": torch.tensor([_pick_row(rng, owners, image) for image in range(len(shown))]),
            "input_ids": ids,
            "positives": torch.from_numpy(positives([*rows, *views], phrases, len(words))),
            "is_background": torch.arange(len(phrases) + len(words)) >= len(phrases),
        }


def positives(things: Sequence[Thing | None], phrases: Sequence[Phrase], words: int) -> NDArray[np.bool_]:
    """(things, phrases + words) which texts are true of which things; None is background, which fits all words."""
    table = np.zeros((len(things), len(phrases) + words), dtype=bool)
    for row, thing in enumerate(things):
        if thing is None:
            table[row, len(phrases) :] = True
        else:
            table[row, : len(phrases)] = [phrase.fits(thing) for phrase in phrases]
    return table


def _composers(config: ClipDataConfig) -> tuple[SceneComposer, SceneComposer]:
    """Of scenes with all objects, and of those with the bundled ones."""
    drawn = DataConfig(
        sprites=config.sprites, backgrounds=config.backgrounds, hold_out=config.hold_out,
        shape_share=config.shape_share,
    )  # fmt: skip
    bundled = SceneComposer(SpriteLibrary.bundled(), config.backgrounds, config.shape_share, drawn_share=0.5)
    return make_composers(drawn)[0], bundled


def things_of(composer: SceneComposer) -> list[Thing]:
    """Every object that the composer may draw, in words."""
    sprites = composer.sprites.sprites if composer.sprites is not None else ()
    things = [Thing(sprite.name, sprite.phrase, sprite.colours, sprite.kind) for sprite in sprites]
    shapes = [(name, (colour,)) for name in SHAPE_NAMES for colour in SHAPE_COLOURS]
    return things + [Thing(name, with_article(name), colour, "shape") for name, colour in shapes]


def painted(scene: Scene) -> NDArray[np.int64]:
    """(H, W) index of the object that is visible, -1 for none."""
    ids = np.full(scene.image.shape[:2], NOTHING)
    for index, mask in enumerate(scene.masks):
        ids[mask] = index
    return ids


def window(
    rng: np.random.Generator, image: NDArray[np.uint8], ids: NDArray[np.int64], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A random window of a picture, in its form and at least about as large as `side`, squashed to a square."""
    share = rng.uniform(min(1.0, side / min(ids.shape)), 1)
    height, width = (max(1, round(whole * share)) for whole in ids.shape)
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(ids.shape, (height, width), strict=True))
    image = image[top : top + height, left : left + width]
    rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in (height, width))
    resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, reducing_gap=1.5)
    return np.asarray(resized), ids[top + rows][:, left + columns]


def _regions(shown: Sequence[ClipPicture], grid: int) -> tuple[NDArray[np.float32], NDArray[np.int64], list[Thing]]:
    """Cover (R, g * g) of cells, picture (R,) and thing of each region that is large enough."""
    cover, owners, things = [], [], []
    for image, picture in enumerate(shown):
        cell = len(picture.ids) // grid
        for index, thing in enumerate(picture.things):
            mask = (picture.ids == index)[: grid * cell, : grid * cell]
            share = mask.reshape(grid, cell, grid, cell).mean((1, 3), dtype=np.float32).ravel()
            if share.sum() >= LEAST_CELLS:
                cover.append(share)
                owners.append(image)
                things.append(thing)
    table = np.array(cover, dtype=np.float32).reshape(-1, grid * grid)
    return table, np.array(owners, dtype=np.int64), things


def _phrases(rng: np.random.Generator, things: Sequence[Thing]) -> list[Phrase]:
    """A phrase about each thing, without what is said twice."""
    return list({phrase.text: phrase for phrase in (draw_phrase(rng, thing) for thing in things)}.values())


def _pick_row(rng: np.random.Generator, owners: NDArray[np.int64], image: int) -> int:
    rows = np.flatnonzero(owners == image)
    return int(rng.choice(rows)) if len(rows) else NOTHING
