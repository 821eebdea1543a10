"""Stage 1 of region chat for a language model of `training.language`: the projector says what words would have said.

    accelerate launch -m training.tell --config configs/tap_tiny_chat/4_tell.yaml [key=value …] [--resume]

That language model has learned to read a region off one embedding: the sum of all words about it, and a code of its
box. Here the projector is fitted to just these sums, on scenes that TAP has read (`data.store`), and takes over the
code of boxes. No language model runs, so it takes a minute, where finding the same through the words of answers takes
hours. `training.align` and `training.chat` go on from the result (`model.start`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tap_llm.errors import InputError
from tap_llm.region_llm.lora import freeze_for_alignment
from tap_llm.region_llm.modeling_tap_llm import TapLlmForConditionalGeneration

from .config import main_of, to_dict
from .language_objective import load_region_code, told_embeddings
from .llms import ChatRecipeConfig, adapter_saver, build_llm, open_tokens
from .loop import check, fit
from .recipe import Metrics, Recipe, Sums
from .stored_scenes import StoredScenes
from .talks import NO_WORD, padded, words_of


@dataclass
class TellConfig(ChatRecipeConfig):
    """Configuration of this recipe; a batch is one of regions."""


class ToldRegions:
    """Batch n of regions of stored scenes, with the words about them.

    Args:
        stored: the scenes.
        tokenizer: of the language model.
        batch_size: N.
        seed: of the order.
        validation: the scenes that are kept for it, all in one batch.
    """

    def __init__(
        self,
        stored: StoredScenes,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        validation: bool = False,
    ) -> None:
        self.batch_size, self.seed, self.validation = batch_size, seed, validation
        chosen = stored.indices(validation)
        self.features = torch.cat([stored.tokens[index].semantic_tokens for index in chosen]).float()
        scenes = [stored.scenes[index] for index in chosen]
        self.words = padded(
            [
                tokenizer.encode(words_of(scene, place), add_special_tokens=False)
                for scene in scenes
                for place in range(len(scene.things))
            ],
            NO_WORD,
        )

    def __len__(self) -> int:
        return 1 if self.validation else 2**40

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """`features` (N, D) semantic tokens, and `words` (N, W) ids padded with -1."""
        if self.validation:
            return {"features": self.features, "words": self.words}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        rows = torch.randint(len(self.features), (self.batch_size,), generator=generator)
        return {"features": self.features[rows], "words": self.words[rows]}

    def take_problems(self) -> list[str]:
        """Nothing can be broken here."""
        return []


class TellObjective(nn.Module):
    """Mean squared error between the projector's semantic part and the told embeddings, both of unit size.

    Args:
        model: with all but the projector frozen.
    """

    weights = {"words": 1.0}

    def __init__(self, model: TapLlmForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def counts(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Regions."""
        return {"words": float(len(batch["features"]))}

    def forward(self, features: Tensor, words: Tensor) -> tuple[Sums, Metrics]:
        """Loss and cosine of a batch of [`ToldRegions`]."""
        body = self.model.model
        wanted = told_embeddings(body.get_input_embeddings(), words).float() / body.projector.scale
        found = body.projector.semantic.feature(features).float()
        cosines = F.cosine_similarity(found, wanted, dim=-1)
        loss = (found - wanted).square().mean(-1).sum()
        return {"words": loss}, {"cosine": (cosines.sum(), torch.tensor(len(cosines)))}


def main(config: TellConfig) -> Path:
    """Train; returns the folder of the adapter, which holds the projector alone."""
    run = config.run
    check(run, config.optimizer)
    config.data.check()
    if config.model.llm is None or not config.data.store.folder:
        raise InputError("name the language model, model.llm, and a folder for the scenes, data.store.folder")
    set_seed(run.seed)
    model, processor = build_llm(config.model)
    projector = model.model.projector
    load_region_code(projector.semantic.position, projector.scale, config.model.llm)
    freeze_for_alignment(model)
    for name, value in projector.named_parameters():
        value.requires_grad_(name.startswith("semantic.feature."))
    _, stored = open_tokens(config.data, model, processor)
    assert stored is not None

    recipe = Recipe(
        trainee=TellObjective(model),
        batches=ToldRegions(stored, processor.tokenizer, run.batch_size, run.seed),
        validation=ToldRegions(stored, processor.tokenizer, run.batch_size, run.seed, validation=True),
        save=adapter_saver(model, processor),
        better="cosine",
    )
    return fit(recipe, run, config.optimizer, to_dict(config))


if __name__ == "__main__":
    main_of(__doc__, TellConfig, main)
