"""Views of single objects, as the classifier of CaR sees them: the rest blurred, grey or black, or a red mark on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from tap_llm.masks import mask_to_box

# How often each set of effects is drawn.
EFFECTS: dict[tuple[str, ...], float] = {
    ("black",): 0.6,
    ("blur", "gray"): 0.12,
    ("gray",): 0.08,
    ("blur",): 0.06,
    ("blur", "circle"): 0.08,
    ("circle",): 0.06,
}
_SETS, _BOUNDS = tuple(EFFECTS), np.cumsum(list(EFFECTS.values()))
_COARSE = 0.75  # share of the masks that are as coarse as what a grid of patches gives
_PARTIAL = 0.6  # share of these that show some of the object only, as most CAMs do
_RED = (255, 0, 0)


def view_of(
    rng: np.random.Generator, image: NDArray[np.uint8], mask: NDArray[np.bool_], patch: int
) -> NDArray[np.uint8]:
    """A picture that points at one object.

    Args:
        rng: draws the effects, and how exact the mask is.
        image: (H, W, 3).
        mask: (H, W), not empty.
        patch: side of a patch in pixels; coarse masks are as coarse as these, or up to twice as fine.

    Returns:
        (H, W, 3) uint8.
    """
    effects = _SETS[min(int(np.searchsorted(_BOUNDS, rng.random() * _BOUNDS[-1])), len(_SETS) - 1)]
    if rng.random() < _COARSE:
        mask = coarse(rng, mask, int(rng.integers(patch // 2, patch + 1)), rng.random() < _PARTIAL)
    picture = Image.fromarray(image)
    around = picture
    if "blur" in effects:
        around = around.filter(ImageFilter.GaussianBlur(float(rng.uniform(1.5, 3.5))))
    if "gray" in effects:
        around = around.convert("L").convert("RGB")
    if "black" in effects:
        around = Image.new("RGB", picture.size)
    picture = Image.composite(picture, around, Image.fromarray(mask))
    if "circle" in effects:
        _draw_circle(picture, mask, width=int(rng.integers(1, 3)))
    return np.asarray(picture)


def coarse(rng: np.random.Generator, mask: NDArray[np.bool_], patch: int, partial: bool = False) -> NDArray[np.bool_]:
    """A mask as a map of patches would give it, a little too large or too small, or `partial`; never empty."""
    height, width = mask.shape
    grid = max(1, width // patch), max(1, height // patch)
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    soft = np.asarray(picture.resize(grid, Image.Resampling.BOX).resize((width, height), Image.Resampling.BILINEAR))
    if partial:
        soft = soft * _random_field(rng, (width, height))
    return np.asarray(soft > soft.max() * rng.uniform(0.2, 0.65))


def _random_field(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """(H, W) of smooth random values in 0.1..1, for a size (W, H)."""
    cells = rng.uniform(0.1, 1, rng.integers(5, 10, 2)).astype(np.float32)
    return np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BILINEAR))


def random_blob(rng: np.random.Generator, free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """An ellipse somewhere on the free pixels, without what is not free; empty where nothing is free."""
    height, width = free.shape
    ys, xs = np.nonzero(free)
    if not len(ys):
        return free
    place = int(rng.integers(len(ys)))
    ry, rx = (side * rng.uniform(0.08, 0.25) for side in (height, width))
    y, x = np.ogrid[:height, :width]
    return np.asarray(((y - ys[place]) / ry) ** 2 + ((x - xs[place]) / rx) ** 2 <= 1) & free


def _draw_circle(picture: Image.Image, mask: NDArray[np.bool_], width: int) -> None:
    """The red outline of an ellipse of the size of the mask's box, around the mask's centroid."""
    box = mask_to_box(mask)
    assert box is not None  # masks of objects are not empty
    x0, y0, x1, y1 = box
    ys, xs = np.nonzero(mask)
    x, y, rx, ry = int(xs.mean()), int(ys.mean()), (x1 - x0) // 2, (y1 - y0) // 2
    ImageDraw.Draw(picture).ellipse((x - rx, y - ry, x + rx, y + ry), outline=_RED, width=width)
