"""Tables on the command line."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

Cell = list[str]  # its lines

_LAST_WIDTH = 20  # least columns for the last cell; narrower terminals get longer lines


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], width: int | None = None) -> str:
    """Numbered rows under a header.

    Args:
        header: names of the columns after the number.
        rows: one cell per column, each a list of lines; the last one wraps so that lines fit `width` columns.
        width: of the terminal; None: as wide as need be.
    """
    numbered = [["#"], *([name] for name in header)], *([[str(i)], *row] for i, row in enumerate(rows, 1))
    widths = [max(len(line) for row in numbered for line in row[column]) for column in range(len(header))]
    room = None if width is None else max(_LAST_WIDTH, width - sum(widths) - 2 * len(widths))
    return "\n".join(line for row in numbered for line in _row_lines(row, widths, room))


def _row_lines(row: Sequence[Cell], widths: list[int], room: int | None) -> list[str]:
    *cells, last = row
    wrapped = last if room is None else [part for line in last for part in textwrap.wrap(line, room)]
    lines = []
    for parts in zip_longest(*cells, wrapped, fillvalue=""):
        padded = [part.ljust(size) for part, size in zip(parts, widths, strict=False)]
        lines.append("  ".join([*padded, parts[-1]]).rstrip())
    return lines


def box_text(box: Sequence[int] | None) -> str:
    """A box as `--box` takes it."""
    return "empty" if box is None else ",".join(map(str, box))


def terminal_width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere, which nothing should cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


__all__ = ["Cell", "box_text", "table", "terminal_width"]
