"""Visual prompts: exact pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tap_llm.clip_as_rnn.drawing import contour_outline, ellipse_outline, rectangle_outline
from tap_llm.clip_as_rnn.visual_prompts import (
    BLUR_SIGMA,
    PromptPainter,
    blur_kernel,
    blurred,
    gray,
    outline,
    prompt_mask,
)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((24, 31), dtype=bool)
    mask[6:15, 8:20] = True
    return mask


def lit(outline: np.ndarray) -> list[tuple[int, int]]:
    return [(int(row), int(column)) for row, column in np.argwhere(outline)]


def test_smallest_ellipse() -> None:
    expected = [(0, 2), (1, 1), (1, 3), (2, 0), (2, 4), (3, 1), (3, 3), (4, 2)]
    assert lit(ellipse_outline((5, 5), (2, 2), (2, 2))) == expected


def test_ellipse_is_closed_and_touches_its_axes() -> None:
    drawn = ellipse_outline((61, 81), (40, 30), (35, 20))
    assert drawn[30, 5] and drawn[30, 75] and drawn[10, 40] and drawn[50, 40]
    assert not drawn[30, 40] and drawn.sum() < 61 * 81 / 8
    assert (drawn == drawn[::-1]).mean() > 0.98


def test_outlines_may_leave_the_picture() -> None:
    assert ellipse_outline((5, 5), (0, 0), (4, 4)).any()
    assert not rectangle_outline((5, 5), (2, 2), (9, 9)).any()


def test_degenerate_outlines_are_points() -> None:
    assert lit(ellipse_outline((5, 5), (2, 3), (0, 0))) == [(3, 2)]
    assert lit(rectangle_outline((5, 5), (2, 3), (0, 0))) == [(3, 2)]


def test_rectangle_hangs_on_the_centroid() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 2:7] = True
    assert lit(outline(mask, "rectangle"))[0] == (2, 2)
    mask[2:7, 8] = True  # the tight box is now columns 2 to 8, but the centroid is still in column 4
    assert np.flatnonzero(outline(mask, "rectangle")[2]).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_circle_spans_all_parts_around_the_mean() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[5, 4] = mask[15, 24] = True
    drawn = outline(mask, "circle")
    assert drawn[10, 14 - 10] and drawn[10, 14 + 10] and drawn[10 - 5, 14] and drawn[10 + 5, 14]


def test_contour_fills_holes() -> None:
    mask = np.ones((7, 7), dtype=bool)
    mask[[0, -1]] = mask[:, [0, -1]] = False
    ring = mask.copy()
    ring[3, 3] = False
    expected = mask.copy()
    expected[2:5, 2:5] = False
    assert np.array_equal(contour_outline(ring), expected)


def test_blur_kernel() -> None:
    assert pytest.approx(2.6) == BLUR_SIGMA
    kernel = blur_kernel()
    assert len(kernel) == 15 and kernel.sum() == pytest.approx(1) and kernel.argmax() == 7
    assert kernel[8] / kernel[7] == pytest.approx(np.exp(-1 / (2 * 2.6**2)))


def test_blur_mirrors_without_repeating_the_border() -> None:
    image = np.zeros((1, 40, 3), dtype=np.uint8)
    image[0, 0] = 255
    kernel = blur_kernel()
    assert blurred(image)[0, 0, 0] == round(255 * kernel[7])
    assert blurred(image)[0, 3, 0] == round(255 * kernel[4])
    flat = np.full((3, 2, 3), 77, dtype=np.uint8)
    assert np.array_equal(blurred(flat), flat)


def test_gray_weights() -> None:
    pure = np.eye(3, dtype=np.uint8)[None] * 255
    assert gray(pure)[0, :, 0].tolist() == [76, 150, 29]
    assert gray(pure, swapped=True)[0, :, 0].tolist() == [29, 150, 76]


@pytest.mark.parametrize("prompts", [("blur",), ("gray",), ("black",), ("blur", "gray"), ("gray", "black")])
def test_effects_on_the_outside_leave_the_inside(image: np.ndarray, mask: np.ndarray, prompts: tuple[str, ...]) -> None:
    painted = PromptPainter(image, prompts).paint(mask)  # type: ignore[arg-type]
    assert np.array_equal(painted[mask], image[mask])
    assert not np.array_equal(painted[~mask], image[~mask])
    whole = PromptPainter(image, prompts).paint(np.ones_like(mask))  # type: ignore[arg-type]
    assert np.array_equal(whole, image)


def test_black_is_zero_outside(image: np.ndarray, mask: np.ndarray) -> None:
    assert not PromptPainter(image, ("black", "blur", "gray")).paint(mask)[~mask].any()


def test_gray_sees_the_blurred_picture(image: np.ndarray, mask: np.ndarray) -> None:
    painted = PromptPainter(image, ("gray", "blur")).paint(mask)
    assert np.array_equal(painted[~mask], gray(blurred(image))[~mask])


def test_outlines_are_red_and_on_top(image: np.ndarray, mask: np.ndarray) -> None:
    painted = PromptPainter(image, ("circle", "blur")).paint(mask)
    drawn = outline(mask, "circle")
    assert (painted[drawn] == (255, 0, 0)).all()
    expected = np.where(mask[..., None], image, blurred(image))
    assert np.array_equal(painted[~drawn], expected[~drawn])


def test_order_of_the_names_does_not_matter(image: np.ndarray, mask: np.ndarray) -> None:
    names = ("blur", "gray", "circle", "contour")
    pictures = [PromptPainter(image, order).paint(mask) for order in itertools.permutations(names)]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_nothing_to_show_leaves_the_picture(image: np.ndarray, mask: np.ndarray) -> None:
    for prompts in (("circle",), ("rectangle", "contour"), ("black",)):
        painted = PromptPainter(image, prompts).paint(np.zeros_like(mask))  # type: ignore[arg-type]
        assert np.array_equal(painted, image)


def test_soft_masks_that_sum_to_one_show_nothing() -> None:
    soft = np.zeros((10, 10), dtype=np.float32)
    soft[0, 0] = 1
    assert not prompt_mask(soft, 0.5).any()
    soft[0, 1] = 0.2
    assert lit(prompt_mask(soft, 0.5)) == [(0, 0)]
    assert not prompt_mask(np.full((10, 10), 0.5, dtype=np.float32), 0.5).any()  # strictly above
