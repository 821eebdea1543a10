"""Train a tiny language model from nothing on the text of the scene world; a start for region chat on a laptop.

    accelerate launch -m training.language --config configs/tap_tiny_chat/1_language.yaml [key=value …] [--resume]

The result is a plain Llama of Transformers with tied embeddings, its tokenizer and its chat template. No picture and no
TAP is used; where regions will be, the text has placeholders, see `training/language_objective.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tap_llm.errors import InputError
from tap_llm.region_llm.placeholders import find_placeholder

from .byte_level import kept_tokenizer, load_tokenizer
from .chat_tokenizer import train_chat_tokenizer
from .config import OptimizerConfig, RunConfig, main_of, to_dict
from .language_objective import LanguageObjective, load_region_code, save_region_code
from .loop import check, fit
from .recipe import VALIDATION_BATCHES, Recipe
from .talks import TalkBatches, TalkConfig, Talks

TOKENIZER_TALKS = 3000  # conversations that the tokenizer is trained on


@dataclass
class LlmSize:
    """Size and words of the language model."""

    start: str | None = None
    """Language model of an earlier run of this recipe (its `final/`) to go on with, in its own size and words."""
    hidden_size: int = 160
    layers: int = 6
    heads: int = 5
    mlp: int = 384
    vocabulary: int = 2048
    max_length: int = 1024
    """Longest conversation in tokens, now and later."""
    template: str = "chatml"
    """Bundled chat template, which becomes the tokenizer's own: `plain` or `chatml`."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be."""
        for name in ("hidden_size", "layers", "heads", "mlp", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.start is not None and not Path(self.start).is_dir():
            raise InputError(f"model.start: there is no folder {self.start}")
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise InputError(
                f"model.hidden_size {self.hidden_size} must be a multiple of model.heads {self.heads}, an even one"
            )


@dataclass
class LanguageLoss:
    """What is learned of the text; the weight of answers is 1."""

    questions: float = 1.0
    """Weight of what users ask."""


@dataclass
class LanguageConfig:
    """Configuration of this recipe."""

    model: LlmSize = field(default_factory=LlmSize)
    data: TalkConfig = field(default_factory=TalkConfig)
    loss: LanguageLoss = field(default_factory=LanguageLoss)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def main(config: LanguageConfig) -> Path:
    """Train; returns the folder of the language model."""
    run = config.run
    check(run, config.optimizer)
    config.model.check()
    start = config.model.start
    set_seed(run.seed)
    talks = Talks(config.data, run.seed)
    tokenizer = make_tokenizer(talks, config)
    llm = AutoModelForCausalLM.from_pretrained(start) if start else make_llm(config.model, tokenizer)
    trainee = LanguageObjective(llm, find_placeholder(tokenizer), config.loss.questions)
    if start:
        load_region_code(trainee.position, llm.config.initializer_range, start)
    if run.gradient_checkpointing:
        llm.gradient_checkpointing_enable()

    def batches(source: Talks, length: int | None = None) -> TalkBatches:
        return TalkBatches(source, tokenizer, run.batch_size, llm.config.max_position_embeddings, length)

    def save(state: dict[str, Tensor], folder: Path) -> None:
        ours = {key.removeprefix("llm."): value for key, value in state.items() if key.startswith("llm.")}
        llm.save_pretrained(folder, state_dict=ours)
        tokenizer.save_pretrained(folder)
        save_region_code(trainee, state, folder)

    recipe = Recipe(
        trainee=trainee,
        batches=batches(talks),
        validation=batches(talks.for_validation(), VALIDATION_BATCHES),
        save=save,
        better="accuracy",
    )
    return fit(recipe, run, config.optimizer, to_dict(config))


def make_tokenizer(talks: Talks, config: LanguageConfig) -> PreTrainedTokenizerFast:
    """A tokenizer for the text of the scene world, kept in the run's folder; a resumed run takes the one there."""
    if config.model.start:
        return load_tokenizer(Path(config.model.start))
    texts, size = talks.texts(TOKENIZER_TALKS), config.model
    return kept_tokenizer(config.run, lambda: train_chat_tokenizer(texts, size.vocabulary, size.template))


def make_llm(size: LlmSize, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A language model with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main_of(__doc__, LanguageConfig, main)
