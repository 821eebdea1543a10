"""The prompt sampler: where points lie, what labels say, how boxes move, and how often; and the clicks of a test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from tap_llm.regions import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PAD, TOP_LEFT, parse_region, prompts_to_rows
from tap_llm.tap.prompt_encoder import attended_points
from training.prompts import (
    Prompts,
    PromptSampler,
    centre_click,
    click_error_centre,
    mask_boxes,
    sample_pixels,
    to_canvas,
)

CANVAS, SIDE = 256, 64  # a cell of the mask grid is 4 canvas pixels wide


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def rectangles(count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """(N, side, side) bool, one random rectangle each."""
    rng = np.random.default_rng(seed)
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for mask in masks:
        x, y = rng.integers(0, side - 12, 2)
        width, height = rng.integers(3, 12, 2)
        mask[y : y + height, x : x + width] = True
    return masks


def cells(points: Tensor, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Columns and rows of canvas points, which must lie on centres of cells."""
    positions = (points + 0.5) * side / CANVAS - 0.5
    torch.testing.assert_close(positions, positions.round(), rtol=0, atol=1e-4)
    return positions[..., 0].round().long(), positions[..., 1].round().long()


def values_at(masks: Tensor, points: Tensor) -> Tensor:
    """(N, n) mask values at canvas points."""
    columns, rows = cells(points, masks.shape[-1])
    return masks[torch.arange(len(masks))[:, None], rows, columns]


# Stage 0


def test_point_start_is_one_foreground_point_and_a_pad() -> None:
    masks = rectangles(200)
    prompts = PromptSampler(CANVAS, box_probability=1e-9).start(masks, seeded())
    assert prompts.points.shape == (200, 2, 2) and prompts.points.dtype == torch.float32
    assert prompts.labels.tolist() == [[FOREGROUND, PAD]] * 200
    assert not prompts.from_box.any()
    assert values_at(masks, prompts.points[:, :1]).all()
    assert (prompts.points[:, 1] == -0.5).all()


def test_every_pixel_of_a_mask_is_drawn_equally_often() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 1:6] = True
    prompts = PromptSampler(CANVAS, box_probability=1e-9).start(mask.expand(5000, -1, -1), seeded())
    columns, rows = cells(prompts.points[:, 0], 8)
    counts = torch.bincount(rows * 8 + columns, minlength=64)[mask.flatten()]
    assert counts.sum() == 5000
    assert ((counts - 500).abs() < 5 * 500**0.5).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_share_of_box_starts(share: float) -> None:
    prompts = PromptSampler(CANVAS, box_probability=share).start(rectangles(4000), seeded())
    assert prompts.from_box.float().mean().item() == pytest.approx(share, abs=0.03)
    boxed = torch.tensor([TOP_LEFT, BOTTOM_RIGHT])
    assert (prompts.labels == torch.where(prompts.from_box[:, None], boxed, torch.tensor([FOREGROUND, PAD]))).all()


def test_box_jitter_goes_outward_only_and_is_bounded() -> None:
    boxes = torch.tensor([[40.0, 60.0, 80.0, 140.0], [20.0, 30.0, 220.0, 240.0]]).repeat(4000, 1)
    prompts = PromptSampler(CANVAS).start_from_boxes(boxes, seeded())
    shift = prompts.points.flatten(1) - boxes
    outward = shift * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert (outward >= 0).all() and outward.max().item() == pytest.approx(5)  # 20 px at 1024
    small = outward[::2]
    assert (small > 0).float().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.03)
    # Width 40: standard deviation 4, half of it kept, cut at 5: mean 4 * (phi(0) - phi(1.25)) + 5 * P(z > 1.25).
    assert small[:, 0].mean().item() == pytest.approx(4 * (0.3989 - 0.1826) + 5 * 0.1056, abs=0.08)
    assert (outward[1::2] == 5).float().mean().item() == pytest.approx(0.4, abs=0.03)  # deviation 20: P(z > 0.25)


def test_box_jitter_is_a_share_of_each_side() -> None:
    sampler = PromptSampler(1024, box_jitter=0.01, box_jitter_max_px=100)
    boxes = torch.tensor([[100.0, 100.0, 200.0, 900.0]]).expand(4000, 4)
    shift = sampler.start_from_boxes(boxes, seeded()).points.flatten(1) - boxes
    assert (shift.square().mean(0) * 2).sqrt().tolist() == pytest.approx([1, 8, 1, 8], rel=0.07)


