"""Stage 1 of region chat: a projector learns to say TAP's regions in the words of a frozen LLM.

    accelerate launch -m training.align --config configs/region_chat/align.yaml model.llm=LLM [key=value …] [--resume]

Only the projector gets gradients. With `data.tokens` (made by `tap-llm tokenize`) no image encoder is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import set_seed

from tap_llm.region_llm.lora import freeze_for_alignment

from .config import main_of
from .llms import ChatRecipeConfig, build_llm, train_dialogues
from .loop import check


@dataclass
class AlignConfig(ChatRecipeConfig):
    """Configuration of this recipe."""


def main(config: AlignConfig) -> Path:
    """Train; returns the folder of the adapter, which holds the projector alone."""
    check(config.run, config.optimizer)
    config.data.check()
    set_seed(config.run.seed)
    model, processor = build_llm(config.model)
    freeze_for_alignment(model)
    return train_dialogues(config, model, processor)


if __name__ == "__main__":
    main_of(__doc__, AlignConfig, main)
