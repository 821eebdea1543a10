"""Merging of masks."""

from __future__ import annotations

import numpy as np
import pytest

from tap_llm.clip_as_rnn.merging import ensemble_segments, intersection_over_minimum, merge_expressions


def rectangle(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    mask = np.zeros((10, 10), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


MASK = rectangle(2, 2, 6, 6)
INSIDE, AROUND, APART = rectangle(3, 3, 5, 5), rectangle(0, 0, 8, 8), rectangle(8, 8, 10, 10)


def test_intersection_over_minimum() -> None:
    shares = intersection_over_minimum(MASK, np.stack([INSIDE, AROUND, APART, rectangle(4, 4, 8, 8), MASK & False]))
    assert shares.tolist() == [1, 1, 0, 0.25, 0]


def test_small_segments_do_not_count_by_what_lies_in_the_mask() -> None:
    assert intersection_over_minimum(MASK, INSIDE[None], min_share=0.2).tolist() == [1]
    assert intersection_over_minimum(MASK, INSIDE[None], min_share=0.3).tolist() == [0.25]


def test_segments_replace_a_mask_they_agree_with() -> None:
    close = rectangle(2, 2, 6, 7)
    assert np.array_equal(ensemble_segments(MASK, np.stack([close, APART])), close)
    assert np.array_equal(ensemble_segments(MASK, np.stack([AROUND])), MASK)  # 16 of 64 pixels: too different
    assert np.array_equal(ensemble_segments(MASK, np.stack([AROUND]), min_iou=None), AROUND)


def test_the_best_segment_stands_where_none_is_good() -> None:
    half = rectangle(2, 4, 6, 8)
    assert np.array_equal(ensemble_segments(MASK, np.stack([APART, half]), min_iou=0.3), half)
    assert np.array_equal(ensemble_segments(MASK, np.stack([APART, half])), MASK)


def test_nothing_stays_nothing() -> None:
    assert not ensemble_segments(MASK & False, np.stack([AROUND])).any()
    assert np.array_equal(ensemble_segments(MASK, np.zeros((0, 10, 10), dtype=bool)), MASK)


def test_merging_is_weighted() -> None:
    left, right = rectangle(0, 0, 10, 4), rectangle(0, 6, 10, 10)
    merged = merge_expressions(np.stack([left, right]), np.array([0.75, 0.25], dtype=np.float32))
    assert np.array_equal(merged, left)
    both = merge_expressions(np.stack([left, right]), np.array([0.5, 0.5], dtype=np.float32))
    assert np.array_equal(both, left | right)


def test_small_merged_masks_give_way_to_the_union() -> None:
    small, large = rectangle(0, 0, 1, 4), rectangle(5, 5, 10, 10)
    merged = merge_expressions(np.stack([small, large]), np.array([0.75, 0.25], dtype=np.float32))
    assert np.array_equal(merged, small | large)


@pytest.mark.parametrize("size", [None, (25, 35)])
def test_merged_size(size: tuple[int, int] | None) -> None:
    merged = merge_expressions(MASK[None], np.ones(1, dtype=np.float32), size)
    assert merged.shape == (size or (10, 10)) and merged.any()
    assert not merge_expressions(np.zeros((0, 4, 4), dtype=bool), np.zeros(0, dtype=np.float32), size).any()
    assert not merge_expressions(MASK[None] & False, np.zeros(1, dtype=np.float32), size).any()