def test_without_jitter_the_box_is_tight() -> None:
    masks = rectangles(50)
    prompts = PromptSampler(CANVAS, box_probability=1, box_jitter=0).start(masks, seeded())
    assert prompts.from_box.all()
    for mask, box in zip(masks, prompts.points.flatten(1).tolist(), strict=True):
        rows, columns = mask.nonzero().T
        assert box == [4 * columns.min(), 4 * rows.min(), 4 * columns.max() + 4, 4 * rows.max() + 4]


def test_finer_boxes_can_be_given() -> None:
    boxes = torch.tensor([[33.0, 17.5, 50.0, 63.0], [0.0, 0.0, 0.0, 0.0]])
    prompts = PromptSampler(CANVAS, box_probability=1, box_jitter=0).start(rectangles(2), seeded(), boxes)
    assert prompts.points[0].flatten().tolist() == boxes[0].tolist()
    assert prompts.from_box.tolist() == [True, False]
    assert prompts.labels.tolist() == [[TOP_LEFT, BOTTOM_RIGHT], [FOREGROUND, PAD]]


def test_boxes_without_area_leave_pads() -> None:
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], [5.0, 5.0, 6.0, 9.0]])
    prompts = PromptSampler(CANVAS).start_from_boxes(boxes, seeded())
    assert prompts.labels.tolist() == [[PAD, PAD], [TOP_LEFT, BOTTOM_RIGHT]]
    assert prompts.from_box.tolist() == [False, True]
    assert (prompts.points[0] == -0.5).all()


def test_box_probability_zero_starts_from_several_points() -> None:
    masks = rectangles(20)
    sampler = PromptSampler(CANVAS, box_probability=0)
    counts = set()
    for seed in range(80):
        prompts = sampler.start(masks, seeded(seed))
        points, labels = prompts.points[:, :-1], prompts.labels[:, :-1]
        counts.add(points.shape[1])
        assert (labels == FOREGROUND).all() and values_at(masks, points).all()
        assert (prompts.labels[:, -1] == PAD).all() and not prompts.from_box.any()
    assert counts == set(range(2, 10))


