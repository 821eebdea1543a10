"""Geometry of labels: wrapping text, and placing rectangles so that none overlaps or leaves the picture.

Nothing here draws. Rectangles are `(x0, y0, x1, y1)` in pixels, right and bottom edges exclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rect = tuple[int, int, int, int]
Floats = NDArray[np.float64]
Measure = Callable[[str], float]

# Candidate positions around an anchor box, best first. Per axis (a, b, c): the label starts at
# box start + a * box extent - b * label extent + c * gap.
_AROUND = np.array(
    [
        [[0, 0, 0], [0, 1, -1]],  # above: left, centre, right
        [[0.5, 0.5, 0], [0, 1, -1]],
        [[1, 1, 0], [0, 1, -1]],
        [[0, 0, 1], [0, 0, 1]],  # inside: top left, top right
        [[1, 1, -1], [0, 0, 1]],
        [[0, 0, 0], [1, 0, 1]],  # below: left, centre, right
        [[0.5, 0.5, 0], [1, 0, 1]],
        [[1, 1, 0], [1, 0, 1]],
        [[1, 0, 1], [0, 0, 0]],  # right: top, middle
        [[1, 0, 1], [0.5, 0.5, 0]],
        [[0, 1, -1], [0, 0, 0]],  # left: top, middle
        [[0, 1, -1], [0.5, 0.5, 0]],
        [[0, 0, 1], [1, 1, -1]],  # inside: bottom left, bottom right
        [[1, 1, -1], [1, 1, -1]],
    ]
)
# What is worth what: one step down that list, one whole region hidden, a distance of the mean side of the picture,
# a leader.
_ORDER_COST, _CROWD_COST, _DISTANCE_COST, _LEADER_COST = 0.02, 1.5, 4.0, 0.8


@dataclass(frozen=True)
class Anchor:
    """What a label belongs to: a box and a point that certainly lies on the thing itself."""

    box: Rect
    point: tuple[float, float]


class _Crowd:
    """Sums of a cost map over rectangles, by summed areas; the map may be coarser than the picture."""

    def __init__(self, cost: NDArray[np.floating] | None, width: int, height: int) -> None:
        cost = np.zeros((1, 1)) if cost is None else np.asarray(cost, dtype=np.float64)
        self.rows, self.columns = cost.shape
        self.scale = np.array([self.columns / width, self.rows / height] * 2)
        self.sums = np.pad(cost, ((1, 0), (1, 0))).cumsum(0).cumsum(1)

    def under(self, rects: Floats) -> Floats:
        """(K, 4) rectangles to (K,) costs of covering them."""
        scaled = rects * self.scale
        x0, y0 = np.floor(scaled[:, 0]).astype(int), np.floor(scaled[:, 1]).astype(int)
        x1 = np.clip(np.ceil(scaled[:, 2]).astype(int), x0 + 1, self.columns)
        y1 = np.clip(np.ceil(scaled[:, 3]).astype(int), y0 + 1, self.rows)
        total = self.sums[y1, x1] - self.sums[y0, x1] - self.sums[y1, x0] + self.sums[y0, x0]
        areas = (rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1])
        return np.asarray(total / np.maximum((x1 - x0) * (y1 - y0), 1) * areas, dtype=np.float64)


def distance_to_box(rects: Floats, box: Rect) -> Floats:
    """Gap in pixels between each of the (K, 4) rectangles and a box; 0 where they touch or overlap."""
    dx = np.maximum(np.maximum(box[0] - rects[:, 2], rects[:, 0] - box[2]), 0)
    dy = np.maximum(np.maximum(box[1] - rects[:, 3], rects[:, 1] - box[3]), 0)
    return np.asarray(np.hypot(dx, dy), dtype=np.float64)


def needs_leader(rect: Rect, anchor: Anchor, gap: int) -> bool:
    """Whether the label lies so far from its region that a line has to connect the two."""
    return bool(distance_to_box(np.array([rect], dtype=np.float64), anchor.box)[0] > 2 * gap)


def _near(anchor: Anchor, size: tuple[int, int], gap: int, inside: bool) -> Floats:
    """(K, 2) top-left corners next to the anchor; with `inside`, centred on its point first."""
    box = np.array(anchor.box, dtype=np.float64)
    factors = np.stack([box[2:] - box[:2], np.array(size, dtype=np.float64), np.full(2, float(gap))], axis=1)
    factors[:, 1] *= -1
    corners = box[:2] + (_AROUND * factors).sum(-1)
    on_point = np.array([anchor.point]) - np.array(size) / 2
    return np.concatenate([on_point, corners] if inside else [corners, on_point])


def _grid(size: tuple[int, int], bounds: tuple[int, int]) -> Floats:
    """(K, 2) top-left corners all over the picture, at most about 48 steps per axis."""
    axes = []
    for length, extent in zip(size, bounds, strict=True):
        room = extent - length
        steps = int(np.clip(np.ceil(2 * room / max(size[1], 1)), 1, 48))
        axes.append(np.linspace(0, room, steps + 1))
    x, y = np.meshgrid(*axes)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _overlaps(rects: Floats, taken: Floats, gap: int) -> NDArray[np.bool_]:
    """(K,) whether a rectangle comes closer than `gap` to one of the (P, 4) taken ones."""
    x0, y0, x1, y1 = rects.T[..., None]
    across = (x0 < taken[:, 2] + gap) & (x1 > taken[:, 0] - gap)
    along = (y0 < taken[:, 3] + gap) & (y1 > taken[:, 1] - gap)
    return np.asarray((across & along).any(1), dtype=bool)


def _best(
    anchor: Anchor,
    size: tuple[int, int],
    bounds: tuple[int, int],
    taken: Floats,
    crowd: _Crowd,
    gap: int,
    inside: bool,
) -> Rect | None:
    """The cheapest free position for one label."""
    if size[0] > bounds[0] or size[1] > bounds[1]:
        return None
    near, grid = _near(anchor, size, gap, inside), _grid(size, bounds)
    corners = np.round(np.clip(np.concatenate([near, grid]), 0, np.array(bounds) - np.array(size)))
    rects = np.concatenate([corners, corners + np.array(size)], axis=1)
    order = np.minimum(np.arange(len(rects)), len(near)) * _ORDER_COST
    far = distance_to_box(rects, anchor.box)
    cost = order + _CROWD_COST * crowd.under(rects) + _DISTANCE_COST * far / (0.5 * sum(bounds))
    cost += np.where(far > 2 * gap, _LEADER_COST, 0.0)
    cost[_overlaps(rects, taken, max(gap // 2, 1))] = np.inf
    index = int(cost.argmin())
    if not np.isfinite(cost[index]):
        return None
    x0, y0, x1, y1 = rects[index].astype(int).tolist()
    return x0, y0, x1, y1


def place_labels(
    sizes: Sequence[tuple[int, int]],
    anchors: Sequence[Anchor],
    bounds: tuple[int, int],
    *,
    gap: int = 4,
    crowd: NDArray[np.floating] | None = None,
    inside: bool = False,
) -> list[Rect | None]:
    """Places one label per anchor, greedily, small anchors first (they have the fewest good places).

    Args:
        sizes: (width, height) of each label.
        anchors: What each label belongs to, in the same order.
        bounds: (width, height) of the picture.
        gap: Space between a label and its region; labels keep half of it between each other.
        crowd: (h, w) cost per pixel of the picture, of any resolution, stretched over it: what labels had
            better not cover. Sums to about 1 over a region.
        inside: Try the anchor's point first; for small chips that sit on their regions.

    Returns:
        Per label its rectangle inside the picture, or None where no free place is left. No two overlap.
    """
    costs = _Crowd(crowd, *bounds)
    areas = [(a.box[2] - a.box[0]) * (a.box[3] - a.box[1]) for a in anchors]
    placed: list[Rect | None] = [None] * len(sizes)
    taken = np.empty((0, 4))
    for index in sorted(range(len(sizes)), key=areas.__getitem__):
        rect = _best(anchors[index], sizes[index], bounds, taken, costs, gap, inside)
        placed[index] = rect
        if rect is not None:
            taken = np.concatenate([taken, [rect]])
    return placed


def _split_long(word: str, width: float, measure: Measure) -> list[str]:
    """Cuts a word that is wider than a line into pieces that are not."""
    pieces = [""]
    for character in word:
        if pieces[-1] and measure(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def wrap_text(text: str, width: float, max_lines: int, measure: Measure) -> list[str]:
    """Breaks text into at most `max_lines` lines no wider than `width` (a single character may be).

    `measure` gives the width of a string. What does not fit ends in an ellipsis; empty text has no lines.
    """
    lines: list[str] = []
    pieces = [piece for word in text.split() for piece in _split_long(word, width, measure)]
    for piece in pieces:
        if lines and measure(f"{lines[-1]} {piece}") <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and measure(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()}…"]


def balance_text(text: str, width: float, max_lines: int, measure: Measure) -> list[str]:
    """`wrap_text`, with lines of about equal length: "a dog on / a beach", not "a dog on a / beach"."""
    lines = wrap_text(text, width, max_lines, measure)
    if len(lines) < 2 or lines[-1].endswith("…"):
        return lines
    trials = (wrap_text(text, share * width, len(lines) + 1, measure) for share in (0.55, 0.65, 0.75, 0.85))
    return next((trial for trial in trials if len(trial) == len(lines)), lines)
