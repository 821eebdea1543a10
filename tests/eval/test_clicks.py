"""Where clicks go."""

from __future__ import annotations

import numpy as np

from eval.clicks import Clicks


def square(x, y, side):
    mask = np.zeros((20, 30), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_first_click_lies_in_the_middle():
    assert Clicks(np.stack([square(2, 4, 5), square(10, 1, 7)])).prompts() == [
        {"points": [[4, 6]], "labels": [1]}, {"points": [[13, 4]], "labels": [1]},
    ]  # fmt: skip


def test_next_click_lies_in_the_largest_error():
    """A missed part of 5 x 5 outweighs a false one of 3 x 3, and the other way round; no error, no click."""
    true = square(2, 2, 5) | square(15, 10, 5)
    clicks = Clicks(np.stack([true] * 3))
    first = clicks.prompts()[0]["points"]
    clicks.correct([square(2, 2, 5) | square(25, 1, 3), true | square(8, 10, 5), true])
    assert clicks.prompts() == [
        {"points": [*first, [17, 12]], "labels": [1, 1]},
        {"points": [*first, [10, 12]], "labels": [1, 0]},
        {"points": first, "labels": [1]},
    ]