# Stage 1


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masks and wrong predictions of them."""
    masks = rectangles(count, seed)
    return masks, masks.roll((2, 3), dims=(1, 2))


def test_interactive_points_lie_in_the_error_and_say_what_is_true() -> None:
    masks, predicted = pairs(300)
    sampler = PromptSampler(CANVAS, interactive_probability=1)
    start = sampler.start(masks, seeded())
    prompts = sampler.correct(start, masks, predicted, seeded(1))
    added, labels = prompts.points[:, 2:], prompts.labels[:, 2:]
    assert torch.equal(prompts.points[:, :2], start.points) and torch.equal(prompts.labels[:, :2], start.labels)
    assert torch.equal(prompts.from_box, start.from_box)
    assert values_at(masks ^ predicted, added).all()
    assert torch.equal(values_at(masks, added), labels == FOREGROUND)
    assert {FOREGROUND, BACKGROUND} == set(labels.flatten().tolist())


@pytest.mark.parametrize("how", ["probability 0", "no error region", "no prediction"])
def test_other_points_lie_on_the_mask(how: str) -> None:
    masks, predicted = pairs(100)
    sampler = PromptSampler(
        CANVAS,
        interactive_probability=0 if how == "probability 0" else 1,
        error_region=how != "no error region",
    )
    start = sampler.start(masks, seeded())
    prompts = sampler.correct(start, masks, None if how == "no prediction" else predicted, seeded(1))
    assert (prompts.labels[:, 2:] == FOREGROUND).all()
    assert values_at(masks, prompts.points[:, 2:]).all()


def test_share_of_interactive_regions() -> None:
    masks = rectangles(4000)
    everything = torch.ones_like(masks)  # the error lies outside of the mask: labels tell the regions apart
    sampler = PromptSampler(CANVAS, interactive_probability=0.3)
    labels = sampler.correct(sampler.start(masks, seeded()), masks, everything, seeded(1)).labels[:, 2:]
    assert (labels == labels[:, :1]).all()
    assert (labels[:, 0] == BACKGROUND).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_number_of_points_is_uniform_and_one_for_the_batch() -> None:
    masks, predicted = (mask[:2, :16, :16] for mask in pairs(2))
    sampler = PromptSampler(CANVAS)
    start, generator = sampler.start(masks, seeded()), seeded(1)
    counts = [sampler.correct(start, masks, predicted, generator).labels.shape[1] - 2 for _ in range(1600)]
    frequencies = np.bincount(counts, minlength=9)[1:]
    assert len(frequencies) == 8 and (abs(frequencies - 200) < 5 * 200**0.5).all()


def test_points_of_a_perfect_prediction_lie_on_the_mask() -> None:
    masks = rectangles(40)
    sampler = PromptSampler(CANVAS, interactive_probability=1)
    prompts = sampler.correct(sampler.start(masks, seeded()), masks, masks.clone(), seeded(1))
    assert (prompts.labels[:, 2:] == FOREGROUND).all() and values_at(masks, prompts.points[:, 2:]).all()


def test_points_of_a_region_are_distinct_where_it_is_large_enough() -> None:
    region = torch.zeros(60, 8, 8, dtype=torch.bool)
    region[:, 1, :5] = True
    indices, found = sample_pixels(region, 5, seeded())
    assert found.all() and indices.sort(1).values.tolist() == [list(range(8, 13))] * 60
    indices, _ = sample_pixels(region, 7, seeded())
    assert region.flatten(1).gather(1, indices).all()
    assert len(indices.unique()) == 5


def test_more_points_than_the_grid_has_cells() -> None:
    indices, found = sample_pixels(torch.ones(2, 1, 2, dtype=torch.bool), 6, seeded())
    assert indices.shape == (2, 6) and set(indices.flatten().tolist()) == {0, 1} and found.all()


# Pads, empty and full masks


def test_rows_have_the_pads_that_the_model_was_made_for() -> None:
    masks, predicted = pairs(100)
    masks[:10] = False  # nothing to see: pads only, of which the model reads one
    predicted[:5] = False
    sampler = PromptSampler(CANVAS, interactive_probability=1)
    start = sampler.start(masks, seeded())
    prompts = sampler.correct(start, masks, predicted, seeded(1))
    for stage in (start, prompts):
        pads = (stage.labels == PAD).sum(1)
        assert (pads[stage.from_box] == 0).all()
        assert (pads[10:][~stage.from_box[10:]] == 1).all()
        read = attended_points(stage.labels) & (stage.labels == PAD)
        assert torch.equal(read.sum(1), (~stage.from_box).long())


def test_empty_masks_keep_pads() -> None:
    masks = torch.zeros(6, SIDE, SIDE, dtype=torch.bool)
    sampler = PromptSampler(CANVAS, box_probability=1, interactive_probability=1)
    start = sampler.start(masks, seeded())
    prompts = sampler.correct(start, masks, masks, seeded(1))
    assert not prompts.from_box.any()
    assert (prompts.labels == PAD).all() and (prompts.points == -0.5).all()


def test_false_alarm_on_an_empty_mask_gets_background_points() -> None:
    masks, predicted = torch.zeros(6, SIDE, SIDE, dtype=torch.bool), rectangles(6)
    sampler = PromptSampler(CANVAS, interactive_probability=1)
    prompts = sampler.correct(sampler.start(masks, seeded()), masks, predicted, seeded(1))
    assert (prompts.labels[:, 2:] == BACKGROUND).all() and values_at(predicted, prompts.points[:, 2:]).all()


def test_full_masks_give_the_whole_canvas() -> None:
    masks = torch.ones(4, SIDE, SIDE, dtype=torch.bool)
    prompts = PromptSampler(CANVAS, box_probability=1, box_jitter=0).start(masks, seeded())
    assert prompts.points.flatten(1).tolist() == [[0, 0, CANVAS, CANVAS]] * 4
    points = PromptSampler(CANVAS, box_probability=1e-9).start(masks, seeded()).points[:, 0]
    assert (points >= 1.5).all() and (points <= CANVAS - 2.5).all()


@pytest.mark.parametrize("box_probability", [0, 0.5])
def test_no_regions(box_probability: float) -> None:
    masks = torch.zeros(0, SIDE, SIDE, dtype=torch.bool)
    sampler = PromptSampler(CANVAS, box_probability)
    prompts = sampler.correct(sampler.start(masks, seeded()), masks, masks, seeded())
    assert prompts.points.shape[0] == 0 and prompts.points.shape[:2] == prompts.labels.shape


def test_same_seed_same_prompts() -> None:
    masks, predicted = pairs(64)
    sampler = PromptSampler(CANVAS)

    def draw(seed: int) -> Prompts:
        generator = seeded(seed)
        return sampler.correct(sampler.start(masks, generator), masks, predicted, generator)

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)  # the global generator plays no part
    second = draw(7)
    assert torch.equal(first.points, second.points) and torch.equal(first.labels, second.labels)
    assert torch.equal(first.from_box, second.from_box)
    other = draw(8)
    assert first.points.shape != other.points.shape or not torch.equal(first.points, other.points)


# Coordinates


def test_cells_lie_on_the_canvas_as_the_model_sees_them() -> None:
    assert to_canvas(torch.tensor([[0, 0], [63, 31]]), (32, 64), 256).tolist() == [[1.5, 3.5], [253.5, 251.5]]


def test_mask_boxes_are_those_of_the_processor() -> None:
    """The box that a user would draw, turned into a row by the package, on a canvas as fine as the mask."""
    masks = torch.cat([rectangles(20), torch.zeros(1, SIDE, SIDE, dtype=torch.bool)])
    boxes = mask_boxes(masks, SIDE)
    rows = prompts_to_rows([parse_region({"mask": mask.numpy()}, SIDE, SIDE) for mask in masks[:-1]])[0]
    assert np.array_equal(boxes[:-1].numpy(), rows[:, :2].reshape(20, 4))
    assert boxes[-1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(mask_boxes(masks, CANVAS), 4 * boxes)


def test_prompts_from_points_and_boxes() -> None:
    points, labels = torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]]), torch.tensor([[FOREGROUND], [PAD]])
    prompts = Prompts.from_points(points, labels)
    assert prompts.labels.tolist() == [[FOREGROUND, PAD], [PAD, PAD]]
    assert prompts.points.tolist() == [[[3, 4], [-0.5, -0.5]], [[-0.5, -0.5]] * 2]
    longer = prompts.append(points + 1, torch.tensor([[BACKGROUND], [PAD]]))
    assert longer.labels.tolist() == [[FOREGROUND, PAD, BACKGROUND], [PAD] * 3]
    assert longer.points[:, 2].tolist() == [[4, 5], [-0.5, -0.5]]


# Clicks of an evaluation


def ring() -> Tensor:
    """A thick square ring: its centre of mass lies in the hole."""
    mask = torch.zeros(21, 21, dtype=torch.bool)
    mask[3:18, 3:18] = True
    mask[8:13, 8:13] = False
    return mask


def test_centre_click_is_deepest_inside() -> None:
    rectangle = torch.zeros(21, 21, dtype=torch.bool)
    rectangle[4:9, 5:16] = True
    corner = torch.zeros(21, 21, dtype=torch.bool)
    corner[:5, :5] = True  # the edge of the grid is a border as well
    empty = torch.zeros(21, 21, dtype=torch.bool)
    pixels, labels = centre_click(torch.stack([rectangle, corner, ring(), empty]))
    assert labels.tolist() == [FOREGROUND] * 3 + [PAD]
    assert pixels[:2].tolist() == [[10, 6], [2, 2]]
    assert ring()[pixels[2, 1], pixels[2, 0]]


def test_error_click_goes_to_the_largest_error() -> None:
    mask = torch.zeros(3, 21, 21, dtype=torch.bool)
    mask[:, 2:9, 2:9] = True
    predicted = mask.clone()
    predicted[0, 2:7, 2:7] = False  # 25 missed pixels against 9 wrong ones
    predicted[0, 15:18, 15:18] = True
    predicted[1, 2:4, 2:4] = False  # 4 missed against 25 wrong ones
    predicted[1, 12:17, 13:18] = True
    pixels, labels = click_error_centre(mask, predicted)
    assert labels.tolist() == [FOREGROUND, BACKGROUND, PAD]
    assert pixels[:2].tolist() == [[4, 4], [15, 14]]


def test_error_click_prefers_what_was_missed_on_a_tie() -> None:
    mask = torch.zeros(1, 21, 21, dtype=torch.bool)
    mask[0, 1:4, 1:4] = True
    pixels, labels = click_error_centre(mask, mask.roll(10, dims=1))
    assert (pixels.tolist(), labels.tolist()) == ([[2, 2]], [FOREGROUND])


def test_error_click_takes_connected_regions() -> None:
    """Two missed parts of 9 pixels do not outweigh one wrong part of 12."""
    mask = torch.zeros(1, 21, 21, dtype=torch.bool)
    mask[0, 1:4, 1:4] = mask[0, 1:4, 10:13] = True
    predicted = torch.zeros_like(mask)
    predicted[0, 10:13, 4:8] = True
    pixels, labels = click_error_centre(mask, predicted)
    assert labels.item() == BACKGROUND and predicted[0, pixels[0, 1], pixels[0, 0]]


def test_clicks_without_regions() -> None:
    nothing = torch.zeros(0, 8, 8, dtype=torch.bool)
    for pixels, labels in (centre_click(nothing), click_error_centre(nothing, nothing)):
        assert pixels.shape == (0, 2) and labels.shape == (0,)
