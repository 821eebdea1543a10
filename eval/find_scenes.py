"""Unseen scenes to find things in: the names of their objects, and as many of what is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from tap_llm.data.scenes import Scene, SceneComposer

from .base import Example, fingerprint

_REMEMBERED = 16  # scenes
_FOLLOWING = 100  # scenes after one whose names are looked for in it


@dataclass(frozen=True, eq=False)
class FindScene(Example):
    """A scene and what is looked for in it.

    Attributes:
        image: RGB.
        queries: N names, those that are there first.
        masks: (N, H, W) bool; several objects of one name are one mask, and that of a name that is absent is empty.
    """

    image: Image.Image
    queries: list[str]
    masks: NDArray[np.bool_]


class FindScenes(Dataset[FindScene]):
    """Scenes of consecutive seeds.

    Names to look for in vain are those of the scenes that follow, so that every name is there at times, and its masks
    elsewhere count against it.

    Args:
        composer: makes the scenes.
        count: number of scenes.
        seed: of the first.
        size: (width, height) in pixels.
        distractors: names looked for in vain, for each one that is there; at least one.
        name: in front of all ids.
    """

    def __init__(
        self,
        composer: SceneComposer,
        count: int,
        seed: int,
        size: tuple[int, int] = (400, 300),
        distractors: float = 1.0,
        name: str = "scenes",
    ) -> None:
        self.composer, self.count, self.seed, self.size = composer, count, seed, size
        self.distractors, self.name = distractors, name
        self._scene: Callable[[int], Scene] = lru_cache(maxsize=_REMEMBERED)(lambda seed: composer.scene(seed, size))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> FindScene:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        seed = self.seed + index
        scene = self._scene(seed)
        present = list(dict.fromkeys(scene.names))
        absent = self._absent(present, seed)
        masks = masks_by_name(scene, [*present, *absent])
        sealed = fingerprint(scene.image, masks, [*present, *absent])
        return FindScene(f"{self.name}/{seed}", sealed, Image.fromarray(scene.image), [*present, *absent], masks)

    def _absent(self, present: Sequence[str], seed: int) -> list[str]:
        """Names that share no word with one that is there: of "apple" it is not known whether "red apple" is one."""
        words = {word for name in present for word in name.split()}
        wanted = max(1, round(self.distractors * len(present)))
        return list(islice(self._following(seed, words), wanted))

    def _following(self, seed: int, words: set[str]) -> Iterator[str]:
        """Names of the scenes after a seed, each once, that hold none of the words."""
        said: set[str] = set()
        for step in range(1, _FOLLOWING):
            for name in self._scene(seed + step).names:
                if name not in said and words.isdisjoint(name.split()):
                    said.add(name)
                    yield name


def masks_by_name(scene: Scene, names: Sequence[str]) -> NDArray[np.bool_]:
    """(N, H, W): all objects of each name together."""
    masks = np.zeros((len(names), *scene.image.shape[:2]), dtype=bool)
    for row, name in enumerate(names):
        for mask, own in zip(scene.masks, scene.names, strict=True):
            if own == name:
                masks[row] |= mask
    return masks
