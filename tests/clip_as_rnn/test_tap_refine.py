"""Refinement by TAP: the rules on a model whose answers are given, and the bundled model on scenes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tap_llm import InputError, RegionPipeline
from tap_llm.clip_as_rnn.tap_refine import refine_masks, share_out
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.encoded import encode_image
from tap_llm.masks import BoolArray
from tap_llm.regions import read_mask
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.processing_tap import TapProcessor

SIDE, CELLS = 128, 32  # of the picture and of TAP's low-resolution masks
ONES = np.ones((1, SIDE, SIDE), np.float32)


class GivenTap:
    """Stands in for the pipeline: row i answers with given boxes, one per slot; None is an empty mask."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, *answers: list[tuple[int, int, int, int] | None], expected: float = 0.9) -> None:
        self.answers, self.calls = answers, []
        self.expected = expected  # IoU of slot 0; of the others 0.5
        self.processor = TapProcessor(TapImageProcessor(size={"longest_edge": SIDE}))
        self.model = self

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.calls.append("encode")
        return pixel_values

    def encode(self, image: Any) -> Any:
        return encode_image(self, self.processor, image)

    def __call__(self, input_points: Any, input_labels: Any, image_embeddings: Any) -> Any:
        first = sum(call for call in self.calls if isinstance(call, int))
        self.calls.append(len(input_points))
        logits = torch.full((len(input_points), 4, CELLS, CELLS), -10.0)
        for row in range(len(input_points)):
            for slot, box in enumerate(self.answers[first + row]):
                if box is not None:
                    x0, y0, x1, y1 = (edge * CELLS // SIDE for edge in box)
                    logits[row, slot, y0:y1, x0:x1] = 10
        scores = torch.tensor([self.expected, 0.5, 0.5, 0.5]).repeat(len(logits), 1)
        return SimpleNamespace(pred_masks=logits, iou_scores=scores)


def boxes(*corners: tuple[int, int, int, int]) -> BoolArray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    for x0, y0, x1, y1 in corners:
        mask[y0:y1, x0:x1] = True
    return mask


def alike(mask: BoolArray, other: BoolArray) -> bool:
    """Equal but for the corners, which resizing rounds."""
    return int((mask ^ other).sum()) <= 24 and bool(other.any())


def refine(tap: GivenTap, *masks: BoolArray, **options: Any) -> BoolArray:
    stack = np.stack(masks)
    options = {"scores": np.ones(len(masks)), **options}
    return refine_masks(tap, Image.new("RGB", (SIDE, SIDE)), stack, stack.astype(np.float32), **options)


A, NEAR_A, FAR = (16, 16, 64, 64), (16, 16, 60, 64), (80, 80, 120, 120)
WHOLE = (0, 0, 128, 128)


def test_the_candidate_that_fits_best_replaces_the_mask() -> None:
    tap = GivenTap([FAR, A, A, A], [A, WHOLE, NEAR_A, FAR])
    (refined,) = refine(tap, boxes(A))
    assert tap.calls == ["encode", 2]
    assert alike(refined, boxes(NEAR_A))  # a box is answered in slot 0, points in slots 1 to 3


def test_an_answer_that_is_too_different_is_not_taken() -> None:
    half = (16, 16, 48, 64)  # IoU 2 / 3 with A
    tap = GivenTap([half, None, None, None], [None] * 4)
    assert np.array_equal(refine(tap, boxes(A))[0], boxes(A))
    tap = GivenTap([half, None, None, None], [None] * 4)
    assert alike(refine(tap, boxes(A), min_iou=0.6)[0], boxes(half))


def test_parts_are_refined_one_by_one_and_united() -> None:
    near_far = (80, 80, 120, 116)
    tap = GivenTap([NEAR_A, *[None] * 3], [None] * 4, [WHOLE, *[None] * 3], [None, FAR, near_far, None])
    (refined,) = refine(tap, boxes(A, (80, 80, 120, 117)))
    assert alike(refined, boxes(NEAR_A, near_far))


def test_all_parts_of_all_masks_go_in_one_batch() -> None:
    tap = GivenTap(*[[A] * 4, [A] * 4, [FAR] * 4, [FAR] * 4, [A] * 4, [A] * 4])
    refine(tap, boxes(A, FAR), boxes(A), np.zeros((SIDE, SIDE), dtype=bool))
    assert tap.calls == ["encode", 6]
    tap.calls.clear()
    refine(tap, boxes(A, FAR), boxes(A), batch_size=2)
    assert tap.calls == ["encode", 4, 2]


def test_the_best_mask_gets_what_several_claim() -> None:
    wide = (16, 16, 72, 64)
    answers = [[A] * 4, [A] * 4, [wide] * 4, [wide] * 4]
    refined = refine(GivenTap(*answers), boxes(A), boxes(wide), scores=[0.5, 0.9])
    assert refined[0].sum() < 24 and alike(refined[1], boxes(wide))
    refined = refine(GivenTap(*answers), boxes(A), boxes(wide), scores=[0.9, 0.5])
    assert alike(refined[0], boxes(A)) and alike(refined[1], boxes((64, 16, 72, 64)))
    refined = refine(GivenTap(*answers), boxes(A), boxes(wide), exclusive=False)
    assert alike(refined[0], boxes(A)) and alike(refined[1], boxes(wide))


def test_sharing_out_keeps_the_union() -> None:
    masks = np.random.default_rng(0).random((4, 9, 9)) < 0.4
    shared = share_out(masks.copy(), [0.1, 0.9, 0.9, 0.5])
    assert np.array_equal(shared.any(axis=0), masks.any(axis=0)) and shared.sum(axis=0).max() == 1
    assert np.array_equal(shared[1], masks[1])  # of equal scores the first wins


def soft_refine(tap: GivenTap, image: Any, mask: BoolArray, soft: np.ndarray, **options: Any) -> BoolArray:
    return refine_masks(tap, image, mask[None], soft[None].astype(np.float32), [1], min_iou=0.3, **options)[0]


@pytest.mark.parametrize(("weight", "stays"), [(0.1, False), (0.9, True)])
def test_parts_that_do_not_agree_with_the_soft_mask_are_dropped(weight: float, stays: bool) -> None:
    empty = [None] * 4
    soft = np.where(boxes(A), 0.9, 0) + np.where(boxes(FAR), weight, 0)
    tap = GivenTap([A, *[None] * 3], empty, [FAR, *[None] * 3], empty)
    refined = soft_refine(tap, Image.new("RGB", (SIDE, SIDE)), boxes(A, FAR), soft, choice="agreeing")
    assert alike(refined, boxes(A, FAR) if stays else boxes(A))


@pytest.mark.parametrize(("expected", "taken"), [(0.9, NEAR_A), (0.1, (20, 16, 64, 64))])
def test_of_answers_that_agree_alike_the_one_that_tap_expects_more_of_is_taken(expected: float, taken: Any) -> None:
    tap = GivenTap([NEAR_A, *[None] * 3], [None, (20, 16, 64, 64), None, None], expected=expected)
    soft = boxes(A) * 0.9
    refined = soft_refine(tap, Image.new("RGB", (SIDE, SIDE)), boxes(A), soft, choice="agreeing")
    assert alike(refined, boxes(taken))


def test_a_soft_mask_of_zeros_agrees_with_nothing() -> None:
    """Not even with answers that are empty, which would be an agreement of 0 / 0."""
    stack = boxes(A)[None]
    tap = GivenTap([None] * 4, [A] * 4)
    refined = refine_masks(tap, Image.new("RGB", (SIDE, SIDE)), stack, 0 * ONES, [1.0], choice="agreeing")
    assert np.array_equal(refined, stack)


def test_sharpening_moves_edges_to_those_of_the_picture() -> None:
    true = (18, 18, 66, 64)
    colours = np.where(boxes(true)[..., None], [30, 60, 200], [230, 160, 40]).astype(np.uint8)
    tap = [[A, *[None] * 3], [None] * 4]
    for exclusive in (True, False):
        sharp = soft_refine(
            GivenTap(*tap), Image.fromarray(colours), boxes(A), ONES[0], sharpen=True, exclusive=exclusive
        )
        assert np.array_equal(sharp, boxes(true))
    with pytest.raises(InputError, match="choice must be one of each, agreeing, got 'best'"):
        soft_refine(GivenTap(), Image.fromarray(colours), boxes(A), ONES[0], choice="best")


def test_empty_masks_ask_nothing() -> None:
    tap = GivenTap()
    masks = np.zeros((2, SIDE, SIDE), dtype=bool)
    refined = refine(tap, *masks)
    assert refined.shape == masks.shape and not refined.any() and tap.calls == []
    assert refine_masks(tap, None, masks[:0], masks[:0], []).shape == (0, SIDE, SIDE)


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"masks are of size \(128, 128\).* the picture of \(9, 7\)"):
        refine_masks(GivenTap(), Image.new("RGB", (7, 9)), boxes(A)[None], ONES, [1])


