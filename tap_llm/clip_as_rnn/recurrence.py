"""The loop: propose masks, judge them, drop what is not there, until nothing changes (arXiv:2312.07661)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ..masks import BoolArray
from .affinity import upsample
from .classifier import class_table, survivors
from .configuration_car import CarConfig, Prompt
from .outputs import CarStep
from .picture import CarImage, view_key
from .proposals import propose_masks
from .text import PassTexts
from .visual_prompts import Pixels, prompt_mask

# Pictures of some masks -> unit embeddings (n, E') of g.
Embed = Callable[[Iterable[Pixels]], Tensor]


@dataclass(eq=False)
class Alive:
    """What is left of the queries of one pass.

    Attributes:
        ids: M query numbers of the pass, ascending.
        scores: (M,) float32, 0..1.
        maps: (M, h, w) float32 soft masks at the resolution of the patches, of the last step.
        trace: the steps.
    """

    ids: list[int]
    scores: Tensor
    maps: Tensor
    trace: list[CarStep] = field(default_factory=list)


@dataclass(eq=False)
class RecurrentUnit:
    """One pass over one picture.

    Attributes:
        picture: the picture after f.
        texts: of its N queries.
        config: settings.
        prompts: visual prompts of this pass.
        scales: tau of f and of g, by which cosines are multiplied.
        embed: g's image encoder.
        progress: show bars.
    """

    picture: CarImage
    texts: PassTexts
    config: CarConfig
    prompts: tuple[Prompt, ...]
    scales: tuple[float, float]
    embed: Embed
    progress: bool = False
    _maps: dict[tuple[bool, int], Tensor] = field(default_factory=dict, repr=False)

    def run(self) -> Alive:
        """Step until no query is dropped any more (or `max_steps`); what is left has the maps of the last step."""
        alive = list(range(len(self.texts.f)))
        trace: list[CarStep] = []
        at_least = 2 if self.config.compat.one_more_step else 1
        while True:
            maps, scores, kept = self.step(alive, len(trace))
            trace.append(CarStep(tuple(alive), tuple(scores.tolist()), tuple(kept)))
            if len(trace) == self.config.max_steps or (kept == alive and len(trace) >= at_least):
                return Alive(alive, scores, maps, trace)
            if not kept:
                return Alive([], scores[:0], maps[:0], trace)
            alive = kept

    def step(self, alive: Sequence[int], number: int) -> tuple[Tensor, Tensor, list[int]]:
        """One step of the queries `alive` (M of them).

        Args:
            alive: query numbers.
            number: steps before it.

        Returns:
            Soft masks (M, h, w), scores (M,), and the numbers of the queries that survive.
        """
        rows = list(alive)
        maps = self._propose(rows, number)
        images = self.embed_masks(maps)
        table = self._judge(images, rows)
        kept = survivors(table, self.config.keep_threshold, self.config.keep_at_least_one)
        similar = self._similar(images, rows)
        return maps.cpu(), table.diagonal().float().cpu(), [rows[row] for row in kept if similar[row]]

    def _propose(self, rows: list[int], number: int) -> Tensor:
        """Soft masks (M, h, w) of some queries; expressions do not compete, so theirs stay the same in all steps."""
        raw = number == 0 and self.config.compat.first_step_raw
        known = self._maps if self.config.mode == "referring" else {}
        if not all((raw, row) in known for row in rows):
            texts = (self.texts.f_first if raw else self.texts.f)[rows]
            background = self.texts.f_background
            maps = propose_masks(self.picture.features, texts, background, self.scales[0], self.config, self.progress)
            known.update({(raw, row): soft for row, soft in zip(rows, maps, strict=True)})
        return torch.stack([known[raw, row] for row in rows])

    def embed_masks(self, maps: Tensor) -> Tensor:
        """g's unit embeddings (M, E') of the picture with each soft mask (M, h, w) shown on it.

        Whatever g has seen of this picture before is remembered.
        """
        known = self.picture.embeddings
        keys: list[Hashable] = []
        for chunk in tqdm(maps.split(self.config.g_batch), desc="views", leave=False, disable=not self.progress):
            masks = [self._shown(soft) for soft in chunk]
            seen = [view_key(mask, self.prompts, self.config) for mask in masks]
            new = {key: mask for key, mask in zip(seen, masks, strict=True) if key not in known}
            if new:
                painted = map(self.picture.painter(self.prompts, self.config).paint, new.values())
                known.update(zip(new, self.embed(painted), strict=True))
            keys += seen
        return torch.stack([known[key] for key in keys])

    def _shown(self, soft: Tensor) -> BoolArray:
        height, width = self.picture.pixels.shape[:2]
        full = upsample(soft[None], (height, width))[0].cpu().numpy()
        return prompt_mask(full, self.config.mask_threshold)

    def _judge(self, images: Tensor, rows: list[int]) -> Tensor:
        background = self.texts.g_background if self.config.g_background else None
        return class_table(images, self.texts.g[:, rows], self.scales[1], bool(self.config.templates), background)

    def _similar(self, images: Tensor, rows: list[int]) -> list[bool]:
        if self.config.min_similarity is None:
            return [True] * len(rows)
        cosines = (self.texts.g[:, rows] * images).sum(dim=-1).mean(dim=0)
        return (cosines > self.config.min_similarity).tolist()


__all__ = ["Alive", "Embed", "RecurrentUnit"]
