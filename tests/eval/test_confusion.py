"""Confusion of label maps against a direct computation, and numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eval.confusion import add_counts, class_ious, count_labels, mean_iou, without_background

CLASSES = 5


def random_maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth with void in several disguises and without class 3; answers with labels that are none."""
    rng = np.random.default_rng(seed)
    truth, answer = rng.choice([0, 1, 2, 4, 5, 255, -1], (9, 14)), rng.integers(0, CLASSES + 2, (9, 14))
    return truth.astype(np.int32), answer.astype(np.int32)


def direct_ious(pairs: list[tuple[np.ndarray, np.ndarray]], labels: range) -> list[float]:
    """By definition, over all pixels at once; classes that the truth never holds left out."""
    truth, answer = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    known = (truth >= labels.start) & (truth <= CLASSES)
    if labels.start:
        known &= answer != 0
    truth, answer = truth[known], answer[known]
    return [
        ((truth == c) & (answer == c)).sum() / ((truth == c) | (answer == c)).sum()
        for c in labels
        if (truth == c).any()
    ]


def test_equals_the_direct_computation() -> None:
    pairs = [random_maps(seed) for seed in range(6)]
    table = add_counts([count_labels(*pair, CLASSES) for pair in pairs], CLASSES)
    ious = direct_ious(pairs, range(CLASSES + 1))
    assert mean_iou(table) == pytest.approx(np.mean(ious), abs=1e-15)
    assert class_ious(table)[~np.isnan(class_ious(table))] == pytest.approx(ious, abs=1e-15)
    assert np.isnan(class_ious(table)[3]) and table[:, 3].sum() > 0
    without = direct_ious(pairs, range(1, CLASSES + 1))
    assert mean_iou(without_background(table)) == pytest.approx(np.mean(without), abs=1e-15)


def test_one_matrix_whatever_the_parts_and_their_order() -> None:
    pairs = [random_maps(seed) for seed in range(4)]
    counts = [count_labels(*pair, CLASSES) for pair in pairs]
    whole = count_labels(*(np.concatenate([pair[side] for pair in pairs]) for side in (0, 1)), CLASSES)
    assert np.array_equal(add_counts(counts, CLASSES), add_counts([whole], CLASSES))
    assert np.array_equal(add_counts(counts, CLASSES), add_counts(counts[::-1], CLASSES))


def test_numbers_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1], [2, 2, 2, 255]])
    answer = np.array([[0, 1, 1, 2], [2, 2, 0, 1]])
    counts = count_labels(truth, answer, 2)
    assert counts == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 2, 1], [2, 0, 1], [2, 2, 2]]
    table = add_counts([counts], 2)
    assert class_ious(table) == pytest.approx([1 / 3, 1 / 3, 2 / 4])
    # without row and column 0: class 1 has 1 of 2, class 2 has 2 of 3
    assert class_ious(without_background(table)) == pytest.approx([1 / 2, 2 / 3])


def test_labels_that_are_none_and_empty_truth() -> None:
    truth = np.array([[1, 1, 2]])
    assert count_labels(truth, np.array([[-1, 7, 2]]), 2) == [[1, 3, 2], [2, 2, 1]]
    table = add_counts([count_labels(truth, np.array([[-1, 7, 2]]), 2)], 2)
    assert mean_iou(table) == mean_iou(without_background(table)) == 0.5
    nothing = count_labels(np.full((2, 2), 255), truth[:, :2].repeat(2, 0), 2)
    assert nothing == [] and mean_iou(add_counts([nothing], 2)) is None
