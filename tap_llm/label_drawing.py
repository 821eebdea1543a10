"""Label chips, their leaders and the legend for `tap_llm.visualize`."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tap_llm.drawing import BLACK, SUPERSAMPLING, WHITE, Color, Point, disc, ink_on, paint, rounded, stroke
from tap_llm.errors import InputError
from tap_llm.label_layout import Anchor, Rect, balance_text, needs_leader, place_labels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PANEL, PANEL_TEXT, PANEL_NOTE = (250, 250, 251), (24, 26, 31), (92, 97, 108)
CROWDED_SHARE = 0.3  # labels that would cover more of the picture than this go into the legend
_LEAST_WIDTH = 8  # in units of the title's font size; narrower labels would break words
_TITLE_LINES, _CAPTION_LINES = 2, 3
_LEGEND_SHARE, _LEGEND_LEAST_ROWS = 1.0, 6  # as high as the picture at most, yet always a few rows


# Text and sizes


@lru_cache(maxsize=64)
def _font(path: str | None, size: int) -> Font:
    if path is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise InputError(f"Cannot read the font {path}: give a TrueType or OpenType file.") from error


@dataclass(frozen=True)
class Style:
    """Every size in the picture, in pixels, from the picture's own size and the number of regions."""

    width: int
    height: int
    count: int
    font_path: str | Path | None = None

    @cached_property
    def unit(self) -> float:
        """1 for a picture of 640 x 480."""
        return math.sqrt(self.width * self.height) / 554

    @cached_property
    def title(self) -> int:
        return max(14, round(13.5 * self.unit))

    @cached_property
    def caption(self) -> int:
        return max(12, round(0.84 * self.title))

    @cached_property
    def number(self) -> int:
        return self.title if self.count <= 40 else max(11, round(0.8 * self.title))

    @cached_property
    def gap(self) -> int:
        return max(3, round(0.3 * self.title))

    @cached_property
    def line(self) -> float:
        """Width of an outline; thinner where there are many."""
        return max(1.5, 2.2 * self.unit) * (1.0 if self.count <= 20 else 0.7)

    def font(self, size: int) -> Font:
        """The font at a supersampled size."""
        return _font(None if self.font_path is None else str(self.font_path), size * SUPERSAMPLING)

    def measure(self, size: int) -> Callable[[str], float]:
        font = self.font(size)
        return lambda text: font.getlength(text) / SUPERSAMPLING

    @cached_property
    def half_digit(self) -> float:
        """Half the height of a digit, as a share of the font size."""
        mask = self.font(self.title).getmask("0")
        box = mask.getbbox() or (0, 0, 0, 0)
        return (box[3] - box[1]) / (2 * SUPERSAMPLING * self.title)

    def clean(self, text: str) -> str:
        """Printable text; accents, which Pillow's own font lacks, come off. Other characters become boxes."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        if self.font_path is None:
            text = unicodedata.normalize("NFKD", text).replace("–", "-").replace("—", "-")
            text = "".join(character for character in text if not unicodedata.combining(character))
        return "".join(character if character.isprintable() else " " for character in text)


# Text blocks: a number in a badge, a title, a caption


@dataclass(frozen=True)
class Block:
    """One region's text, laid out: used as a chip on the picture and as an entry of the legend."""

    number: str
    lines: tuple[tuple[str, int], ...]  # text, font size
    badge: tuple[int, int]
    size: tuple[int, int]
    indent: int


def _badge_size(number: str, style: Style) -> tuple[int, int]:
    height = round(1.5 * style.number)
    return max(round(style.measure(style.number)(number) + 0.7 * style.number), height), height


def _score(result: Mapping[str, Any]) -> str:
    score = result.get("concept_score")
    return "" if score is None or not math.isfinite(float(score)) else f" {float(score):.0%}"


def _line_height(size: int) -> int:
    return round(1.32 * size)


def text_block(number: str, result: Mapping[str, Any], style: Style, width: float) -> Block:
    """Lays out one region's text for a block at most `width` wide."""
    badge = _badge_size(number, style)
    indent = badge[0] + round(0.45 * style.title)
    concept, caption = (style.clean(str(result.get(key) or "")).strip() for key in ("concept", "caption"))
    title = f"{concept}{_score(result)}" if concept else ""
    lines: list[tuple[str, int]] = []
    for text, size, most in ((title, style.title, _TITLE_LINES), (caption, style.caption, _CAPTION_LINES)):
        lines += [(line, size) for line in balance_text(text, width - indent, most, style.measure(size))]
    if not lines:
        return Block(number, (), badge, badge, badge[0])
    text_width = max(style.measure(size)(line) for line, size in lines)
    height = max(badge[1], sum(_line_height(size) for _, size in lines))
    return Block(number, tuple(lines), badge, (math.ceil(indent + text_width), height), indent)


