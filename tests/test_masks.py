"""Run lengths, polygons, boxes, interior points and suppression: exact numbers, COCO parity, properties."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from tap_llm.errors import InputError
from tap_llm.masks import (
    box_iou,
    box_nms,
    decode_rle,
    encode_rle,
    mask_to_box,
    mask_to_points,
    polygons_to_mask,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24))


def rectangle(height: int, width: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


@given(masks)
@quick
def test_rle_round_trip(mask: np.ndarray) -> None:
    rle = json.loads(json.dumps(encode_rle(mask)))
    decoded = decode_rle(rle)
    assert decoded.dtype == bool and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(decode_rle({**rle, "counts": rle["counts"].encode()}), mask)


@given(masks)
@quick
def test_rle_is_byte_identical_with_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_rle(mask) == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
    np.testing.assert_array_equal(decode_rle(theirs), mask)


def test_rle_long_runs_match_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = rectangle(1500, 2000, 700, 3, 1999, 1490)
    mask[::7, ::311] ^= True
    assert encode_rle(mask)["counts"].encode() == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)


def test_rle_known_strings() -> None:
    assert encode_rle(np.zeros((2, 3), bool)) == {"size": [2, 3], "counts": "6"}
    assert encode_rle(np.ones((2, 3), bool)) == {"size": [2, 3], "counts": "06"}
    assert encode_rle(np.array([[0, 255], [7, 0]])) == {"size": [2, 2], "counts": "121"}


def test_uncompressed_rle_is_column_major() -> None:
    decoded = decode_rle({"size": [2, 3], "counts": [1, 2, 3]})
    assert decoded.tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"counts": "6"}, 'missing key "size"'),
        ({"size": [2, 3]}, 'missing key "counts"'),
        ({"size": [2], "counts": "6"}, r"size must be \[height, width\]"),
        ({"size": [2, 3, 1], "counts": "6"}, "size must be"),
        ({"size": ["2", "3"], "counts": "6"}, "size must be"),
        ({"size": [2.5, 3], "counts": "6"}, "size must be"),
        ({"size": [2.5, 2, 3], "counts": "6"}, "size must be"),
        ({"size": None, "counts": "6"}, "size must be"),
        ({"size": [0, 3], "counts": [0]}, "has no pixels"),
        ({"size": [-2, -3], "counts": [6]}, "has no pixels"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "too large"),
        ({"size": [2, 3], "counts": [1, 2]}, r"sum to 3, but size \[2, 3\] has 6 pixels"),
        ({"size": [2, 3], "counts": [7, -1]}, "between 0 and 6"),
        ({"size": [2, 3], "counts": [2**62] * 4}, "between 0 and 6"),
        ({"size": [2, 3], "counts": [2**64]}, "whole run lengths"),
        ({"size": [2, 3], "counts": np.array([2**64 - 1, 7], np.uint64)}, "between 0 and 6"),
        ({"size": [2, 3], "counts": [1.5, 4.5]}, "whole run lengths"),
        ({"size": [2, 3], "counts": [[6]]}, "whole run lengths"),
        ({"size": [2, 3], "counts": []}, "whole run lengths"),
        ({"size": [2, 3], "counts": None}, "whole run lengths"),
        ({"size": [2, 3], "counts": ""}, "empty"),
        ({"size": [2, 3], "counts": "6\x00"}, "characters"),
        ({"size": [2, 3], "counts": "é"}, "characters"),
        ({"size": [2, 3], "counts": "6P"}, "truncated"),
        ({"size": [2, 3], "counts": "P" * 500 + "0"}, "run length is too large"),
        ({"size": [2, 3], "counts": "oooooo?"}, "between 0 and 6"),
    ],
)
def test_rle_refuses_damage(rle: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_rle(rle)


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), min_size=1, max_size=20))
@quick
def test_any_rle_string_decodes_or_is_refused(counts: str) -> None:
    try:
        assert decode_rle({"size": [6, 5], "counts": counts}).shape == (6, 5)
    except InputError as error:
        assert str(error).startswith("RLE: ")


def test_encoder_wants_two_dimensions() -> None:
    with pytest.raises(InputError, match=r"got \(1, 2, 3\)"):
        encode_rle(np.zeros((1, 2, 3), bool))
    with pytest.raises(InputError, match=r"got \(0, 3\)"):
        encode_rle(np.zeros((0, 3), bool))


def test_polygon_follows_box_edges() -> None:
    square = polygons_to_mask([[3, 3, 8, 3, 8, 8, 3, 8]], 10, 12)
    np.testing.assert_array_equal(square, rectangle(10, 12, 3, 3, 8, 8))
    np.testing.assert_array_equal(polygons_to_mask([[[3, 3], [8, 3], [8, 8], [3, 8]]], 10, 12), square)


def test_polygons_unite_and_are_cut_at_the_image() -> None:
    left, right = [-50, -50, 4, -50, 4, 50, -50, 50], [2, 2, 7, 2, 7, 5, 2, 5]
    expected = rectangle(6, 10, 0, 0, 4, 6) | rectangle(6, 10, 2, 2, 7, 5)
    np.testing.assert_array_equal(polygons_to_mask([left, right], 6, 10), expected)
    assert not polygons_to_mask([[20, 20, 30, 20, 30, 30]], 6, 10).any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(3, 9), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_polygons_match_pycocotools(seed: int, height: int, width: int, corners: int, whole: bool) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    points = np.random.default_rng(seed).uniform(-0.3, 1.3, (corners, 2)) * (width, height)
    polygon = (np.round(points) if whole else points).ravel().tolist()
    theirs = coco.decode(coco.frPyObjects([polygon], height, width))[..., 0]
    np.testing.assert_array_equal(polygons_to_mask([polygon], height, width), theirs.astype(bool))


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        ([], "expected a list of polygons"),
        ([[1, 2, 3, 4]], "polygon 0: expected at least 3 points"),
        ([[0, 0, 5, 0, 5, 5], [1, 2, 3, 4, 5]], "polygon 1: expected"),
        ([0, 0, 5, 0, 5, 5], r"one polygon alone is written \[\["),
        ([["a", "b", "c", "d", "e", "f"]], "polygon 0: expected"),
        ([[0, 0, 5, 0, 5, float("nan")]], "NaN"),
        ([[0, 0, 1e12, 0, 1e12, 1e12]], "outline is longer"),
    ],
)
def test_polygons_refuse_damage(polygons: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        polygons_to_mask(polygons, 10, 10)


def test_box_edges_are_exclusive() -> None:
    assert mask_to_box(rectangle(20, 30, 3, 5, 8, 6)) == [3, 5, 8, 6]
    assert mask_to_box(np.ones((4, 5), bool)) == [0, 0, 5, 4]
    assert mask_to_box(np.zeros((4, 5), bool)) is None


@given(masks, st.integers(1, 10))
@quick
def test_points_are_distinct_and_inside(mask: np.ndarray, count: int) -> None:
    points = mask_to_points(mask, count)
    assert points.dtype == np.float32 and points.shape == (min(count, mask.sum()), 2)
    columns, rows = points.astype(int).T
    assert mask[rows, columns].all()
    assert len(set(zip(rows, columns, strict=True))) == len(points)
    np.testing.assert_array_equal(points, mask_to_points(mask, count))


def test_first_point_is_the_most_interior_one() -> None:
    assert mask_to_points(rectangle(40, 60, 10, 5, 21, 16), 1).tolist() == [[15, 10]]
    assert mask_to_points(np.ones((9, 9), bool), 1).tolist() == [[4, 4]]
    y, x = np.mgrid[:60, :90]
    blob = (x - 30) ** 2 + (y - 30) ** 2 <= 400
    handle = rectangle(60, 90, 45, 28, 90, 32)
    assert np.abs(mask_to_points(blob | handle, 1) - [[30, 30]]).max() <= 1


def test_points_cover_all_parts() -> None:
    mask = rectangle(100, 100, 2, 2, 60, 60) | rectangle(100, 100, 80, 80, 84, 84)
    mask |= rectangle(100, 100, 90, 10, 95, 15)
    parts, count = ndimage.label(mask)
    columns, rows = mask_to_points(mask, 8).astype(int).T
    assert set(parts[rows, columns]) == set(range(1, count + 1))

    bar = mask_to_points(rectangle(20, 200, 0, 5, 200, 15), 8)
    gaps = np.diff(np.sort(bar[:, 0]), prepend=0, append=199)
    assert gaps.max() < 60


def test_points_keep_off_the_border() -> None:
    y, x = np.mgrid[:100, :100]
    disc = (x - 50) ** 2 + (y - 50) ** 2 <= 45**2
    columns, rows = mask_to_points(disc, 8).astype(int).T
    assert ndimage.distance_transform_edt(disc)[rows, columns].min() >= 5


def test_points_of_large_sparse_masks_are_inside() -> None:
    mask = np.zeros((2000, 3000), dtype=bool)
    mask[1, 2], mask[1999, 2999] = True, True
    mask[1000, 100:2900] = True
    columns, rows = mask_to_points(mask, 8).astype(int).T
    assert mask[rows, columns].all()
    assert {1, 1000, 1999} <= set(rows.tolist())


def test_points_of_nothing() -> None:
    assert mask_to_points(np.zeros((3, 3), bool)).shape == (0, 2)
    with pytest.raises(InputError, match="at least 1, got 0"):
        mask_to_points(np.ones((3, 3), bool), 0)


def test_box_iou_numbers() -> None:
    a = [[0, 0, 10, 10], [0, 0, 0, 0]]
    b = [[5, 0, 15, 10], [0, 0, 10, 10], [20, 20, 30, 30], [2, 2, 4, 7]]
    assert box_iou(a, b).tolist() == [[1 / 3, 1, 0, 0.1], [0, 0, 0, 0]]
    assert box_iou([], b).shape == (0, 4)
    with pytest.raises(InputError, match=r"\(N, 4\)"):
        box_iou([[1, 2, 3]], b)


def test_box_nms_keeps_the_best_of_each_pile() -> None:
    boxes = [[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [0, 0, 10, 9]]
    assert box_nms(boxes, [0.5, 0.9, 0.7, 0.6], 0.5).tolist() == [1, 2]
    assert box_nms(boxes, [0.5, 0.9, 0.7, 0.6], 0.95).tolist() == [1, 2, 3, 0]
    assert box_nms([[0, 0, 1, 1]] * 3, [1, 1, 1], 1.0).tolist() == [0, 1, 2]
    assert box_nms([], [], 0.5).tolist() == []
    with pytest.raises(InputError, match=r"one score per region \(4\)"):
        box_nms(boxes, [1.0], 0.5)
