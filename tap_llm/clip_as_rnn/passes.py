"""Things and stuff in passes of their own, each the background of the other (arXiv:2312.07661, appendix)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..masks import BoolArray
from .configuration_car import CarConfig, Mode, Prompt
from .merging import merge_expressions
from .outputs import CarOutput, CarStep, Float32Array, paint_labels


@dataclass(frozen=True)
class Pass:
    """Queries that are asked for together.

    Attributes:
        ids: their indices.
        prompts: visual prompts.
        rivals: indices of the queries that are their background; None: the background words are.
    """

    ids: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    rivals: tuple[int, ...] | None = None

    def global_trace(self, trace: Sequence[CarStep]) -> list[CarStep]:
        """The steps of this pass, its own query numbers turned into indices among all queries."""
        return [
            CarStep(
                tuple(self.ids[row] for row in step.queries), step.scores, tuple(self.ids[row] for row in step.kept)
            )
            for step in trace
        ]


def plan_passes(queries: Sequence[str], config: CarConfig) -> list[Pass]:
    """One pass, or the things and then the stuff (names of `config.stuff`), where both are asked for.

    The things have the background words, or (`config.mutual_background`) the stuff as background; the stuff has the
    things.
    """
    names = {name.strip().casefold() for name in config.stuff}
    stuff = tuple(index for index, query in enumerate(queries) if query.strip().casefold() in names)
    things = tuple(index for index in range(len(queries)) if index not in set(stuff))
    stuff_prompts = config.stuff_prompts or config.prompts
    if not stuff:
        return [Pass(things, config.prompts)]
    if not things:
        return [Pass(stuff, stuff_prompts)]
    return [
        Pass(things, config.prompts, stuff if config.mutual_background else None),
        Pass(stuff, stuff_prompts, things),
    ]


@dataclass(eq=False)
class FoundMasks:
    """What a pass found; M queries.

    Attributes:
        ids: their indices among all queries.
        scores: (M,) float32.
        soft_masks: (M, H, W) float32.
        masks: (M, H, W) bool.
        trace: steps, with indices among all queries.
    """

    ids: list[int]
    scores: Float32Array
    soft_masks: Float32Array
    masks: BoolArray
    trace: list[CarStep]

    def rows(self, chosen: Sequence[int]) -> FoundMasks:
        """Some of them."""
        rows = list(chosen)
        ids = [self.ids[row] for row in rows]
        return FoundMasks(ids, self.scores[rows], self.soft_masks[rows], self.masks[rows], self.trace)


def join_passes(passes: Sequence[FoundMasks], size: tuple[int, int]) -> FoundMasks:
    """All passes over a picture of `size` (H, W) as one, queries ascending; the traces one after the other."""
    joined = FoundMasks(
        [index for found in passes for index in found.ids],
        np.concatenate([np.zeros(0, np.float32), *(found.scores for found in passes)]),
        np.concatenate([np.zeros((0, *size), np.float32), *(found.soft_masks for found in passes)]),
        np.concatenate([np.zeros((0, *size), bool), *(found.masks for found in passes)]),
        [step for found in passes for step in found.trace],
    )
    return joined.rows(np.argsort(joined.ids).tolist())


def assemble(
    queries: list[str], passes: Sequence[FoundMasks], size: tuple[int, int], mode: Mode, notes: list[str]
) -> CarOutput:
    """The result of all passes over a picture of `size` (H, W); the first pass lies on top of the label map."""
    label_map = np.zeros(size, dtype=np.int32)
    for part in reversed(passes):
        paint_labels(part.masks, part.scores, part.ids, label_map)
    found = join_passes(passes, size)
    scores = np.zeros(len(queries), dtype=np.float32)
    scores[found.ids] = found.scores
    merged = merge_expressions(found.masks, found.scores) if mode == "referring" else None
    if not found.masks.any():
        notes = [*notes, "nothing was found"]
    return CarOutput(
        queries, found.ids, scores, found.soft_masks, found.masks, label_map, found.trace, mode, merged, notes
    )


__all__ = ["FoundMasks", "Pass", "assemble", "join_passes", "plan_passes"]
