"""Pictures to learn from: procedural scenes, mosaics of single sprites and real samples, mixed.

Picture n is a function of its number and the seed alone, whatever process or worker makes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tap_llm.data.broken import BrokenCount
from tap_llm.data.readers import open_samples
from tap_llm.data.scenes import Scene, SceneComposer
from tap_llm.data.shapes import SHAPE_NAMES
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.data.target_cache import TargetCache
from tap_llm.errors import InputError

from .sample_files import SampleFile, boxed_picture, masked_picture
from .views import Picture, jitter, known_colours, tight_boxes

MOSAIC_SIZE = (256, 256)
VALIDATION_SEED = 10**6
DRAWS = 1000  # pictures tried before it is said that none is of use


@dataclass
class DataConfig:
    """What is trained on."""

    sprites: list[str] = field(default_factory=list)
    """Folders of named cut-outs (see `SpriteLibrary`); none: drawn shapes only."""
    backgrounds: list[str] = field(default_factory=list)
    """Folders of pictures behind the objects of scenes; none: drawn backgrounds."""
    samples: list[str] = field(default_factory=list)
    """Files of real samples with masks, in any form that `open_samples` reads."""
    hold_out: float = 0.0
    """Share of the sprite names of each subgroup that is never shown."""
    shape_share: float = 0.15
    """Share of drawn shapes among the objects of scenes."""
    mosaic_share: float = 0.0
    """Share of images that are mosaics of single sprites, on which names start early."""
    sample_share: float = 0.0
    """Share of images that are real samples."""
    regions: int = 8
    """Prompts per image."""
    scene_side: list[int] = field(default_factory=lambda: [256, 400])
    """Smallest and largest longer side of scenes, in pixels."""
    targets: list[str] = field(default_factory=list)
    """Caches of concept targets (`training.concept_targets`), one per file of `samples` or none."""
    sample_hold_out: int = 0
    """Every so many-th sample of each file, starting with the first, is kept out of training, and validation draws its
    real samples from these alone; with 0 both draw from all."""
    jitter: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Large-scale jitter of real samples: their size on the canvas, smallest and largest factor."""
    flip: float = 0.5
    """Share of real samples that are mirrored."""
    broken_share: float = 0.01
    """Share of broken samples, of those that a process and its workers have drawn, above which the run stops; fewer
    are skipped and named."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be."""
        if self.mosaic_share + self.sample_share > 1 or min(self.mosaic_share, self.sample_share) < 0:
            raise InputError("data: mosaic_share and sample_share must be shares that add up to at most 1")
        if self.sample_share and not self.samples:
            raise InputError("data.sample_share is set, but data.samples names no files")
        if self.targets and len(self.targets) != len(self.samples):
            raise InputError(f"data.targets names {len(self.targets)} caches for {len(self.samples)} files of samples")
        if self.sample_hold_out == 1 or self.sample_hold_out < 0:
            raise InputError(f"data.sample_hold_out must be 0 or at least 2, got {self.sample_hold_out}")
        if not 0 <= self.broken_share <= 1:
            raise InputError(f"data.broken_share must lie between 0 and 1, got {self.broken_share}")
        if self.regions < 1:
            raise InputError(f"data.regions must be at least 1, got {self.regions}")
        for name, pair in (("scene_side", self.scene_side), ("jitter", self.jitter)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise InputError(f"data.{name} must be two positive numbers, the smaller first, got {pair}")


class Pictures:
    """Picture n of an endless mixture of scenes, mosaics and real samples.

    Args:
        config: the mixture.
        seed: other seeds give other pictures.
        captioned: keep regions with captions, whether they have a mask or only a box, and do not jitter samples.

    Raises:
        InputError: settings that cannot be, or data that cannot be read.
    """

    def __init__(self, config: DataConfig, seed: int = 0, captioned: bool = False) -> None:
        config.check()
        self.config, self.seed, self.captioned = config, seed, captioned
        self.composer, self.novel = make_composers(config)
        prepare = boxed_picture if captioned else masked_picture
        caches = [TargetCache.open(folder) for folder in config.targets if not captioned]
        self.files = [
            SampleFile(open_samples(path), prepare, caches[number] if caches else None, config.sample_hold_out)
            for number, path in enumerate(config.samples)
        ]
        empty = next((file for file in self.files if not len(file)), None)
        if config.sample_share and empty is not None:
            reason = " that data.sample_hold_out leaves to it" if len(empty.samples) else ""
            raise InputError(f"data.samples: {empty.samples.path} has no sample to train on{reason}")
        self._count = BrokenCount(config.broken_share)
        self._problems: dict[str, None] = {}  # in order

    def for_validation(self) -> Pictures:
        """The mixture for validation: another seed and, if samples are held out, these in place of the others.

        Scenes show the same names as in training: those of `hold_out` stay unseen until the model is evaluated.
        """
        twin = copy.copy(self)
        twin.seed, twin._problems = VALIDATION_SEED, {}
        if self.config.sample_hold_out:
            twin.files = [file.held_out() for file in self.files]
        return twin

    def names(self) -> Iterator[str]:
        """All names that can occur, some more than once. Reads all samples, though none of their pictures.

        Held-out sprites are among them, since the concept space has them.
        """
        yield from SHAPE_NAMES
        for composer in (self.composer, self.novel):
            if composer is not None and composer.sprites is not None:
                yield from composer.sprites.names
        for file in self.files:
            yield from file.names()

    def take_problems(self) -> list[str]:
        """Messages about broken samples that were met since the last call."""
        problems, self._problems = list(self._problems), {}
        return problems

    def check_teacher(self, width: int) -> None:
        """Raise InputError unless the embeddings of all teachers have the width of the concept space."""
        for file in self.files:
            if file.cache is not None and file.cache.width != width:
                raise InputError(
                    f"{file.cache.folder} holds embeddings of width {file.cache.width}, the concept space has "
                    f"width {width}: make the targets with the image tower that belongs to the concepts"
                )

    def __getitem__(self, number: int) -> Picture:
        rng = np.random.default_rng((self.seed, number))
        kind, seed = rng.random(), int(rng.integers(2**62))
        mosaics = self.config.mosaic_share
        if mosaics <= kind < mosaics + self.config.sample_share:
            return self._sample(rng)
        for _ in range(DRAWS):
            if kind < mosaics:
                picture = picture_of_scene(self.composer.mosaic(seed, MOSAIC_SIZE))
            else:
                picture = picture_of_scene(self.composer.scene(seed, self._size(rng)))
            if self._is_useful(picture):  # nearly always: objects may find no place
                return picture
            seed = int(rng.integers(2**62))
        raise InputError(f"data: {DRAWS} scenes have nothing to learn from; make data.scene_side larger")

    def _size(self, rng: np.random.Generator) -> tuple[int, int]:
        low, high = self.config.scene_side
        longer = int(rng.integers(low, high + 1))
        shorter = round(longer * rng.uniform(0.65, 1.0))
        return (longer, shorter) if rng.random() < 0.75 else (shorter, longer)

    def _sample(self, rng: np.random.Generator) -> Picture:
        """A real sample with at least one region to learn from."""
        for _ in range(DRAWS):
            picture = self._draw(rng)
            if picture is not None and not self.captioned:
                picture = jitter(picture, rng, self.config.jitter[0], self.config.jitter[1], self.config.flip)
            if picture is not None and self._is_useful(picture):
                return picture
        raise InputError(
            f"data.samples: found no region with a {'caption' if self.captioned else 'mask'} in {DRAWS} draws"
        )

    def _draw(self, rng: np.random.Generator) -> Picture | None:
        """Any real sample, files having equal say; None for a broken one."""
        file = self.files[int(rng.integers(len(self.files)))]
        try:
            picture = file[int(rng.integers(len(file)))]
        except InputError as error:
            self._problems[str(error)] = None
            self._count.add(str(error))
            return None
        self._count.add()
        return picture

    def _is_useful(self, picture: Picture) -> bool:
        return any(picture.captions) if self.captioned else bool(picture.names)


def make_composers(config: DataConfig) -> tuple[SceneComposer, SceneComposer | None]:
    """Composers of known and of held-out names; without `hold_out` there is no second one."""
    if not config.sprites:
        return SceneComposer(None, config.backgrounds, shape_share=1.0), None
    library = SpriteLibrary.from_folders(config.sprites)
    if not config.hold_out:
        return SceneComposer(library, config.backgrounds, shape_share=config.shape_share), None
    known, novel = library.split_names(config.hold_out)
    composers = [SceneComposer(side, config.backgrounds, shape_share=config.shape_share) for side in (known, novel)]
    return composers[0], composers[1]


def picture_of_scene(scene: Scene) -> Picture:
    """A scene's arrays."""
    colours = [known_colours(words) for words in scene.colours]
    return Picture(scene.image, tight_boxes(scene.masks), scene.masks, list(scene.names), colours, scene.captions)
