"""Contact sheets: the worst and the best cases of a run as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tap_llm.errors import InputError
from tap_llm.masks import decode_rle
from tap_llm.visualize import draw_regions

from .base import Prediction
from .scene_sources import Picture, Source

CASES, COLUMNS = 12, 2
TILE = 420  # width of one picture
_HEADER = 22


@dataclass(frozen=True)
class _Case:
    source: str
    example: str
    row: int
    region: dict[str, Any]


def write_sheets(folder: Path, sources: Sequence[Source], predictions: Sequence[Prediction]) -> list[Path]:
    """Write four sheets per source: the worst and the best answers to boxes and to clicks, by IoU.

    Each case shows the true mask on the left, the predicted one with its prompt, name and caption on the right.

    Args:
        folder: where to; made if missing.
        sources: of the predictions; pictures are read again.
        predictions: of `Scenes`.

    Returns:
        The files.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--pictures: cannot make {folder} ({error.strerror})") from error
    cases = [
        _Case(prediction["source"], prediction["id"], row, region)
        for prediction in predictions
        for row, region in enumerate(prediction["regions"])
    ]
    places = {name: (source, index) for source in sources for index, name in enumerate(source.ids)}
    paths = []
    for source in dict.fromkeys(case.source for case in cases):
        ours = [case for case in cases if case.source == source]
        for prompt in ("box", "click"):
            ranked = sorted(ours, key=lambda case: case.region[prompt]["iou"])
            for title, chosen in (("worst", ranked[:CASES]), ("best", ranked[::-1][:CASES])):
                tiles = [_tile(*_find(places, case), case, prompt) for case in chosen]
                paths.append(folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', source)}_{prompt}_{title}.png")
                contact_sheet(tiles, COLUMNS).save(paths[-1])
    return paths


def _find(places: dict[str, tuple[Source, int]], case: _Case) -> tuple[Picture, np.ndarray]:
    """A case's picture and true mask."""
    source, index = places[case.example]
    picture = source[index]
    return picture, picture.masks[case.row]


def _tile(picture: Picture, mask: np.ndarray, case: _Case, prompt: str) -> Image.Image:
    """Truth and answer side by side under a line of text."""
    answer, truth = case.region[prompt], case.region["truth"]
    concept, score = answer["concepts"][0] if answer["concepts"] else ("", 0.0)
    shown = {"mask": decode_rle(answer["mask"]), "region": answer["prompt"], "caption": answer["caption"]}
    halves = [
        draw_regions(picture.image, [{"mask": mask, "concept": truth["name"] or ""}]),
        draw_regions(picture.image, [{**shown, "concept": concept, "concept_score": score}]),
    ]
    halves = [half.resize((TILE, round(half.height * TILE / half.width))) for half in halves]
    tile = Image.new("RGB", (2 * TILE + 4, _HEADER + max(half.height for half in halves)), "white")
    text = f"IoU {answer['iou']:.2f}   {truth['name'] or ''}   {case.example}"
    ImageDraw.Draw(tile).text((4, 3), text, fill="black", font=ImageFont.load_default(13))
    for index, half in enumerate(halves):
        tile.paste(half, (index * (TILE + 4), _HEADER))
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
