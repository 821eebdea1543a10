"""What tests of adapters share: make one do something, and see what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def randomise(model: Any, seed: int) -> None:
    """Make an adapter do something, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and (".lora_B." in name or ".projector." in name):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))


@torch.no_grad()
def logits(model: Any, processor: Any, talks: Any) -> Tensor:
    return model(**processor(talks)).logits
