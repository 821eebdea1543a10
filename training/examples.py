"""Training examples for regions as flat rows of tensors.

Batch n is a function of its number and the seed alone, whatever process or worker makes it.
Symbols: B images, N regions, S canvas side, h = S / 4 mask grid, G = S / 16 cells of the image embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tap_llm.concepts import ConceptSpace
from tap_llm.data.colours import COLOUR_WORDS
from tap_llm.data.targets import NameTargets
from tap_llm.tap.image_processing_tap import TapImageProcessor, canvas_side, resized_size

from .losses import IGNORED_NAME
from .prompts import PromptSampler
from .sources import DataConfig, Pictures, make_composers
from .views import Picture

Example = dict[str, Any]


class RegionBatches:
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
        pictures.check_teacher(concepts.width)

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

    def take_problems(self) -> list[str]:
        """Messages about broken samples that were met since the last call."""
        return self.pictures.take_problems()

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
    return np.resize(order, wanted if available else 0)


def canvas_cover(masks: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    """(M, H, W) bool masks -> (M, S/4, S/4) uint8: how much of each cell of the canvas is covered, 255 for all."""
    height, width = resized_size(masks.shape[1], masks.shape[2], side)
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


__all__ = [
    "DataConfig",
    "Example",
    "Pictures",
    "RegionBatches",
    "canvas_cover",
    "colour_targets",
    "make_composers",
    "paint_cells",
    "pick_regions",
]
