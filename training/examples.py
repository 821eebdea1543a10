"""Training examples for regions: procedural scenes, mosaics of single sprites and real samples, as flat rows.

Batch n is a function of its number and the seed alone, whatever process or worker makes it.
Symbols: B images, N regions, S canvas side, h = S / 4 mask grid, G = S / 16 cells of the image embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tap_llm.concepts import ConceptSpace
from tap_llm.data.broken import SkipBroken
from tap_llm.data.colours import COLOUR_WORDS
from tap_llm.data.readers import SampleReader, open_samples
from tap_llm.data.samples import RegionSample
from tap_llm.data.scenes import Scene, SceneComposer
from tap_llm.data.shapes import SHAPE_NAMES
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.data.targets import NameTargets, TargetCache
from tap_llm.errors import InputError
from tap_llm.masks import mask_to_box
from tap_llm.tap.image_processing_tap import TapImageProcessor, canvas_side, resized_size

from .losses import IGNORED_NAME
from .prompts import PromptSampler

Example = dict[str, Any]

LEAST_SHARE = 0.0005  # of the picture: what jitter leaves smaller than that is dropped


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
    """Every so many-th sample of each file is never shown, starting with the first; 0 shows all."""
    jitter: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Large-scale jitter of real samples: their size on the canvas, smallest and largest factor."""
    flip: float = 0.5
    """Share of real samples that are mirrored."""
    broken_share: float = 0.01
    """Share of broken samples above which the run stops; fewer are skipped and named."""


@dataclass
class Picture:
    """One image to train on; names and colours are None where unknown."""

    image: NDArray[np.uint8]
    """(H, W, 3)."""
    boxes: NDArray[np.float64]
    """(M, 4) x0, y0, x1, y1 in pixels."""
    masks: NDArray[np.bool_]
    """(M, H, W), non-empty; (0, H, W) where only boxes are known."""
    names: list[str | None]
    colours: list[list[str]]
    captions: list[list[str]]
    teacher: Tensor | None = None
    """(M, E) embeddings of a concept teacher, NaN where there is none."""

    def keep(self, rows: Sequence[int]) -> Picture:
        """The same picture with some of its regions."""
        lists = ([values[row] for row in rows] for values in (self.names, self.colours, self.captions))
        masks = self.masks[list(rows)] if len(self.masks) else self.masks
        teacher = self.teacher[list(rows)] if self.teacher is not None else None
        return Picture(self.image, self.boxes[list(rows)], masks, *lists, teacher)


class Pictures:
    """Picture n of an endless mixture of scenes, mosaics and real samples.

    Args:
        config: the mixture.
        seed: other seeds give other pictures.
        captioned: keep regions with captions, whether they have a mask or only a box, and do not jitter samples.

    Raises:
        InputError: shares that do not fit what is given, or data that cannot be read.
    """

    def __init__(self, config: DataConfig, seed: int = 0, captioned: bool = False) -> None:
        if config.mosaic_share + config.sample_share > 1 or min(config.mosaic_share, config.sample_share) < 0:
            raise InputError("data: mosaic_share and sample_share must be shares that add up to at most 1")
        if config.sample_share and not config.samples:
            raise InputError("data.sample_share is set, but data.samples names no files")
        self.config, self.seed, self.captioned = config, seed, captioned
        self.composer, self.novel = make_composers(config)
        if config.targets and len(config.targets) != len(config.samples):
            raise InputError(
                f"data.targets names {len(config.targets)} caches for {len(config.samples)} files of samples"
            )
        self.files = [open_samples(path) for path in config.samples]
        caches = [TargetCache.open(folder) for folder in config.targets] or [None] * len(self.files)
        self.samples = [
            SkipBroken(TaughtSamples(file, cache), boxed_picture if captioned else masked_picture, config.broken_share)
            for file, cache in zip(self.files, caches, strict=True)
        ]

    @cached_property
    def names(self) -> list[str]:
        """All names that can occur, sorted; held-out sprites are among them, since the concept space has them."""
        found = set(SHAPE_NAMES)
        for composer in (self.composer, self.novel):
            if composer is not None and composer.sprites is not None:
                found.update(composer.sprites.names)
        for sample in (sample for file in self.files for sample in file):
            found.update(region["category"].lower() for region in sample.regions if region.get("category"))
        return sorted(found)

    def __getitem__(self, number: int) -> Picture:
        rng = np.random.default_rng((self.seed, number))
        kind, scene_seed = rng.random(), int(rng.integers(2**62))
        if kind < self.config.mosaic_share:
            return picture_of_scene(self.composer.mosaic(scene_seed, (256, 256)))
        if kind < self.config.mosaic_share + self.config.sample_share:
            return self._sample(rng)
        return picture_of_scene(self.composer.scene(scene_seed, self._size(rng)))

    def _size(self, rng: np.random.Generator) -> tuple[int, int]:
        low, high = self.config.scene_side
        longer = int(rng.integers(low, high + 1))
        shorter = round(longer * rng.uniform(0.65, 1.0))
        return (longer, shorter) if rng.random() < 0.75 else (shorter, longer)

    def _sample(self, rng: np.random.Generator) -> Picture:
        """A real sample with at least one region to learn from; files have equal say."""
        for _ in range(1000):
            samples = self.samples[int(rng.integers(len(self.samples)))]
            index = int(rng.integers(len(samples)))
            if self.config.sample_hold_out and index % self.config.sample_hold_out == 0:
                continue
            picture = samples[index]
            if not self.captioned:
                picture = jitter(picture, rng, *self.config.jitter, self.config.flip)
            if picture.names:
                return picture
        raise InputError(
            f"data.samples: found no region with a {'caption' if self.captioned else 'mask'} in 1000 draws"
        )


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
    return Picture(scene.image, tight_boxes(scene.masks), scene.masks, list(scene.names), scene.colours, scene.captions)


