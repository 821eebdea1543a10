"""Confusion of label maps: one table over a whole data set, and the intersection over union of each class.

Labels are 0 for background and 1 … n for classes; whatever else the truth says is void and does not count.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer]
Table = NDArray[np.int64]  # (n + 1, n + 2): pixels by true and by predicted label, the last column for no answer
Counts = list[list[int]]  # rows of true label, predicted label, pixels: a table without its zeros


def count_labels(truth: Labels, predicted: Labels, classes: int) -> Counts:
    """Pixels of each pair of labels that occurs.

    Args:
        truth: (H, W); void where it is below 0 or above `classes`.
        predicted: (H, W); below 0 or above `classes` is no answer, which is counted as `classes + 1`.
        classes: how many there are beside the background.
    """
    known = (truth >= 0) & (truth <= classes)
    answer = predicted[known].astype(np.int64)
    answer[(answer < 0) | (answer > classes)] = classes + 1
    pairs = truth[known].astype(np.int64) * (classes + 2) + answer
    values, pixels = np.unique(pairs, return_counts=True)
    return np.stack([*np.divmod(values, classes + 2), pixels], axis=1).tolist()


def add_counts(counts: Iterable[Counts], classes: int) -> Table:
    """One table of the counts of all pictures."""
    table = np.zeros((classes + 1, classes + 2), dtype=np.int64)
    for of_one in counts:
        for true, answer, pixels in of_one:
            table[true, answer] += pixels
    return table


def class_ious(table: Table) -> NDArray[np.float64]:
    """(n + 1,) intersection over union by label; NaN for what the truth never holds."""
    truth, hits = table.sum(axis=1), np.diagonal(table)
    union = truth + table[:, : len(table)].sum(axis=0) - hits
    return np.where(truth > 0, hits / np.maximum(union, 1), np.nan)


def mean_iou(table: Table) -> float | None:
    """Mean of `class_ious` over the labels that the truth holds; None where it holds none."""
    ious = class_ious(table)
    present = ~np.isnan(ious)
    return float(ious[present].mean()) if present.any() else None


def without_background(table: Table) -> Table:
    """The table without row and column 0: pixels that are background, or are held for it, do not count at all."""
    return table[1:, 1:]
