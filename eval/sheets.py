"""Contact sheets: the worst and the best cases of a run as pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tap_llm.errors import InputError

from .case_drawing import TILE, draw_case
from .cases import Case, extremes

CASES, COLUMNS = 12, 2
_HEADER = 22


def write_sheets(folder: Path, cases: Iterable[Case]) -> list[Path]:
    """Write two sheets per group of cases: the worst and the best.

    Each case shows the true mask on the left, the predicted one with its prompt, name and caption on the right.

    Args:
        folder: where to; made if missing.
        cases: of which the most extreme are shown.

    Returns:
        The files.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--pictures: cannot make {folder} ({error.strerror})") from error
    paths = []
    for group in extremes(cases, CASES):
        for title in ("worst", "best"):
            tiles = [_tile(case) for case in group[title]]
            if tiles:
                paths.append(folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', group['group'])}_{title}.png")
                contact_sheet(tiles, COLUMNS).save(paths[-1])
    return paths


def _tile(case: Case) -> Image.Image:
    """A case under a line of text; text alone where there is no picture."""
    try:
        picture = draw_case(case)
    except InputError as error:
        picture = Image.new("RGB", (2 * TILE, _HEADER), "white")
        ImageDraw.Draw(picture).text((4, 3), str(error), fill="black", font=ImageFont.load_default(13))
    tile = Image.new("RGB", (picture.width, _HEADER + picture.height), "white")
    text = f"{case['score']:.2f}   {case['title']}"
    ImageDraw.Draw(tile).text((4, 3), text, fill="black", font=ImageFont.load_default(13))
    tile.paste(picture, (0, _HEADER))
    return tile


def contact_sheet(tiles: Sequence[Image.Image], columns: int, gap: int = 10) -> Image.Image:
    """Pictures in rows, each row as high as its highest picture.

    Args:
        tiles: at least one.
        columns: in a row.
        gap: pixels between them.
    """
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + gap for row in rows]
    width = max(tile.width for tile in tiles) + gap
    sheet = Image.new("RGB", (width * min(columns, len(tiles)), sum(heights)), "#888")
    for y, row in zip(np.cumsum([0, *heights]).tolist(), rows, strict=False):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * width, y))
    return sheet
