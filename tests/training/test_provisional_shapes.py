"""Drawn scenes: determinism, exact visible masks, and captions that say colour and name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from training.provisional_shapes import (
    COLOURS,
    MIN_VISIBLE,
    SHAPE_NAMES,
    box_region,
    draw_scene,
    example_scene,
    random_size,
    sample_region,
)

SEEDS = range(24)


def test_same_seed_draws_the_same_scene() -> None:
    first, second = draw_scene(11), draw_scene(11)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.masks, second.masks)
    assert first.captions == second.captions


def test_other_seed_draws_another_scene() -> None:
    assert not np.array_equal(draw_scene(11).image, draw_scene(12).image)


@pytest.mark.parametrize(("size", "shape"), [(64, (64, 64)), ((200, 120), (120, 200))])
def test_size_is_side_or_width_and_height(size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    scene = draw_scene(3, size)
    assert scene.image.shape == (*shape, 3) and scene.image.dtype == np.uint8
    assert scene.masks.shape[1:] == shape and scene.masks.dtype == bool


def test_example_is_larger_and_not_square() -> None:
    assert example_scene().image.shape == (480, 640, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_visible_and_disjoint(seed: int) -> None:
    masks = draw_scene(seed).masks
    assert masks.any(axis=(1, 2)).all()
    assert masks.sum(axis=0).max() == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_every_shape_has_a_name_a_colour_and_a_caption(seed: int) -> None:
    scene = draw_scene(seed)
    assert len(scene.names) == len(scene.captions) == len(scene.colours) == len(scene.masks) >= 1
    for name, colour, caption in zip(scene.names, scene.colours, scene.captions, strict=True):
        assert name in SHAPE_NAMES and colour in COLOURS
        assert f"{colour} {name}" in caption
        assert caption.startswith("an " if caption.split()[1][0] in "aeiou" else "a ")


def test_captions_vary() -> None:
    text = " ".join(caption for seed in range(60) for caption in draw_scene(seed, 64).captions)
    for word in ("small", "large", "striped", "dotted", "with stripes", "with dots"):
        assert word in text


def test_all_names_and_colours_occur() -> None:
    scenes = [draw_scene(seed, 64) for seed in range(120)]
    assert {name for scene in scenes for name in scene.names} == set(SHAPE_NAMES)
    assert {colour for scene in scenes for colour in scene.colours} == set(COLOURS)


def test_mask_pixels_carry_the_named_colour() -> None:
    """Inside a solid shape the mean colour is near the named one; a mask on the background would not be."""
    scenes = [draw_scene(seed) for seed in range(40)]
    solid = [
        np.abs(scene.image[mask].mean(axis=0) - COLOURS[colour]).mean()
        for scene in scenes
        for mask, colour, caption in zip(scene.masks, scene.colours, scene.captions, strict=True)
        if colour == "red" and "striped" not in caption and "dotted" not in caption and "with" not in caption
    ]
    assert np.median(solid) < 20


def test_later_shapes_cover_earlier_ones_in_part() -> None:
    """A whole circle fills pi / 4 of its box; some circles fill less, none is nearly gone."""
    fills = []
    for seed in range(80):
        scene = draw_scene(seed, 128)
        for name, mask in zip(scene.names, scene.masks, strict=True):
            if name == "circle":
                height, width = np.ptp(np.flatnonzero(mask.any(1))), np.ptp(np.flatnonzero(mask.any(0)))
                fills.append(mask.sum() / ((height + 1) * (width + 1)))
    assert min(fills) < 0.7
    assert min(fills) > MIN_VISIBLE / 2


def _prompts(count: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Masks with a sampled prompt each."""
    rng = np.random.default_rng(0)
    masks = [mask for seed in range(count) for mask in draw_scene(seed, (128, 96)).masks]
    return [(mask, sample_region(rng, mask)) for mask in masks]


def test_sampled_points_lie_on_their_side_of_the_mask() -> None:
    for mask, region in _prompts(30):
        for (x, y), label in zip(region.get("points", []), region.get("labels", []), strict=True):
            assert mask[int(y), int(x)] == bool(label)


def test_sampled_boxes_hold_the_tight_box() -> None:
    boxes = [(box_region(mask)["box"], region["box"]) for mask, region in _prompts(30) if "box" in region]
    tight, drawn = (np.array(side) for side in zip(*boxes, strict=True))
    assert (drawn[:, :2] <= tight[:, :2]).all() and (drawn[:, 2:] >= tight[:, 2:]).all()
    assert (drawn != tight).any()


def test_about_half_of_the_prompts_start_from_a_box() -> None:
    prompts = _prompts(60)
    assert 0.4 < np.mean(["box" in region for _, region in prompts]) < 0.7
    assert any(0 in region.get("labels", []) for _, region in prompts)


def test_box_edges_are_exclusive() -> None:
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:5, 3:8] = True
    assert box_region(mask) == {"box": [3.0, 2.0, 8.0, 5.0]}


def test_random_sizes_keep_the_longer_side() -> None:
    rng = np.random.default_rng(0)
    sizes = {random_size(rng, 64) for _ in range(200)}
    assert {max(size) for size in sizes} == {64}
    assert min(min(size) for size in sizes) >= 32
    assert (64, 64) in sizes and len(sizes) > 20
