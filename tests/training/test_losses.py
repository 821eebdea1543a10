"""Losses against numbers worked out by hand and against the formulas written out directly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tap_llm.errors import InputError
from training.losses import (
    bce_loss,
    concept_kl,
    dice_loss,
    focal_loss,
    global_mean,
    mask_loss,
    name_kl,
    name_targets,
    soft_dice_loss,
    training_slots,
    true_iou,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def random_masks(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and bool targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.rand(shape, generator=generator) > 0.6


def plain_focal(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.sigmoid()
    inside = -0.25 * (1 - p) ** 2 * p.log()
    outside = -0.75 * p**2 * (1 - p).log()
    return torch.where(targets, inside, outside).mean((-2, -1))


def plain_bce(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.sigmoid()
    return torch.where(targets, -p.log(), -(1 - p).log()).mean((-2, -1))


def plain_dice(logits: Tensor, targets: Tensor) -> Tensor:
    p, t = logits.sigmoid().flatten(-2), targets.double().flatten(-2)
    return 1 - (2 * (p * t).sum(-1) + 1) / ((p + t).sum(-1) + 1)


FORMULAS = [(focal_loss, plain_focal), (bce_loss, plain_bce), (dice_loss, plain_dice)]


def test_numbers_by_hand() -> None:
    """Two pixels at probability 0.75 and 0.25; the first is inside, then the second."""
    logits = torch.tensor([[math.log(3), -math.log(3)]])
    right, wrong = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    assert focal_loss(logits, right).item() == pytest.approx((0.25 + 0.75) / 2 * 0.25**2 * math.log(4 / 3))
    assert focal_loss(logits, wrong).item() == pytest.approx((0.25 + 0.75) / 2 * 0.75**2 * math.log(4))
    assert bce_loss(logits, right).item() == pytest.approx(math.log(4 / 3))
    assert dice_loss(logits, right).item() == pytest.approx(1 - (2 * 0.75 + 1) / (1 + 1 + 1))
    assert dice_loss(logits, wrong).item() == pytest.approx(1 - (2 * 0.25 + 1) / (1 + 1 + 1))


@pytest.mark.parametrize(("loss", "formula"), FORMULAS)
def test_values_and_gradients_match_the_formula(loss: Loss, formula: Loss) -> None:
    logits, targets = random_masks(2, 3, 5, 7)
    ours, theirs = logits.float().requires_grad_(), logits.clone().requires_grad_()
    got, expected = loss(ours, targets), formula(theirs, targets)
    assert got.shape == (2, 3) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.arange(1.0, 7.0).view(2, 3)
    got_gradient = torch.autograd.grad((got * weights).sum(), ours)[0]
    expected_gradient = torch.autograd.grad((expected * weights).sum(), theirs)[0]
    torch.testing.assert_close(got_gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("loss", "formula"), FORMULAS)
def test_leading_dimensions_broadcast(loss: Loss, formula: Loss) -> None:
    logits, targets = random_masks(2, 4, 6, 6)
    got = loss(logits, targets[:, :1])
    torch.testing.assert_close(got.double(), formula(logits, targets[:, :1].expand_as(logits)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [focal_loss, bce_loss, dice_loss])
@pytest.mark.parametrize("confident", [60.0, 1e4])
def test_extreme_logits_stay_finite(loss: Loss, confident: float) -> None:
    targets = torch.tensor([[True, False], [False, True]])
    right = torch.where(targets, confident, -confident).requires_grad_()
    wrong = (-right.detach()).requires_grad_()
    for logits in (right, wrong):
        value = loss(logits, targets)
        value.backward()
        assert value.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
    assert loss(right, targets).item() == pytest.approx(0, abs=1e-6)
    assert loss(wrong, targets).item() > 0.7


@pytest.mark.parametrize("loss", [focal_loss, bce_loss, dice_loss])
def test_half_precision_and_autocast_are_computed_in_float32(loss: Loss) -> None:
    logits, targets = random_masks(1, 16, 16)
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(half, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(half.float(), targets), rtol=0, atol=0)


def test_dice_of_empty_and_full_masks() -> None:
    nothing, everything = torch.zeros(8, 8, dtype=torch.bool), torch.ones(8, 8, dtype=torch.bool)
    assert dice_loss(torch.full((8, 8), -50.0), nothing).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(torch.full((8, 8), 50.0), everything).item() == pytest.approx(1 - 129 / 129, abs=1e-6)
    assert dice_loss(torch.full((8, 8), 50.0), nothing).item() == pytest.approx(1 - 1 / 65)


def test_bce_against_shares() -> None:
    logits = random_masks(3, 4, 4)[0].float()
    shares = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = F.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean((-2, -1))
    torch.testing.assert_close(bce_loss(logits, shares), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "pixel_loss", "weight"), [("focal", plain_focal, 20), ("bce", plain_bce, 2)])
def test_mask_loss_weighs_pixels_against_dice(kind: str, pixel_loss: Loss, weight: float) -> None:
    logits, targets = random_masks(3, 4, 8, 8)
    target = targets[:, 0]
    every_slot = target[:, None].expand_as(logits)
    dice = plain_dice(logits, every_slot)
    got = mask_loss(logits, target, kind)
    assert got.shape == (3, 4)
    torch.testing.assert_close(got.double(), weight * pixel_loss(logits, every_slot) + dice, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mask_loss(logits, target, kind, 0.0).double(), dice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pixel_weight", [None, 0.0])
def test_soft_mask_loss_is_lowest_at_the_shares(pixel_weight: float | None) -> None:
    """The gradient vanishes where the probabilities are the shares; that of the usual dice does not."""
    shares = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(4)) * 0.8 + 0.1
    logits = shares.logit()[:, None].requires_grad_()
    soft, usual = (
        torch.autograd.grad(mask_loss(logits, shares, kind, pixel_weight).sum(), logits)[0].abs().max()
        for kind in ("soft", "bce")
    )
    assert soft < 1e-6 < 1e-4 < usual


def test_soft_dice_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25]]).logit()
    assert soft_dice_loss(logits, torch.tensor([[1.0, 0.5]])).item() == pytest.approx(
        1 - (2 * (0.5 + 0.125) + 1) / (0.25 + 0.0625 + 1 + 0.25 + 1)
    )


def test_unknown_mask_loss_is_named() -> None:
    with pytest.raises(InputError, match="unknown mask loss 'l2'; choose one of focal, bce"):
        mask_loss(*random_masks(1, 1, 2, 2), "l2")


def test_mask_loss_without_regions() -> None:
    assert mask_loss(torch.zeros(0, 4, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool)).shape == (0, 4)


def test_true_iou_by_hand() -> None:
    """Target: left half of 4 x 4. Predicted: the same, the top half, nothing, all."""
    target = torch.zeros(1, 4, 4, dtype=torch.bool)
    target[..., :2] = True
    top = torch.zeros(4, 4, dtype=torch.bool)
    top[:2] = True
    predicted = torch.stack([target[0], top, torch.zeros_like(top), torch.ones_like(top)])[None]
    logits = torch.where(predicted, 0.5, -0.5).requires_grad_()
    iou = true_iou(logits, target)
    torch.testing.assert_close(iou, torch.tensor([[1.0, 4 / 12, 0.0, 0.5]]))
    assert not iou.requires_grad


def test_true_iou_of_two_empty_masks_is_zero() -> None:
    assert true_iou(torch.full((1, 1, 3, 3), -1.0), torch.zeros(1, 3, 3, dtype=torch.bool)).item() == 0


def test_boxes_train_slot_zero_and_points_the_best_other() -> None:
    losses = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.0, 0.5, 0.2, 0.3], [0.0, 0.5, 0.4, 0.3], [0.0, 0.1, 0.4, 0.3]])
    slots = training_slots(losses.requires_grad_(), torch.tensor([True, False, False, False]))
    assert slots.tolist() == [0, 2, 3, 1] and slots.dtype == torch.int64


def test_concept_kl_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    student = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log() + 7  # logits: a constant changes nothing
    expected = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), math.log(1 / 0.75)]
    assert concept_kl(student, teacher).tolist() == pytest.approx(expected, rel=1e-5)


def test_concept_kl_is_zero_for_equals_and_its_gradient_is_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    student = (10 * torch.randn(3, 20, generator=generator)).requires_grad_()
    teacher = (10 * torch.randn(3, 20, generator=generator)).log_softmax(-1)
    gradient = torch.autograd.grad(concept_kl(student, teacher).sum(), student)[0]
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(concept_kl(student, student.log_softmax(-1)), torch.zeros(3))
    assert (concept_kl(student, teacher) > 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_name_kl_equals_the_kl_from_smoothed_names(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student = (5 * torch.randn(2, 3, 11, generator=generator)).requires_grad_()
    names = torch.randint(11, (2, 3), generator=generator)
    targets = name_targets(names, 11, smoothing)
    torch.testing.assert_close(targets.exp().sum(-1), torch.ones(2, 3))
    long, short = concept_kl(student, targets), name_kl(student, names, smoothing)
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (long, short)]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_name_targets_by_hand() -> None:
    targets = name_targets(torch.tensor([2]), 4, 0.2)
    assert targets.exp().flatten().tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])
    assert name_targets(torch.tensor([0]), 2).tolist() == [[0.0, -math.inf]]


def test_regions_without_a_name_cost_nothing() -> None:
    student = torch.randn(2, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = name_kl(student, torch.tensor([-100, 3]), 0.1)
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0
    assert student.grad is not None and not student.grad[0].any() and student.grad[1].any()


def test_global_mean_weighs_every_region_the_same() -> None:
    """Averaging the gradients of uneven shares, 2 processes x 2 batches, gives the gradient of the mean."""
    weight = torch.tensor(0.5, requires_grad=True)
    data = torch.arange(1.0, 11.0)
    expected = torch.autograd.grad((weight * data).square().mean(), weight)[0]
    shares = data.split([1, 4, 0, 5])
    gradients = [
        torch.autograd.grad(global_mean((weight * share).square(), torch.tensor(10), 2, 2), weight)[0]
        for share in shares
    ]
    torch.testing.assert_close(torch.stack(gradients).mean(), expected)


def test_global_mean_of_nothing_is_zero() -> None:
    assert global_mean(torch.zeros(0), 0).item() == 0
