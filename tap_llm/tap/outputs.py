"""What TAP returns, and how a prompt is routed to one of the four slots."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..regions import TOP_LEFT


@dataclass
class TapOutput(ModelOutput):
    """Output of [`TapModel`] and [`TapForConditionalGeneration`].

    Args:
        loss: caption loss, with `labels`.
        logits: (N, L, V) caption logits on the text positions, with `labels`.
        pred_masks: (N, 4, 4G, 4G) low-resolution mask logits; slot 0 answers boxes, slots 1 to 3 points.
        iou_scores: (N, 4) float32 predicted IoU; linear, so it can leave [0, 1].
        semantic_tokens: (N, 4, D), prefix of the caption decoder.
        semantic_embeds: (N, 4, E), to compare with concepts.
        slots: (N,) int64, the routed slot of each region.
        image_embeddings: (B, D, G, G), to be given again for further prompts.
        vision_hidden_states: hidden states of the image encoder, on request.
        vision_attentions: attention weights of the image encoder, on request.
        mask_decoder_attentions: attention weights of the region decoder, on request.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    semantic_tokens: Tensor | None = None
    semantic_embeds: Tensor | None = None
    slots: Tensor | None = None
    image_embeddings: Tensor | None = None
    vision_hidden_states: tuple[Tensor, ...] | None = None
    vision_attentions: tuple[Tensor, ...] | None = None
    mask_decoder_attentions: tuple[Tensor, ...] | None = None


def route_slots(iou_scores: Tensor, input_labels: Tensor) -> Tensor:
    """Slot that answers each prompt: 0 for a box, the best of the others for points (TAP, section 3).

    Args:
        iou_scores: (N, 4) predicted IoU.
        input_labels: (N, n); a box prompt starts with its top-left corner.

    Returns:
        (N,) int64.
    """
    is_box = (input_labels[:, 0] == TOP_LEFT).to(iou_scores.device)
    return torch.where(is_box, 0, 1 + iou_scores[:, 1:].argmax(dim=-1))


def take_slots(per_slot: Tensor, slots: Tensor) -> Tensor:
    """(N, 4, ...) and (N,) -> (N, ...)."""
    return per_slot[torch.arange(len(slots), device=per_slot.device), slots.to(per_slot.device)]


__all__ = ["TapOutput", "route_slots", "take_slots"]
