"""Pre-train TAP: masks, scores and concepts from prompts (arXiv:2312.09128, section 3).

    accelerate launch -m training.pretrain --config configs/tap_tiny/3_masks.yaml [key=value …] [--resume]

Each step prompts every region twice: with its box or a point, then with points where the first mask was wrong. Both
answers are judged by mask, score and concept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor

from tap_llm.concepts import ConceptSpace

from .config import main_of, to_dict
from .examples import RegionBatches
from .loop import check, fit
from .models import build_tap, save_tap
from .objective import HEADS_FILE, LossConfig, PromptConfig, RegionObjective, scaled_concepts
from .pictures import draw_masks
from .recipe import VALIDATION_BATCHES, Recipe, RecipeConfig
from .sources import Pictures


@dataclass
class PretrainConfig(RecipeConfig):
    """Configuration of this recipe."""

    prompts: PromptConfig = field(default_factory=PromptConfig)
    loss: LossConfig = field(default_factory=LossConfig)


def main(config: PretrainConfig) -> Path:
    """Train; returns the folder of the finished model."""
    run = config.run
    check(run, config.optimizer)
    set_seed(run.seed)
    pictures = Pictures(config.data, run.seed)
    tap, processor, concepts = build_tap(config.model, pictures.names())
    objective = RegionObjective(
        tap.model, concepts, config.model.learn_concepts, config.prompts, config.loss, config.model.freeze_encoder
    )
    objective.load_heads(config.model.start)
    if run.gradient_checkpointing:
        tap.activation_checkpointing_enable()
    if run.compile:
        tap.model.vision_encoder.compile()
        tap.model.mask_decoder.compile()

    def batches(source: Pictures, length: int | None = None) -> RegionBatches:
        return RegionBatches(
            source, concepts, processor.image_processor, objective.sampler, run.batch_size, config.data.regions,
            length, source.seed,
        )  # fmt: skip

    validation = batches(pictures.for_validation(), VALIDATION_BATCHES)

    def save(state: dict[str, Tensor], folder: Path) -> None:
        ours = {key: value for key, value in state.items() if key.startswith("model.")}
        weights = scaled_concepts(state["concept_weights"], state["concept_scale"])
        save_tap(folder, tap, ours, processor, ConceptSpace(concepts.names, weights, concepts.info), config.model.half)
        save_file({key: state[key].cpu() for key in objective.head_keys()}, folder / HEADS_FILE)

    def draw(trained: Any) -> dict[str, Any]:
        return draw_masks(trained, validation[0], processor.image_processor)

    recipe = Recipe(
        trainee=objective,
        batches=batches(pictures),
        validation=validation,
        save=save,
        better="iou/box" if config.loss.mask else "name/cell",
        pictures=draw if config.loss.mask else None,
    )
    return fit(recipe, run, config.optimizer, to_dict(config))


if __name__ == "__main__":
    main_of(__doc__, PretrainConfig, main)
