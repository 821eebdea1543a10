"""Unseen scenes with conversations about them, for region chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from tap_llm.data.instructions import Conversation, converse
from tap_llm.data.scenes import Scene, SceneComposer
from tap_llm.regions import Region

from .base import Example, fingerprint


@dataclass(frozen=True, eq=False)
class Talk(Example):
    """A scene and what is asked about it.

    Attributes:
        source: name of the source.
        seed: of the scene.
        scene: what is asked about.
        conversations: each begins anew.
        other: id and scene of another picture, with objects too.
    """

    source: str
    seed: int
    scene: Scene
    conversations: list[Conversation]
    other: tuple[str, Scene]


class TalkSource(Dataset[Talk]):
    """Scenes of consecutive seeds.

    Args:
        name: what results are grouped by.
        composer: makes the scenes.
        length: number of scenes.
        seed: of the first.
        size: (width, height) of the scenes in pixels.
        talks: conversations about each.
    """

    def __init__(
        self,
        name: str,
        composer: SceneComposer,
        length: int,
        seed: int,
        size: tuple[int, int] = (400, 300),
        talks: int = 4,
    ) -> None:
        self.name, self.length, self.seed, self.talks = name, length, seed, talks
        # Each scene comes up twice in a row: as the other picture, and then itself.
        self._scene: Callable[[int], Scene] = lru_cache(maxsize=4)(lambda seed: composer.scene(seed, size))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Talk:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        seed = self.seed + index
        scene = self._scene(seed)
        talks = [converse(scene, seed * self.talks + number) for number in range(self.talks)]
        talks = [talk for talk in talks if talk.questions]
        next_seed = next(number for number in count(seed + 1) if self._scene(number).things)
        other = self._scene(next_seed)
        said = [[talk.messages, [asdict(question) for question in talk.questions]] for talk in talks]
        known = fingerprint(scene.image, scene.masks, other.image, other.masks, said)
        return Talk(self._id(seed), known, self.name, seed, scene, talks, (self._id(next_seed), other))

    def _id(self, seed: int) -> str:
        return f"{self.name}/{seed}"


def picture_of(scene: Scene) -> tuple[Image.Image, list[Region]]:
    """The picture of a scene, and the boxes of its objects."""
    sample = scene.to_sample()
    return sample.load_image(), sample.prompts()


def shuffled(rng: np.random.Generator, length: int) -> list[int]:
    """A random order in which nothing keeps its place: a cycle; empty for less than two."""
    order = rng.permutation(length).tolist()
    cycle = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [cycle[place] for place in range(length)] if length > 1 else []