class TaughtSamples(Sequence[tuple[RegionSample, Tensor | None]]):
    """Samples with the embeddings that a teacher has of their regions.

    Args:
        samples: a file's samples.
        cache: what the teacher said of them; None without a teacher.

    Raises:
        InputError: the cache is of another file.
    """

    def __init__(self, samples: SampleReader, cache: TargetCache | None) -> None:
        self.samples, self.cache, self.where = samples, cache, samples.where
        if cache is not None:
            cache.check_data(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        sample = self.samples[index]
        if self.cache is None or not sample.regions:
            return sample, None
        rows = range(len(sample.regions))
        return sample, self.cache.lookup([index] * len(rows), list(rows)).float()


def masked_picture(taught: tuple[RegionSample, Tensor | None]) -> Picture:
    """A sample's regions that have a mask."""
    sample, teacher = taught
    rows = np.flatnonzero(sample.has_mask).tolist()
    masks, image = sample.masks(), np.asarray(sample.load_image())
    words = _words([sample.regions[row] for row in rows])
    return Picture(image, tight_boxes(masks), masks, *words, teacher[rows] if teacher is not None else None)


def boxed_picture(taught: tuple[RegionSample, Tensor | None]) -> Picture:
    """A sample's regions that have a caption and a box, or a mask to take one from."""
    sample, _ = taught
    image, boxes = np.asarray(sample.load_image()), sample.boxes()
    rows = [
        row for row, region in enumerate(sample.regions) if region.get("captions") and np.isfinite(boxes[row]).all()
    ]
    no_masks = np.zeros((0, *image.shape[:2]), dtype=bool)
    return Picture(image, boxes[rows], no_masks, *_words([sample.regions[row] for row in rows]))


def _words(regions: list[dict[str, Any]]) -> tuple[list[str | None], list[list[str]], list[list[str]]]:
    """Names, colours and captions of regions, as far as they are known."""
    names = [name.lower() if (name := region.get("category")) else None for region in regions]
    colours = [region.get("attributes", {}).get("colours", []) for region in regions]
    return names, colours, [region.get("captions", []) for region in regions]


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(M, H, W) non-empty masks -> (M, 4) boxes."""
    return np.array([mask_to_box(mask) for mask in masks], dtype=np.float64).reshape(-1, 4)


def jitter(picture: Picture, rng: np.random.Generator, low: float, high: float, flip: float) -> Picture:
    """Large-scale jitter: the picture smaller on the canvas, or a crop of it; mirrored at times.

    A factor f > 1 keeps a random window of 1 / f of each side; f < 1 shrinks the picture to f of the canvas, by
    padding it on the right and below with its mean colour.
    """
    factor = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    image, masks = picture.image, picture.masks
    if rng.random() < flip:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    height, width = image.shape[:2]
    if factor > 1:
        h, w = max(1, round(height / factor)), max(1, round(width / factor))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        image, masks = image[top : top + h, left : left + w], masks[:, top : top + h, left : left + w]
    else:
        side = round(max(height, width) / factor)
        fill = image.mean((0, 1)).astype(np.uint8)
        padded = np.broadcast_to(fill, (side, side, 3)).copy()
        padded[:height, :width] = image
        image, masks = padded, np.pad(masks, ((0, 0), (0, side - height), (0, side - width)))
    shown = Picture(np.ascontiguousarray(image), picture.boxes, masks, picture.names, picture.colours, picture.captions,
                    picture.teacher)  # fmt: skip
    kept = shown.keep(np.flatnonzero(masks.sum((1, 2)) >= LEAST_SHARE * masks[0].size).tolist() if len(masks) else [])
    kept.boxes = tight_boxes(kept.masks)
    return kept


class RegionBatches(Dataset[Example]):
    """Micro-batch n as tensors.

    Args:
        pictures: picture n.
        concepts: the concept space that names are looked up in.
        image_processor: makes `pixel_values`.
        sampler: draws the first prompts.
        batch_size: B.
        regions: prompts per image.
        length: number of batches; None for an endless run.
        seed: other seeds draw other prompts.
    """

    def __init__(
        self,
        pictures: Pictures,
        concepts: ConceptSpace,
        image_processor: TapImageProcessor,
        sampler: PromptSampler,
        batch_size: int,
        regions: int,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.pictures, self.image_processor, self.sampler = pictures, image_processor, sampler
        self.name_targets = NameTargets(concepts)
        self.batch_size, self.regions, self.length, self.seed = batch_size, regions, length, seed
        self.side = canvas_side(image_processor)
        self.teacher_width = concepts.width if pictures.config.targets else None

    def __len__(self) -> int:
        return self.length if self.length is not None else 2**40

    def __getitem__(self, number: int) -> Example:
        """A batch.

        Returns:
            `pixel_values` (B, 3, S, S); `input_points` (N, 2, 2), `input_labels` (N, 2), `from_box` (N,) and
            `region_image_index` (N,) of the first prompts; `masks` (N, h, h) uint8, share of each cell that is
            covered, 255 for all; `names` (N,) int64, -100 if unknown; `colours` (N, C) float32, NaN if unknown;
            `teacher` (N, E) float32, NaN where there is none, only if the data has concept targets;
            `cell_names` and `cell_colours` (B, G, G) int64, -100 where no single object covers most of the cell;
            `seed` () int64 for the later prompts.
        """
        first = number * self.batch_size
        examples = [self._example(first + position) for position in range(self.batch_size)]
        images = [example.pop("image") for example in examples]
        batch = {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}
        for key in ("cell_names", "cell_colours"):
            batch[key] = torch.from_numpy(np.stack([example.pop(key) for example in examples]))
        rows = [len(example["names"]) for example in examples]
        batch["region_image_index"] = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
        for key in examples[0]:
            batch[key] = torch.cat([torch.as_tensor(example[key]) for example in examples])
        batch["seed"] = torch.tensor(first)
        return batch

    def _example(self, number: int) -> Example:
        picture: Picture = self.pictures[number]
        rng = np.random.default_rng((self.seed, number, 1))
        picks = pick_regions(rng, len(picture.masks), self.regions)
        covered = canvas_cover(picture.masks, self.side)  # (M, h, h)
        boxes = torch.from_numpy(picture.boxes[picks] * self.side / max(picture.image.shape[:2])).float()
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        prompts = self.sampler.start(torch.from_numpy(covered[picks] > 127), generator, boxes)
        names = self.name_targets.indices(picture.names).numpy()
        first_colours = np.array([COLOUR_WORDS.index(c[0]) if c else IGNORED_NAME for c in picture.colours])
        example = {} if self.teacher_width is None else {"teacher": self._teacher(picture, picks)}
        return example | {
            "image": picture.image,
            "input_points": prompts.points,
            "input_labels": prompts.labels,
            "from_box": prompts.from_box,
            "masks": covered[picks],
            "names": names[picks],
            "colours": colour_targets([picture.colours[pick] for pick in picks]),
            "cell_names": paint_cells(covered, names),
            "cell_colours": paint_cells(covered, first_colours),
        }

    def _teacher(self, picture: Picture, picks: NDArray[np.int64]) -> Tensor:
        if picture.teacher is None:
            return torch.full((len(picks), self.teacher_width or 0), torch.nan)
        return picture.teacher[torch.from_numpy(picks)]


def pick_regions(rng: np.random.Generator, available: int, wanted: int) -> NDArray[np.int64]:
    """Which regions of an image are prompted: all in random order, and again from the start if there are too few."""
    order = rng.permutation(available)
    return np.resize(order, wanted)


def canvas_cover(masks: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    """(M, H, W) bool masks -> (M, S/4, S/4) uint8: how much of each cell of the canvas is covered, 255 for all."""
    height, width = resized_size(*masks.shape[1:], side)
    covered = np.empty((len(masks), side // 4, side // 4), dtype=np.uint8)
    for row, mask in enumerate(masks):
        canvas = Image.new("L", (side, side))
        resized = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(resized, (0, 0))
        covered[row] = np.asarray(canvas.reduce(4))
    return covered


def colour_targets(colours: list[list[str]]) -> Tensor:
    """(N, C) 1 for each colour word of a region and 0 for the others; NaN where its colours are unknown."""
    targets = torch.zeros(len(colours), len(COLOUR_WORDS))
    for row, words in enumerate(colours):
        for word in words:
            targets[row, COLOUR_WORDS.index(word)] = 1.0
        if not words:
            targets[row] = torch.nan
    return targets


def paint_cells(covered: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(G, G) label of the object that covers most of each cell of the image embedding, else -100."""
    count, side, _ = covered.shape
    share = covered.reshape(count, side // 4, 4, side // 4, 4).mean((2, 4)) / 255
    owner = share.argmax(0)
    return np.where(share.max(0) > 0.5, labels[owner], IGNORED_NAME)
