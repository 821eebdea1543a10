"""Connected parts of masks, and points inside them."""

from __future__ import annotations

import numpy as np
import pytest

from tap_llm.clip_as_rnn.components import part_points, split_mask


def test_corners_connect_and_the_largest_part_comes_first() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:4, 2:4] = mask[4:6, 4:6] = True
    mask[10:16, 20:28] = True
    large, diagonal = split_mask(mask)
    assert large.box == (20, 10, 28, 16) and large.pixels.all()
    assert diagonal.box == (2, 2, 6, 6) and diagonal.pixels.sum() == 8
    assert (large.full(20, 30) | diagonal.full(20, 30) == mask).all()


@pytest.mark.parametrize(("area", "count"), [(5, 2), (4, 1)])
def test_parts_below_a_twentieth_are_left_out(area: int, count: int) -> None:
    mask = np.zeros((10, 60), dtype=bool)
    mask[0, :area] = True
    mask[2:7, :19] = True  # 95 pixels
    assert len(split_mask(mask)) == count


def test_at_most_ten_parts_are_kept_and_an_empty_mask_has_none() -> None:
    mask = np.zeros((4, 60), dtype=bool)
    mask[1, ::4] = True
    assert len(split_mask(mask)) == 10
    assert len(split_mask(mask, max_parts=3)) == 3
    assert split_mask(np.zeros((4, 60), dtype=bool)) == []


def test_the_peak_comes_first_and_all_points_lie_inside() -> None:
    rows, columns = np.mgrid[:90, :120]
    mask = np.hypot(rows - 45, (columns - 60) / 1.5) < 30
    soft = np.exp(-np.hypot(rows - 40, columns - 80) / 20).astype(np.float32)
    (part,) = split_mask(mask)
    points = part_points(part, soft)
    assert points[0] == [80, 40] and len(points) == 4
    assert all(mask[y, x] for x, y in points)
    distances = [np.hypot(a[0] - b[0], a[1] - b[1]) for i, a in enumerate(points) for b in points[:i]]
    assert min(distances) > 15
    assert part_points(part, soft) == points


def test_a_part_of_one_pixel_has_one_point() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[3, 5] = True
    (part,) = split_mask(mask)
    assert part_points(part, np.zeros((9, 9), np.float32)) == [[5, 3]]


def test_thin_parts_of_large_pictures_have_points_on_them() -> None:
    mask = np.zeros((3000, 4000), dtype=bool)
    mask[1500, 7:3990] = True
    (part,) = split_mask(mask)
    points = part_points(part, mask.astype(np.float32))
    assert points[0] == [7, 1500]
    assert all(mask[y, x] for x, y in points)
