"""What CaR found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..masks import BoolArray
from ..regions import Region
from .configuration_car import Mode

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class CarStep:
    """One step of the recurrence.

    Attributes:
        queries: indices of the queries that were alive before it.
        scores: one for each of them, 0..1.
        kept: indices of those that survived it.
    """

    queries: tuple[int, ...]
    scores: tuple[float, ...]
    kept: tuple[int, ...]


@dataclass(eq=False)
class CarOutput:
    """What CaR found of N queries in a picture of H x W; a query is known by its index, equal ones are several.

    Masks are held for the M kept queries only, in the order of `kept`: with a thousand queries the rest would weigh
    too much. `soft_masks` and `masks` have a row for each of the N.

    Attributes:
        queries: N texts, as given.
        kept: indices of the M queries that survived, ascending; a kept query may have an empty mask.
        scores: (N,) float32 in 0..1, 0 for dropped queries.
        kept_soft_masks: (M, H, W) float32 in 0..1, before refinement.
        kept_masks: (M, H, W) bool; of the semantic mode they do not overlap.
        label_map: (H, W) int32: 0 background, else index + 1 of the query; where masks overlap, the best one's.
        trace: what each step did (of two passes: those of the first, then those of the second).
        mode: "semantic" or "referring".
        merged_mask: (H, W) bool, referring mode: what the expressions mean together.
        notes: what the user should know about this result, one sentence each.
    """

    queries: list[str]
    kept: list[int]
    scores: Float32Array
    kept_soft_masks: Float32Array
    kept_masks: BoolArray
    label_map: NDArray[np.int32]
    trace: list[CarStep] = field(default_factory=list)
    mode: Mode = "semantic"
    merged_mask: BoolArray | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return len(self.trace)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        height, width = self.label_map.shape
        return height, width

    @property
    def soft_masks(self) -> Float32Array:
        """(N, H, W) float32 in 0..1, zeros for dropped queries; a new array."""
        return self._all_rows(self.kept_soft_masks)

    @property
    def masks(self) -> BoolArray:
        """(N, H, W) bool, empty for dropped queries; a new array."""
        return self._all_rows(self.kept_masks)

    @property
    def found(self) -> list[int]:
        """Indices of the kept queries whose mask is not empty, ascending."""
        return [index for index, mask in zip(self.kept, self.kept_masks, strict=True) if mask.any()]

    def regions(self, merged: bool | None = None) -> list[Region]:
        """What was found as regions that `describe` and `chat` take.

        Args:
            merged: one region of `merged_mask` in place of one per query; by default in referring mode.

        Returns:
            Region dicts with "mask" (H, W) bool, "category" (the query) and "id" (its index), in the order of the
            queries; the merged region bears those of the best query. Empty where nothing was found.
        """
        if merged is None:
            merged = self.merged_mask is not None
        if merged:
            best = [max(self.found, key=lambda index: self.scores[index])] if self.found else []
            shown = best if self.merged_mask is not None and self.merged_mask.any() else []
            return [self._region(index, self.merged_mask) for index in shown]
        rows = dict(zip(self.kept, self.kept_masks, strict=True))
        return [self._region(index, rows[index]) for index in self.found]

    def _region(self, index: int, mask: BoolArray | None) -> Region:
        return {"mask": mask, "category": self.queries[index], "id": index}

    def _all_rows(self, rows: NDArray) -> NDArray:
        full = np.zeros((len(self.queries), *self.size), dtype=rows.dtype)
        full[self.kept] = rows
        return full


def paint_labels(
    masks: BoolArray, scores: Float32Array, ids: Sequence[int], label_map: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Paint masks into a label map in place, worst first so that the best lies on top; a score of 0 paints nothing.

    Args:
        masks: (M, H, W) bool.
        scores: (M,).
        ids: query index of each row; painted is index + 1.
        label_map: (H, W) int32.

    Returns:
        The label map.
    """
    for row in np.argsort(scores, kind="stable"):
        if scores[row] > 0:
            label_map[masks[row]] = ids[row] + 1
    return label_map


__all__ = ["CarOutput", "CarStep", "paint_labels"]
