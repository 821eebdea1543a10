"""Losses of TAP's pre-training (arXiv:2312.09128, section 3): masks, slot routing, concepts, and fair averaging.

Pure functions, computed in float32 whatever comes in. Symbols: N regions, S = 4 slots, (h, w) mask grid, K concepts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tap_llm.errors import InputError

FOCAL_ALPHA = 0.25
IGNORED_NAME = -100
_LOG_OF_ZERO = -1e4  # its exponential is 0, yet 0 times it is 0 and not NaN


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss with alpha 0.25 and gamma 2, mean over the pixels of each mask.

    Args:
        logits: (..., h, w).
        targets: (..., h, w) bool, or 0 and 1; leading dimensions broadcast.

    Returns:
        (...).
    """
    inside = targets.float()
    wrong = logits.float() * (1 - 2 * inside)  # logit of being wrong
    alpha = (1 - FOCAL_ALPHA) - (1 - 2 * FOCAL_ALPHA) * inside  # 0.25 inside, 0.75 outside
    return (wrong.sigmoid().square() * F.softplus(wrong) * alpha).mean(dim=(-2, -1))


def bce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the pixels of each mask.

    Args:
        logits: (..., h, w).
        targets: (..., h, w) bool, or the share of each pixel that is inside; leading dimensions broadcast.

    Returns:
        (...).
    """
    logits = logits.float()
    return (F.softplus(logits) - logits * targets.float()).mean(dim=(-2, -1))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1) / (sum(p + t) + 1) over each mask; arguments as [`bce_loss`]."""
    inside = targets.float()
    probability = logits.float().sigmoid()
    overlap = (probability * inside).sum(dim=(-2, -1))
    total = probability.sum(dim=(-2, -1)) + inside.sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def soft_dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 sum(p t) + 1) / (sum(p^2 + t^2) + 1): lowest at p = t where t is a share, as [`dice_loss`] is not."""
    inside = targets.float()
    probability = logits.float().sigmoid()
    overlap = (probability * inside).sum(dim=(-2, -1))
    total = probability.square().sum(dim=(-2, -1)) + inside.square().sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


# The two parts of a mask loss, and the weight of the first; 20 : 1 is SAM's ratio, which TAP takes over.
MASK_LOSSES = {
    "focal": (focal_loss, dice_loss, 20.0),
    "bce": (bce_loss, dice_loss, 2.0),
    "soft": (bce_loss, soft_dice_loss, 2.0),
}


def mask_loss(logits: Tensor, targets: Tensor, kind: str = "focal", pixel_weight: float | None = None) -> Tensor:
    """Pixel loss plus dice of every slot.

    Args:
        logits: (N, S, h, w).
        targets: (N, h, w) bool; for "soft" the share of each pixel that is inside.
        kind: "focal" as TAP; "bce", with which masks start sooner in a model trained from scratch; or "soft", the
            same against shares, which tell more about edges.
        pixel_weight: weight of the pixel loss; None for 20 (focal) or 2 (bce, soft). Dice has weight 1.

    Returns:
        (N, S).

    Raises:
        InputError: there is no such kind.
    """
    if kind not in MASK_LOSSES:
        raise InputError(f"unknown mask loss {kind!r}; choose one of {', '.join(MASK_LOSSES)}")
    pixel_loss, area_loss, usual_weight = MASK_LOSSES[kind]
    targets = targets[:, None]
    weight = usual_weight if pixel_weight is None else pixel_weight
    return weight * pixel_loss(logits, targets) + area_loss(logits, targets)


@torch.no_grad()
def true_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of every slot's mask, cut at logit 0, with the target; 0 where both are empty.

    Args:
        logits: (N, S, h, w).
        targets: (N, h, w) bool.

    Returns:
        (N, S) float32, without gradient: the target of the IoU head.
    """
    predicted, wanted = (logits > 0).flatten(2), targets[:, None].flatten(2)
    overlap = (predicted & wanted).sum(dim=-1)
    union = predicted.sum(dim=-1) + wanted.sum(dim=-1) - overlap
    return overlap / union.clamp(min=1)


@torch.no_grad()
def training_slots(losses: Tensor, from_box: Tensor) -> Tensor:
    """Slot that learns from each region: 0 if its prompt started from a box, else the best of the others.

    Args:
        losses: (N, S) mask loss of every slot.
        from_box: (N,) bool, how the prompt started (kept when points are added).

    Returns:
        (N,) int64.
    """
    return torch.where(from_box, 0, 1 + losses[:, 1:].argmin(dim=1))


def concept_kl(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL divergence of the student's concept distribution from the teacher's, KL(p_t || p_s).

    Args:
        student_logits: (..., K), as of [`ConceptSpace.logits`].
        teacher_log_probs: (..., K); -inf stands for probability 0.

    Returns:
        (...).
    """
    teacher = teacher_log_probs.float().clamp(min=_LOG_OF_ZERO)
    student = student_logits.float().log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def name_targets(indices: Tensor, num_concepts: int, smoothing: float = 0.0) -> Tensor:
    """Log probabilities of a teacher that only knows names: the name's concept, smoothed over all.

    Args:
        indices: (...) int64, concept of each region.
        num_concepts: K.
        smoothing: share of the probability that is spread evenly over all concepts.

    Returns:
        (..., K); -inf for probability 0.
    """
    one_hot = F.one_hot(indices, num_concepts).float()
    return ((1 - smoothing) * one_hot + smoothing / num_concepts).log()


def name_kl(student_logits: Tensor, indices: Tensor, smoothing: float = 0.0) -> Tensor:
    """[`concept_kl`] against [`name_targets`], without building the targets.

    Args:
        student_logits: (..., K).
        indices: (...) int64; -100 for a region without a name, whose loss is 0.
        smoothing: as in [`name_targets`].

    Returns:
        (...).
    """
    concepts = student_logits.shape[-1]
    cross_entropy = F.cross_entropy(
        student_logits.float().reshape(-1, concepts),
        indices.reshape(-1),
        reduction="none",
        label_smoothing=smoothing,
        ignore_index=IGNORED_NAME,
    )
    divergence = cross_entropy.view(indices.shape) - _smoothed_entropy(concepts, smoothing)
    return divergence.masked_fill(indices == IGNORED_NAME, 0.0)


def _smoothed_entropy(num_concepts: int, smoothing: float) -> float:
    """Entropy of a smoothed one-hot distribution, in nats."""
    low = smoothing / num_concepts
    high = 1 - smoothing + low
    return -high * math.log(high) - (num_concepts - 1) * low * math.log(low) if low else 0.0


def global_mean(values: Tensor, count: Tensor | float, num_processes: int = 1, accumulation_steps: int = 1) -> Tensor:
    """Mean over all that one optimiser step sees, whichever process and batch it lies in.

    Gradients are averaged over processes and accumulated batches; multiplying by their number undoes that, so that
    every region weighs the same however unevenly regions are spread.

    Args:
        values: (n,) losses of this process and batch; may be empty.
        count: number of values in all processes and all batches of the accumulation window.
        num_processes: processes whose gradients are averaged.
        accumulation_steps: batches whose gradients are averaged.

    Returns:
        scalar to call `backward` on.
    """
    total = torch.as_tensor(count, dtype=torch.float32, device=values.device).clamp(min=1)
    return values.float().sum() * (num_processes * accumulation_steps) / total
