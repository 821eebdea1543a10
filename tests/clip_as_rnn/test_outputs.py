"""The result: rows, regions, label map."""

from __future__ import annotations

import numpy as np
import pytest

from tap_llm.clip_as_rnn import CarOutput
from tap_llm.clip_as_rnn.outputs import paint_labels
from tap_llm.clip_as_rnn.passes import plan_passes
from tap_llm.clip_as_rnn.postprocess import against_background, drop_large, with_background, wrapped_bgr
from tap_llm.clip_as_rnn.presets import get_preset
from tap_llm.regions import parse_region


def masks() -> np.ndarray:
    masks = np.zeros((3, 4, 6), dtype=bool)
    masks[0, :2], masks[1, 1:3] = True, True
    return masks  # the third is empty


def result(merged: np.ndarray | None = None) -> CarOutput:
    scores = np.array([0.0, 0.5, 0.9, 0.7, 0.0], dtype=np.float32)
    label_map = paint_labels(masks(), scores[[1, 2, 3]], [1, 2, 3], np.zeros((4, 6), dtype=np.int32))
    soft = masks().astype(np.float32)
    return CarOutput(list("abcde"), [1, 2, 3], scores, soft, masks(), label_map, merged_mask=merged)


def test_rows_of_dropped_queries_are_empty() -> None:
    found = result()
    assert found.masks.shape == found.soft_masks.shape == (5, 4, 6)
    assert np.array_equal(found.masks[1:4], masks()) and not found.masks[[0, 4]].any()
    assert found.found == [1, 2] and found.size == (4, 6) and found.steps == 0


def test_the_best_lies_on_top_of_the_label_map() -> None:
    found = result()
    assert found.label_map[:, 0].tolist() == [2, 3, 3, 0]


def test_a_score_of_zero_paints_nothing() -> None:
    painted = paint_labels(masks(), np.zeros(3, dtype=np.float32), [0, 1, 2], np.zeros((4, 6), dtype=np.int32))
    assert not painted.any()


def test_regions_are_what_describe_takes() -> None:
    regions = result().regions()
    assert [(region["category"], region["id"]) for region in regions] == [("b", 1), ("c", 2)]
    for region in regions:
        assert parse_region(region, 4, 6).has_box


def test_merged_region() -> None:
    found = result(merged=masks()[0] | masks()[1])
    (region,) = found.regions()
    assert region["category"] == "c" and region["mask"].sum() == 18
    assert len(found.regions(merged=False)) == 2
    assert result(merged=masks()[2]).regions() == []


def test_background_is_what_no_query_claims() -> None:
    soft = np.array([[[0.2, 0.7]], [[0.5, 0.1]]], dtype=np.float32)
    assert with_background(soft)[0, 0] == pytest.approx([0.5, 0.3])
    assert with_background(soft, 2)[0, 0] == pytest.approx([0.25, 0.09])


def test_masks_against_the_background_alone() -> None:
    """The first class that beats the background there lies above one half."""
    soft = np.array([[[0.0, 0.1, 0.5, 1.0]]], dtype=np.float32)
    assert against_background(soft, 1.0) == pytest.approx(soft)
    assert against_background(soft, 8.0)[0, 0] == pytest.approx([0, 0.1 / (0.1 + 0.9**8), 0.5 / (0.5 + 0.5**8), 1])
    background, own = with_background(soft, 8.0)
    assert np.array_equal(against_background(soft, 8.0)[0] > 0.5, own > background)


@pytest.mark.parametrize(("level", "expected"), [(110, [5, 250, 244]), (118, [13, 1, 252])])
def test_picture_of_the_authors_crf_wraps_around(level: int, expected: list[int]) -> None:
    assert wrapped_bgr(np.full((1, 1, 3), level, dtype=np.uint8))[0, 0].tolist() == expected
    assert wrapped_bgr(np.array([[[200, 210, 220]]], dtype=np.uint8))[0, 0].tolist() == [115, 93, 77]


def test_large_masks() -> None:
    planes = np.ones((2, 4, 5), dtype=bool)
    planes[1, 0, 0] = False
    assert drop_large(planes, 0.95).tolist() == [True, False]
    assert not drop_large(planes, 1.0).any()


def test_passes_of_things_and_stuff() -> None:
    config = get_preset("context")
    things, stuff = plan_passes(["dog", "Sky", "cat", "wall"], config)
    assert things.ids == (0, 2) and things.rivals is None and set(things.prompts) == {"blur", "circle"}
    assert stuff.ids == (1, 3) and stuff.rivals == (0, 2) and set(stuff.prompts) == {"blur", "gray"}
    (only,) = plan_passes(["sky"], config)
    assert only.ids == (0,) and only.rivals is None and set(only.prompts) == {"blur", "gray"}
    things, _ = plan_passes(["dog", "sky"], get_preset("context_paper"))
    assert things.rivals == (1,)
    (only,) = plan_passes(["dog", "sky"], get_preset("voc"))
    assert only.ids == (0, 1)
