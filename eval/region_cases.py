"""Which regions are worth looking at, found before anything is drawn or decoded for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from .cases import KEPT

Row = TypeVar("Row")


def ends(rows: Iterable[Row], key: Callable[[Row], float]) -> list[Row]:
    """As many rows of the lowest and of the highest keys as a report shows, lowest first."""
    ranked = sorted(rows, key=key)
    return ranked if len(ranked) <= 2 * KEPT else [*ranked[:KEPT], *ranked[-KEPT:]]
