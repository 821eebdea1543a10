"""Train TAP's caption decoder on a frozen TAP (arXiv:2312.09128, section 3.3).

    accelerate launch -m training.caption --config configs/tap_tiny/5_captions.yaml [key=value …] [--resume]

Regions are prompted half by their box, half by points of the mask that is predicted for it. Data needs boxes and
captions, no masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor

from tap_llm.errors import InputError
from tap_llm.hub import home
from tap_llm.tap.caption_decoder import TapCaptionDecoder
from tap_llm.tap.modeling_tap import TapForConditionalGeneration
from tap_llm.tap.processing_tap import TapProcessor
from tap_llm.tap.tokenization import TOKENIZER_FILE_NAME

from .captioning import CaptionBatches, CaptionLossConfig, CaptionObjective
from .config import main_of, to_dict
from .distributed import process_state
from .loop import check, fit
from .models import build_tap, save_tap
from .pictures import draw_captions
from .recipe import VALIDATION_BATCHES, Recipe, RecipeConfig
from .sources import Pictures
from .tokenizers import train_tokenizer

TOKENIZER_PICTURES = 2000  # whose captions a new tokenizer is trained on


@dataclass
class CaptionConfig(RecipeConfig):
    """Configuration of this recipe."""

    loss: CaptionLossConfig = field(default_factory=CaptionLossConfig)
    fresh_decoder: bool = True
    """Start the caption decoder from random weights, as TAP does; false goes on with the one that is there."""
    dropout: float = 0.1
    """Of the caption decoder, in attention and residuals."""


def main(config: CaptionConfig) -> Path:
    """Train; returns the folder of the finished model."""
    run = config.run
    check(run, config.optimizer)
    set_seed(run.seed)
    tap, processor, concepts = build_tap(config.model, ["unknown"])
    pictures = Pictures(config.data, run.seed, captioned=True)
    processor = with_tokenizer(processor, tap, pictures, config)
    prepare_decoder(tap, config)
    if run.gradient_checkpointing:
        tap.caption_decoder.activation_checkpointing_enable()

    def batches(source: Pictures, length: int | None = None) -> CaptionBatches:
        return CaptionBatches(
            source, processor.tokenizer, processor.image_processor, run.batch_size, config.data.regions,
            config.loss.max_length, length,
        )  # fmt: skip

    validation = batches(pictures.for_validation(), VALIDATION_BATCHES)

    def save(state: dict[str, Tensor], folder: Path) -> None:
        ours = {key.removeprefix("tap."): value for key, value in state.items()}
        save_tap(folder, tap, ours, processor, concepts, config.model.half)

    recipe = Recipe(
        trainee=CaptionObjective(tap, config.loss),
        batches=batches(pictures),
        validation=validation,
        save=save,
        better="accuracy",
        pictures=lambda trained: draw_captions(trained, validation[0], processor),
    )
    return fit(recipe, run, config.optimizer, to_dict(config))


def with_tokenizer(
    processor: TapProcessor, tap: TapForConditionalGeneration, pictures: Pictures, config: CaptionConfig
) -> TapProcessor:
    """The processor with a tokenizer: its own, or a new one for the captions of the data.

    Raises:
        InputError: there is none, and a decoder that goes on knows no other.
    """
    if processor.tokenizer is not None:
        return processor
    if not config.fresh_decoder:
        raise InputError(
            f"model.start={config.model.start} has no tokenizer, without which its caption decoder cannot go on: put "
            f"the tokenizer where it belongs (for official models {home() / 'downloads' / TOKENIZER_FILE_NAME}), or "
            "start anew with fresh_decoder=true"
        )
    run = config.run
    captions = (
        caption for number in range(TOKENIZER_PICTURES) for texts in pictures[number].captions for caption in texts
    )
    state = process_state()
    with state.main_process_first():  # the others read its file
        again = state.is_main_process and not run.resume
        words = train_tokenizer(captions, tap.config.text_config.vocab_size, Path(run.output_dir), again)
    return TapProcessor(processor.image_processor, words)


def prepare_decoder(tap: TapForConditionalGeneration, config: CaptionConfig) -> None:
    """Set dropout and, if wanted, fresh weights."""
    text: Any = tap.config.text_config
    text.dropout = text.attention_dropout = config.dropout
    state = tap.caption_decoder.state_dict()
    tap.caption_decoder = TapCaptionDecoder(text)
    if not config.fresh_decoder:
        tap.caption_decoder.load_state_dict(state)


if __name__ == "__main__":
    main_of(__doc__, CaptionConfig, main)