def text_blocks(results: Sequence[Mapping[str, Any]], style: Style, width: float) -> list[Block]:
    """One block per region, numbered from 1."""
    return [text_block(str(index + 1), result, style, width) for index, result in enumerate(results)]


def _text(canvas: Image.Image, xy: Point, text: str, size: int, style: Style, color: Color) -> None:
    """Text that starts at x, its digits centred on y; drawn large and reduced, so letters space evenly."""
    font = style.font(size)
    width, height = style.measure(size)(text), 2 * size

    def draw(pen: ImageDraw.ImageDraw, at: Callable[..., Point], _: int) -> None:
        pen.text(at(xy[0], xy[1] + style.half_digit * size), text, fill=255, font=font, anchor="ls")

    paint(canvas, (xy[0] - size, xy[1] - height, xy[0] + width + size, xy[1] + height), color, 1.0, draw)


def _centered_text(canvas: Image.Image, rect: Sequence[float], text: str, style: Style, color: Color) -> None:
    x = (rect[0] + rect[2] - style.measure(style.number)(text)) / 2
    _text(canvas, (x, (rect[1] + rect[3]) / 2), text, style.number, style, color)


def _draw_badge(canvas: Image.Image, block: Block, xy: tuple[int, int], style: Style, fill: Color) -> None:
    rect = (*xy, xy[0] + block.badge[0], xy[1] + block.badge[1])
    rounded(canvas, rect, 0.3 * block.badge[1], fill)
    _centered_text(canvas, rect, block.number, style, ink_on(fill))


def _draw_lines(
    canvas: Image.Image, block: Block, xy: tuple[int, int], style: Style, title: Color, note: Color
) -> None:
    heights = [_line_height(size) for _, size in block.lines]
    y = xy[1] + (block.size[1] - sum(heights)) / 2
    for (text, size), height in zip(block.lines, heights, strict=True):
        color = title if size == style.title else note
        _text(canvas, (xy[0] + block.indent, y + height / 2), text, size, style, color)
        y += height


def _chip_pad(block: Block, style: Style) -> tuple[int, int]:
    return (round(0.4 * style.title), round(0.28 * style.title)) if block.lines else (0, 0)


def _chip_size(block: Block, style: Style) -> tuple[int, int]:
    pad_x, pad_y = _chip_pad(block, style)
    return block.size[0] + 2 * pad_x, block.size[1] + 2 * pad_y


def _draw_chip(canvas: Image.Image, block: Block, rect: Rect, style: Style, color: Color) -> None:
    """The block on its region's colour, with a soft dark rim that separates it from any background."""
    pad_x, pad_y = _chip_pad(block, style)
    radius, rim = 0.42 * style.title, max(1.0, 0.07 * style.title)
    grown = (rect[0] - rim, rect[1] - rim, rect[2] + rim, rect[3] + rim)
    rounded(canvas, grown, radius + rim, BLACK, 0.4)
    rounded(canvas, rect, radius, color)
    corner = (rect[0] + pad_x, rect[1] + pad_y)
    ink = ink_on(color)
    if not block.lines:
        _centered_text(canvas, rect, block.number, style, ink)
        return
    badge = (np.array(color) * 0.25 + np.array(ink) * 0.75).astype(int).tolist()
    _draw_badge(canvas, block, corner, style, (badge[0], badge[1], badge[2]))
    _draw_lines(canvas, block, corner, style, ink, ink)


def _draw_leader(canvas: Image.Image, rect: Rect, anchor: Anchor, style: Style, color: Color) -> None:
    """A line from the chip to a dot on its region."""
    x, y = anchor.point
    start = (min(max(x, rect[0]), rect[2]), min(max(y, rect[1]), rect[3]))
    width = max(1.5, 0.6 * style.line)
    for extra, tone in ((2 * width, BLACK), (width, WHITE), (0.0, color)):
        opacity = 0.35 if tone == BLACK else 1.0
        stroke(canvas, [start, anchor.point], width + extra, tone, opacity)
        disc(canvas, anchor.point, 1.8 * width + extra / 2, tone, opacity)