def scene_masks(seed: int, size: tuple[int, int] = (256, 192)) -> tuple[Image.Image, BoolArray]:
    sample = SceneComposer(SpriteLibrary.bundled()).scene(seed, size).to_sample()
    masks = [read_mask(region["mask"], size[1], size[0]) for region in sample.regions]
    return sample.load_image(), np.stack([mask for mask in masks if mask.mean() > 0.01])


def blocky(masks: BoolArray, cell: int) -> np.ndarray:
    """Soft masks on a grid of cells, as those of a patch-based model."""
    size = masks.shape[2] // cell, masks.shape[1] // cell
    coarse = [Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX) for mask in masks]
    return np.stack([np.asarray(plane.resize(masks.shape[:0:-1], Image.Resampling.BILINEAR)) for plane in coarse])


def mean_iou(masks: BoolArray, truth: BoolArray) -> float:
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(masks, truth, strict=True)]))


def test_the_bundled_model_sharpens_blocky_masks_and_runs_once() -> None:
    pipe = RegionPipeline.from_pretrained("tap-tiny", device="cpu")
    calls: list[str] = []
    model: Any = pipe.model.model
    for name in ("vision_encoder", "mask_decoder"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    before, after = [], []
    for seed in range(4):
        picture, truth = scene_masks(seed)
        soft = blocky(truth, 32)
        coarse = soft > 0.4
        refined = refine_masks(pipe, picture, coarse, soft, np.ones(len(truth)), min_iou=0.5)
        assert calls == ["vision_encoder", "mask_decoder"]
        calls.clear()
        before.append(mean_iou(coarse, truth))
        after.append(mean_iou(refined, truth))
    assert np.mean(after) > np.mean(before) + 0.03
