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
    rows = [["", *groups], *([key, *(cell(metrics.get(key)) for metrics in groups.values())] for key in shown)]
    return aligned(rows)


def metrics_text(metrics: Mapping[str, Any], title: str = "") -> str:
    """Tables of nested metrics: one per innermost dict of groups, under its path as a title."""
    groups = {key: value for key, value in metrics.items() if isinstance(value, Mapping)}
    flat = {key: value for key, value in metrics.items() if key not in groups}
    deep = {key for key, value in groups.items() if any(isinstance(inner, Mapping) for inner in value.values())}
    columns = {**({"value": flat} if flat else {}), **{key: groups[key] for key in groups if key not in deep}}
    tables = ["\n".join([*([title] if title else []), metric_table(columns)])] if columns or not deep else []
    tables += [metrics_text(groups[key], f"{title}, {key}" if title else key) for key in groups if key in deep]
    return "\n\n".join(tables)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in ([*zip(row, widths, strict=True)] for row in rows)
    )


def cell(value: Any) -> str:
    """A number as text: three decimals, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
