"""Large-scale jitter: picture, masks, boxes and words stay together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.views import Picture, jitter, known_colours, tight_boxes


def picture() -> Picture:
    """24 x 40 pixels; every pixel tells its place, and object i its number in the blue channel."""
    y, x = np.mgrid[:24, :40]
    image = np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)
    masks = np.zeros((3, 24, 40), dtype=bool)
    masks[0, 2:8, 3:12] = masks[1, 10:22, 15:30] = masks[2, 1:20, 33:39] = True
    for number, mask in enumerate(masks):
        image[mask, 2] = 100 + number
    names: list[str | None] = ["a", None, "c"]
    return Picture(image, tight_boxes(masks), masks, names, [["red"], [], ["blue"]], [["x"], ["y"], []],
                   torch.arange(6.0).view(3, 2))  # fmt: skip


def numbers(view: Picture) -> list[int]:
    """Which objects are left, told by their pixels."""
    return [int(view.image[mask][0, 2]) - 100 for mask in view.masks]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_everything_moves_together(seed: int, factor: float, flip: float) -> None:
    whole = picture()
    view = jitter(whole, np.random.default_rng(seed), factor, factor, flip)
    left = numbers(view)
    for number, mask in zip(left, view.masks, strict=True):
        assert (view.image[mask, 2] == 100 + number).all()
        assert mask.sum() == (view.image[..., 2] == 100 + number).sum()
    assert view.masks.shape == (len(left), *view.image.shape[:2])
    np.testing.assert_array_equal(view.boxes, tight_boxes(view.masks))
    assert view.names == [whole.names[number] for number in left]
    assert view.colours == [whole.colours[number] for number in left]
    assert view.captions == [whole.captions[number] for number in left]
    assert view.teacher is not None and whole.teacher is not None
    torch.testing.assert_close(view.teacher, whole.teacher[left])
    steps = np.diff(view.image[:1, : 40 if factor <= 1 else None, 0].astype(int))
    assert (steps == (-1 if flip else 1)).all()


def test_smaller_pictures_lie_in_the_corner_of_a_square() -> None:
    view = jitter(picture(), np.random.default_rng(0), 0.5, 0.5, 0.0)
    assert view.image.shape == (80, 80, 3) and numbers(view) == [0, 1, 2]
    np.testing.assert_array_equal(view.image[:24, :40], picture().image)
    padding = np.concatenate([view.image[24:].reshape(-1, 3), view.image[:24, 40:].reshape(-1, 3)])
    assert (padding == picture().image.mean((0, 1)).astype(np.uint8)).all()
    np.testing.assert_array_equal(view.boxes, picture().boxes)


def test_larger_pictures_are_windows_of_all_places() -> None:
    corners = set()
    for seed in range(60):
        view = jitter(picture(), np.random.default_rng(seed), 2.0, 2.0, 0.0)
        assert view.image.shape == (12, 20, 3)
        corners.add(tuple(view.image[0, 0, :2].tolist()))
    assert {x for x, _ in corners} >= {0, 20} and {y for _, y in corners} >= {0, 12}
    assert all(x <= 20 and y <= 12 for x, y in corners)


def test_factors_spread_over_the_range_evenly_in_octaves() -> None:
    sides = [jitter(picture(), np.random.default_rng(seed), 0.5, 2.0, 0.0).image.shape[1] for seed in range(200)]
    assert 0.4 < np.mean([side < 40 for side in sides]) < 0.6  # 1 is the middle
    assert min(sides) < 24 and max(sides) > 70


def test_slivers_are_dropped() -> None:
    masks = np.zeros((2, 100, 100), dtype=bool)
    masks[0, 50, 50:54] = masks[1, 50:60, 50:60] = True  # 4 pixels: less than 0.05 %
    small = Picture(np.zeros((100, 100, 3), np.uint8), tight_boxes(masks), masks, ["a", "b"], [[], []], [[], []])
    view = jitter(small, np.random.default_rng(0), 1.0, 1.0, 0.0)
    assert view.names == ["b"] and view.boxes.tolist() == [[50, 50, 60, 60]]
    nothing = jitter(small.keep([]), np.random.default_rng(0), 2.0, 2.0, 0.0)
    assert nothing.names == [] and nothing.boxes.shape == (0, 4) and nothing.masks.shape == (0, 50, 50)


def test_unknown_words_for_colours_are_left_out() -> None:
    assert known_colours(["red", "turquoise", "navy blue"]) == ["red", "navy blue"]
