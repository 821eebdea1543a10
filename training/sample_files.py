"""Files of real samples as pictures to learn from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from tap_llm.data.readers import SampleReader
from tap_llm.data.samples import RegionSample
from tap_llm.data.target_cache import TargetCache
from tap_llm.errors import InputError

from .views import Picture, known_colours, tight_boxes


class SampleFile:
    """The samples of a file that may be shown, as pictures; a sequence.

    Args:
        samples: the file.
        prepare: makes a picture of a sample and the teacher's embeddings (N, E) of its regions, if there is one.
        cache: what a teacher said of the regions.
        hold_out: every so many-th sample is held out, starting with the first; 0 holds out none.

    Raises:
        InputError: the cache is of another file; on access, a broken sample.
    """

    def __init__(
        self,
        samples: SampleReader,
        prepare: Callable[[RegionSample, Tensor | None], Picture],
        cache: TargetCache | None = None,
        hold_out: int = 0,
    ) -> None:
        self.samples, self.prepare, self.cache, self.hold_out = samples, prepare, cache, hold_out
        numbers = np.arange(len(samples))
        self.shown = numbers[numbers % hold_out > 0] if hold_out else numbers
        if cache is not None:
            cache.check_data(samples)

    def held_out(self) -> SampleFile:
        """The samples that are held out, in place of the others."""
        twin = copy.copy(self)
        twin.shown = np.arange(0, len(self.samples), self.hold_out)
        return twin

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, place: int) -> Picture:
        index = int(self.shown[place])
        where = self.samples.where(index)
        try:
            sample = self.samples[index]
            return self.prepare(sample, self._embeddings(index, len(sample.regions)))
        except (InputError, OSError) as error:
            raise InputError(f"{self.samples.path}, {where}: {str(error).removeprefix(f'{where}: ')}") from error

    def _embeddings(self, index: int, regions: int) -> Tensor | None:
        if self.cache is None or not regions:
            return None
        return self.cache.lookup([index] * regions, list(range(regions))).float()

    def names(self) -> Iterator[str]:
        """Names of all regions of the file, those that are held out included; broken samples have none."""
        for index in range(len(self.samples)):
            try:
                regions = self.samples[index].regions
            except InputError:
                continue
            yield from (region["category"].lower() for region in regions if region.get("category"))


def masked_picture(sample: RegionSample, teacher: Tensor | None = None) -> Picture:
    """A sample's regions that have a mask; `teacher` (N, E) for all of its regions."""
    rows = np.flatnonzero(sample.has_mask).tolist()
    masks, image = sample.masks(), np.asarray(sample.load_image())
    words = _words([sample.regions[row] for row in rows])
    return Picture(image, tight_boxes(masks), masks, *words, teacher=teacher[rows] if teacher is not None else None)


def boxed_picture(sample: RegionSample, teacher: Tensor | None = None) -> Picture:
    """A sample's regions that have a caption and a box, or a mask to take one from; `teacher` is not needed."""
    image, boxes = np.asarray(sample.load_image()), sample.boxes()
    names, colours, captions = _words(sample.regions)
    no_masks = np.zeros((0, *image.shape[:2]), dtype=bool)
    whole = Picture(image, boxes, no_masks, names, colours, captions)
    return whole.keep([row for row, texts in enumerate(captions) if texts and np.isfinite(boxes[row]).all()])


def _words(regions: list[dict[str, Any]]) -> tuple[list[str | None], list[list[str]], list[list[str]]]:
    """Names, colours and captions of regions, as far as they are known."""
    names = [name.lower() if (name := region.get("category")) else None for region in regions]
    captions = [[text for text in region.get("captions") or () if text.strip()] for region in regions]
    return names, [_colours(region) for region in regions], captions


def _colours(region: dict[str, Any]) -> list[str]:
    """Colour words of a region; other data sets may mean something else by that attribute."""
    said = (region.get("attributes") or {}).get("colours")
    return known_colours(said) if isinstance(said, list) else []
