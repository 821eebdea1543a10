"""Stage 2 of region chat: LoRA on the LLM's linear layers, and the projector, learn to talk about regions.

    accelerate launch -m training.chat --config configs/region_chat/chat.yaml model.start=runs/align/final [key=value …]

TAP stays frozen. `model.four_bit=true` keeps the LLM in 4 bits (QLoRA). With `data.tokens` no image encoder is in
memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed

from tap_llm.region_llm.lora import DEFAULT, attach_lora, lora_config, lora_names, use_adapter

from .config import main_of
from .llms import ChatRecipeConfig, build_llm, train_dialogues
from .loop import check


@dataclass
class LoraSettings:
    """Size of the LoRA adapters."""

    r: int = 64
    alpha: int = 128
    dropout: float = 0.05


@dataclass
class ChatConfig(ChatRecipeConfig):
    """Configuration of this recipe."""

    lora: LoraSettings = field(default_factory=LoraSettings)


def main(config: ChatConfig) -> Path:
    """Train; returns the folder of the adapter, which holds LoRA and the projector."""
    check(config.run, config.optimizer)
    config.data.check()
    set_seed(config.run.seed)
    model, processor = build_llm(config.model)
    lora = config.lora
    if DEFAULT in lora_names(model):  # go on with the LoRA of an earlier run
        use_adapter(model, DEFAULT, trainable=True)
    else:
        attach_lora(model, lora_config(model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout))
    return train_dialogues(config, model, processor)


if __name__ == "__main__":
    main_of(__doc__, ChatConfig, main)
