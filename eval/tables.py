"""Metrics as text: one line per metric, one column per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def metric_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for a terminal.

    Args:
        groups: metrics by group. Metrics that no group has are left out; what one group lacks shows as "-".
    """
    if not groups:
        return "no regions"
    keys = dict.fromkeys(key for metrics in groups.values() for key in metrics)
    shown = [key for key in keys if any(metrics.get(key) is not None for metrics in groups.values())]
    rows = [["", *groups], *([key, *(_cell(metrics.get(key)) for metrics in groups.values())] for key in shown)]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in ([*zip(row, widths, strict=True)] for row in rows)
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
