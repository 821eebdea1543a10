"""A region language model with its loss: the next word of the assistant's turns.

Symbols: B conversations, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tap_llm.region_llm.encoding import IGNORED
from tap_llm.region_llm.modeling_tap_llm import TapLlmForConditionalGeneration

from .recipe import Metrics, Sums


class ChatObjective(nn.Module):
    """The loss as a sum over the tokens of assistant turns.

    Args:
        model: with all frozen that is not trained.
    """

    weights = {"text": 1.0}

    def __init__(self, model: TapLlmForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def counts(self, batch: dict[str, Any]) -> dict[str, float]:
        """Tokens that are predicted."""
        return {"text": float((batch["labels"][:, 1:] != IGNORED).sum())}

    def forward(self, labels: Tensor, **inputs: Any) -> tuple[Sums, Metrics]:
        """Loss and accuracy of a batch of [`DialogueBatches`]; labels (B, L).

        Logits are made only where some conversation has a word to learn: with a large V they are the largest tensor.
        """
        wanted = labels[:, 1:]
        places = (wanted != IGNORED).any(0).nonzero()[:, 0]  # positions that predict the next token
        output = self.model(**inputs, logits_to_keep=places, use_cache=False)
        logits, wanted = output.logits.float(), wanted[:, places]  # (B, P, V), (B, P)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=IGNORED)
        loss = loss + self._nothing()
        known = wanted != IGNORED
        right = (logits.argmax(-1) == wanted) & known
        return {"text": loss}, {"accuracy": (right.sum(), known.sum())}

    def _nothing(self) -> Tensor:
        """0, with gradients of 0 for the projector: several processes wait for them, also where no region is named."""
        projector = self.model.model.projector
        return torch.stack([0.0 * value.flatten()[0] for value in projector.parameters()]).sum()


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that get gradients."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


__all__ = ["ChatObjective", "trained_names"]