def _draw_chips(
    canvas: Image.Image,
    blocks: Sequence[Block],
    rects: Sequence[Rect | None],
    anchors: Sequence[Anchor],
    colors: Sequence[Color],
    style: Style,
) -> None:
    """All leaders first, then all chips; a chip without a place is left out."""
    for rect, anchor, color in zip(rects, anchors, colors, strict=True):
        if rect is not None and needs_leader(rect, anchor, style.gap):
            _draw_leader(canvas, rect, anchor, style, color)
    for block, rect, color in zip(blocks, rects, colors, strict=True):
        if rect is not None:
            _draw_chip(canvas, block, rect, style, color)


# Legend


def _legend_rows(results: Sequence[Mapping[str, Any]], style: Style, width: float) -> list[list[Block]]:
    """The regions' texts in rows of equally wide columns, as many columns as the text allows."""
    gutter = 1.4 * style.title
    texts = text_blocks(results, style, 20 * style.title)
    column = max(block.size[0] for block in texts) + gutter
    columns = max(1, min(int((width + gutter) // column), len(texts)))
    room = (width + gutter) / columns - gutter
    blocks = text_blocks(results, style, room)
    return [blocks[start : start + columns] for start in range(0, len(blocks), columns)]


def _fitting(heights: Sequence[int], limit: float) -> int:
    """How many rows fit into a height; a few always do."""
    fit = int(np.searchsorted(np.cumsum(heights), limit, side="right"))
    return min(len(heights), max(fit, _LEGEND_LEAST_ROWS))


def _add_legend(
    canvas: Image.Image, results: Sequence[Mapping[str, Any]], colors: Sequence[Color], style: Style
) -> Image.Image:
    """The picture over a panel that lists the regions; a narrow picture is centred over a wider panel."""
    margin, row_gap = style.title, round(0.45 * style.title)
    width = max(canvas.width, 16 * style.title)
    rows = _legend_rows(results, style, width - 2 * margin)
    heights = [max(block.size[1] for block in row) + row_gap for row in rows]
    kept = _fitting(heights, _LEGEND_SHARE * canvas.height)
    missing = sum(map(len, rows[kept:]))
    note = _line_height(style.title) if missing else 0
    panel = 2 * margin + sum(heights[:kept]) - row_gap + (note + row_gap if missing else 0)
    sheet = Image.new("RGB", (width, canvas.height + panel), PANEL)
    sheet.paste(canvas, ((width - canvas.width) // 2, 0))
    step = (width - 2 * margin + 1.4 * style.title) / len(rows[0])
    y, next_color = canvas.height + margin, iter(colors)
    for row, height in zip(rows[:kept], heights, strict=False):
        for column, block in enumerate(row):
            corner = (round(margin + column * step), y)
            _draw_badge(sheet, block, corner, style, next(next_color))
            _draw_lines(sheet, block, corner, style, PANEL_TEXT, PANEL_NOTE)
        y += height
    if missing:
        _text(sheet, (margin, y + note / 2), f"+ {missing} more", style.title, style, PANEL_NOTE)
    return sheet


def draw_labels(
    canvas: Image.Image,
    results: Sequence[Mapping[str, Any]],
    anchors: Sequence[Anchor],
    colors: Sequence[Color],
    style: Style,
    crowd: NDArray[np.floating],
) -> Image.Image:
    """Draws the labels next to their regions or, where they would crowd the picture, as chips and a legend.

    Args:
        canvas: The picture; drawn on in place.
        results: The pipeline's results, read for "concept", "concept_score" and "caption".
        anchors: Where each region lies on the canvas.
        colors: The regions' colours.
        style: Sizes.
        crowd: Cost map for `place_labels`.

    Returns:
        The canvas, or a taller picture where a legend was needed.
    """
    bounds = canvas.size
    width = min(17 * style.title, 0.5 * canvas.width)
    blocks = text_blocks(results, style, width)
    sizes = [_chip_size(block, style) for block in blocks]
    rects: list[Rect | None] = [None]
    crowded = sum(w * h for w, h in sizes) > CROWDED_SHARE * canvas.width * canvas.height
    if not crowded and width >= _LEAST_WIDTH * style.title:
        rects = place_labels(sizes, anchors, bounds, gap=style.gap, crowd=crowd)
    legend = None in rects
    if legend:
        blocks = text_blocks([{}] * len(results), style, width)  # numbers only
        sizes = [_chip_size(block, style) for block in blocks]
        rects = place_labels(sizes, anchors, bounds, gap=max(style.gap // 2, 1), crowd=crowd, inside=True)
    _draw_chips(canvas, blocks, rects, anchors, colors, style)
    return _add_legend(canvas, results, colors, style) if legend else canvas
