"""Sprites: named pictures cut out on transparent ground, the objects of procedural scenes.

library = SpriteLibrary.from_folders(["emoji", "grocery", "clothing"])
known, novel = library.split_names(0.12)      # hold out names, not only pictures
sprite = known.sample(np.random.default_rng(0))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "sprites"
# How often each kind is drawn, whatever the number of its files; other kinds count as "object".
KIND_WEIGHTS: dict[str, float] = {"emoji": 0.60, "grocery": 0.17, "garment": 0.17, "object": 0.06}


@dataclass(frozen=True)
class Sprite:
    """One cut-out.

    Attributes:
        name: lower-case; several sprites may share it.
        phrase: the name with its article, lower-case; need not contain the name ("a bald person").
        kind: "emoji", "grocery", "garment" or "object".
        group: wide class ("Animals & Nature").
        subgroup: narrow class ("animal-bird").
        colours: words for its dominant colours, commonest first.
        pixels: (h, w, 4) uint8, colours premultiplied by alpha.
    """

    name: str
    phrase: str
    kind: str
    group: str
    subgroup: str
    colours: tuple[str, ...]
    pixels: NDArray[np.uint8] = field(repr=False, compare=False)


class SpriteLibrary:
    """Sprites to draw from: kinds by weight, then names with equal say, then files.

    Args:
        sprites: at least one.
        kind_weights: how often each kind is drawn.

    Raises:
        InputError: no sprites.
    """

    def __init__(self, sprites: Iterable[Sprite], kind_weights: Mapping[str, float] = KIND_WEIGHTS) -> None:
        self.sprites: tuple[Sprite, ...] = tuple(sprites)
        if not self.sprites:
            raise InputError("sprites: there are none; name a folder with named RGBA cut-outs")
        self.kind_weights = dict(kind_weights)
        by_kind: dict[str, dict[str, list[Sprite]]] = defaultdict(lambda: defaultdict(list))
        for sprite in self.sprites:
            by_kind[sprite.kind][sprite.name].append(sprite)
        self._by_kind = [list(by_kind[kind].values()) for kind in sorted(by_kind)]
        weights = [self.kind_weights.get(kind, KIND_WEIGHTS["object"]) for kind in sorted(by_kind)]
        self._bounds = np.cumsum(weights) / sum(weights)

    @classmethod
    def from_folders(cls, folders: Sequence[str | Path], split: str = "train") -> SpriteLibrary:
        """Read every sprite of the folders; what a folder holds is told from its files.

        Known forms: `sprites.json` (a list `sprites` of `file`, `name`, and if wanted `phrase`, `kind`, `group`,
        `subgroup`, `colours`), `objects.json` (pictograms in several styles), COCO-style JSON with masks
        (`iconic.json`, `train.json`, `instances_train.json`; cut out by mask), or plain PNGs with transparency
        called `<name>.png` or `<name>/*.png`.

        Args:
            folders: one or more.
            split: which file of those that carry a split ("train", "val").

        Raises:
            InputError: a folder is missing, holds no sprites, or a file in it is damaged.
        """
        from .sprite_files import read_folder

        return cls(sprite for folder in folders for sprite in read_folder(Path(folder), split))

    @classmethod
    def bundled(cls) -> SpriteLibrary:
        """The pictograms that come with the package (Fluent Emoji, MIT)."""
        return cls.from_folders([BUNDLED])

    def __len__(self) -> int:
        return len(self.sprites)

    @property
    def names(self) -> list[str]:
        """Sorted, each once, lower-case."""
        return sorted({sprite.name for sprite in self.sprites})

    def sample(self, rng: np.random.Generator) -> Sprite:
        """Draw one sprite."""
        kind, name, file = rng.random(3).tolist()
        names = self._by_kind[int(np.searchsorted(self._bounds, kind, side="right").clip(max=len(self._bounds) - 1))]
        files = names[int(name * len(names))]
        return files[int(file * len(files))]

    def split_names(self, share: float, seed: int = 0) -> tuple[SpriteLibrary, SpriteLibrary]:
        """Hold out names: that share of the names of each subgroup, rounded up or down at random.

        A name goes to one side with all its sprites, also where several kinds share it. Names of drawn shapes
        stay known, because scenes draw them anyway.

        Args:
            share: of the names that become novel, between 0 and 1.
            seed: other seeds choose other names.

        Returns:
            The known and the novel sprites.

        Raises:
            InputError: one side would be empty.
        """
        from .shapes import SHAPE_NAMES

        rng = np.random.default_rng(seed)
        subgroups: dict[tuple[str, str], set[str]] = defaultdict(set)
        home = {sprite.name: (sprite.kind, sprite.subgroup) for sprite in reversed(self.sprites)}
        for name, key in home.items():
            subgroups[key].add(name)
        novel: set[str] = set()
        for key in sorted(subgroups):
            names = sorted(subgroups[key] - set(SHAPE_NAMES))
            novel.update(rng.permutation(names)[: int(share * len(names) + rng.random())].tolist())
        return self._side(novel, inside=False), self._side(novel, inside=True)

    def _side(self, names: set[str], inside: bool) -> SpriteLibrary:
        chosen = [sprite for sprite in self.sprites if (sprite.name in names) == inside]
        if not chosen:
            raise InputError("split_names: one side would be empty; use more sprites or another share")
        return SpriteLibrary(chosen, self.kind_weights)
