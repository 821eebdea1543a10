"""Affinity, boxes and scaling: exact values and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tap_llm.clip_as_rnn.affinity import attention_affinity, box_mask, cam_boxes, min_max, refine_cams, upsample


def random_attention(count: int, sharpness: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (sharpness * torch.randn(count, count, generator=generator)).softmax(dim=1)


def cam_with(*cells: tuple[int, int], shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    cam = np.zeros(shape, dtype=np.float32)
    for row, column in cells:
        cam[row, column] = 1
    return cam


def test_affinity_is_doubly_stochastic_and_symmetric() -> None:
    affinity = attention_affinity(random_attention(30))
    assert torch.equal(affinity, affinity.T) or (affinity - affinity.T).abs().max() < 1e-7
    for dim in (0, 1):
        assert (affinity.sum(dim) - 1).abs().max() < 1e-3
    # Three rounds of mild attention converge to rounding.
    mild = attention_affinity(random_attention(30, 0.1))
    assert (mild.sum(0) - 1).abs().max() <= 3e-7


def test_more_rounds_balance_peaked_attention() -> None:
    peaked = random_attention(30, 8)
    few, many = ((attention_affinity(peaked, rounds).sum(0) - 1).abs().max() for rounds in (3, 30))
    assert many < few


def test_patches_that_attend_to_nothing_give_no_nan() -> None:
    attention = random_attention(9)
    attention[:, 4] = 0
    attention[4] = 0
    assert torch.isfinite(attention_affinity(attention)).all()


def test_identity_attention_leaves_what_is_in_the_boxes() -> None:
    cam = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(1))
    affinity = attention_affinity(torch.eye(48))
    boxes = torch.stack([torch.from_numpy(box_mask(one.numpy(), 0.7)) for one in cam])
    expected = min_max((cam * boxes).flatten(1)).reshape(cam.shape)
    assert torch.allclose(refine_cams(affinity, cam, 0.7), expected, atol=1e-6)


def test_uniform_attention_says_nothing() -> None:
    affinity = attention_affinity(torch.full((48, 48), 1 / 48))
    refined = refine_cams(affinity, torch.from_numpy(cam_with((1, 1), (4, 6)))[None], 0.4)
    assert torch.equal(refined, torch.zeros(1, 6, 8))


def test_boxes_mask_the_source_and_not_the_result() -> None:
    cam = torch.from_numpy(cam_with((1, 1)))
    affinity = attention_affinity(random_attention(48))
    refined = refine_cams(affinity, cam[None], 0.4)[0]
    assert ((refined > 0) & (cam == 0)).any()


def test_weak_cells_outside_the_boxes_do_not_spread() -> None:
    weak, strong = cam_with((1, 1)), cam_with((1, 1))
    strong[5, 7] = 0.2
    affinity = attention_affinity(random_attention(48))
    pair = refine_cams(affinity, torch.from_numpy(np.stack([weak, strong])), 0.4)
    assert torch.equal(pair[0], pair[1])


@pytest.mark.parametrize(
    ("cells", "expected", "clipped"),
    [
        ([(row, column) for row in (1, 2) for column in (1, 2, 3)], [(1, 1, 4, 3)], [(1, 1, 4, 3)]),
        ([(row, column) for row in (2, 3) for column in (5, 6, 7)], [(5, 2, 8, 4)], [(5, 2, 7, 4)]),
        ([(2, 7)], [(7, 2, 8, 3)], [(7, 2, 7, 3)]),
        ([(1, 1), (2, 2)], [(1, 1, 3, 3)], [(1, 1, 3, 3)]),  # diagonal neighbours are one part
        ([(1, 1), (1, 3)], [(1, 1, 2, 2), (3, 1, 4, 2)], [(1, 1, 2, 2), (3, 1, 4, 2)]),
    ],
)
def test_boxes(cells: list[tuple[int, int]], expected: list[object], clipped: list[object]) -> None:
    assert cam_boxes(cam_with(*cells), 0.4) == expected
    assert cam_boxes(cam_with(*cells), 0.4, clip=True) == clipped


def test_clipped_boxes_can_be_empty() -> None:
    assert not box_mask(cam_with((2, 7)), 0.4, clip=True).any()
    assert box_mask(cam_with((2, 7)), 0.4).sum() == 1


def test_a_value_of_exactly_the_threshold_is_outside() -> None:
    cam = cam_with((1, 1))
    cam[4, 4] = 0.4
    assert cam_boxes(cam, 0.4) == [(1, 1, 2, 2)]
    cam[4, 4] = 0.41
    assert len(cam_boxes(cam, 0.4)) == 2


def test_nothing_stays_nothing() -> None:
    zeros = torch.zeros(2, 48)
    assert torch.equal(min_max(zeros), zeros)
    assert torch.equal(min_max(torch.full((1, 48), 0.3)), torch.zeros(1, 48))
    assert cam_boxes(np.zeros((6, 8)), 0.4) == []
    refined = refine_cams(attention_affinity(random_attention(48)), zeros.reshape(2, 6, 8), 0.4)
    assert torch.equal(refined, torch.zeros(2, 6, 8))


def test_rounding_is_not_blown_up() -> None:
    affinity = torch.full((48, 48), 1 / 48) + 1e-10 * torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    refined = refine_cams(affinity, torch.ones(1, 6, 8), 0.4)
    assert not refined.any()


def test_upsampling_has_half_pixel_centres() -> None:
    grid = torch.tensor([[[0.0, 1.0]]])
    assert torch.allclose(upsample(grid, (1, 4))[0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert upsample(torch.rand(3, 4, 5), (37, 41)).shape == (3, 37, 41)
    assert upsample(torch.eye(3)[None], (7, 7)).max() <= 1
