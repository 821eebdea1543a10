"""Train a small CLIP from nothing on the scene world, for finding things by text without a download.

    accelerate launch -m training.clip --config configs/tap_tiny_clip/1_clip.yaml [key=value …] [--resume]

The result is a plain CLIP of Transformers with its tokenizer and image processor, for both parts of CaR: patches know
their words, Grad-CAMs cover what they are asked for, and the class token names what a blurred, grey, black or circled
view points at; see `training/clip_objective.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tap_llm.clip_as_rnn.loading import Clip, load_clip
from tap_llm.data.crops import CropSettings
from tap_llm.errors import InputError

from .byte_level import kept_tokenizer
from .clip_batches import ClipBatches, ClipDataConfig, ClipPictures
from .clip_objective import ClipLossConfig, ClipObjective
from .clip_tokenizer import train_clip_tokenizer
from .config import OptimizerConfig, RunConfig, main_of, to_dict
from .loop import check, fit
from .recipe import VALIDATION_BATCHES, Recipe

TOKENIZER_ROUNDS = 4  # times that each object is named in the text that the tokenizer is trained on
MAX_TEXT = 77  # tokens, as in other CLIPs


@dataclass
class ClipSize:
    """Which model is trained."""

    start: str | None = None
    """CLIP to go on with: a folder, a bundled name or a hub id, with its tokenizer; the sizes below are then its own.
    None: fresh weights."""
    image_size: int = 192
    patch_size: int = 16
    hidden_size: int = 192
    layers: int = 6
    heads: int = 3
    mlp: int = 576
    text_hidden_size: int = 128
    text_layers: int = 3
    text_heads: int = 2
    text_mlp: int = 384
    projection: int = 128
    vocabulary: int = 2048
    half: bool = False
    """Store the weights in half precision."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be."""
        for name, value in vars(self).items():
            if name not in ("start", "half") and value < 1:
                raise InputError(f"model.{name} must be at least 1, got {value}")
        for size, parts in (
            ("image_size", "patch_size"), ("hidden_size", "heads"), ("text_hidden_size", "text_heads"),
        ):  # fmt: skip
            if getattr(self, size) % getattr(self, parts):
                raise InputError(
                    f"model.{size} {getattr(self, size)} must be a multiple of model.{parts} {getattr(self, parts)}"
                )


@dataclass
class ClipTrainConfig:
    """Configuration of this recipe."""

    model: ClipSize = field(default_factory=ClipSize)
    data: ClipDataConfig = field(default_factory=ClipDataConfig)
    loss: ClipLossConfig = field(default_factory=ClipLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def main(config: ClipTrainConfig) -> Path:
    """Train; returns the folder of the CLIP."""
    run, size = config.run, config.model
    check(run, config.optimizer)
    size.check()
    set_seed(run.seed)
    start = load_start(size.start) if size.start is not None else None
    sides: Any = size if start is None else start.model.config.vision_config
    pictures = ClipPictures(config.data, sides.image_size, sides.patch_size, run.seed)
    tokenizer = make_tokenizer(pictures, config, start)
    clip = make_clip(size, tokenizer) if start is None else start.model
    clip.set_attn_implementation("eager")  # gives gradients of gradients, and is faster than others on CPUs
    processor = make_image_processor(CropSettings.of_tower(clip) if start is None else start.settings)

    def batches(source: ClipPictures, length: int | None = None) -> ClipBatches:
        return ClipBatches(source, tokenizer, run.batch_size, length)

    def save(state: dict[str, Tensor], folder: Path) -> None:
        ours = {key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}
        save_clip(folder, clip, ours, tokenizer, processor, size.half)

    recipe = Recipe(
        trainee=ClipObjective(clip, processor.image_mean, processor.image_std, config.loss),
        batches=batches(pictures),
        validation=batches(pictures.for_validation(), VALIDATION_BATCHES),
        save=save,
        better="top1/view",
    )
    return fit(recipe, run, config.optimizer, to_dict(config))


def load_start(name: str) -> Clip:
    """The CLIP to go on with, in float32.

    Raises:
        InputError: it cannot be used, or has no tokenizer.
    """
    start = load_clip(name, torch.float32)
    if start.tokenizer is None:
        raise InputError(f"model.start={name} has no tokenizer, without which it cannot go on")
    return start


def make_tokenizer(pictures: ClipPictures, config: ClipTrainConfig, start: Clip | None) -> PreTrainedTokenizerFast:
    """That of the start, or one for what is said of the pictures; kept in the run's folder, where a resumed run finds
    it."""
    if start is not None:
        return kept_tokenizer(config.run, lambda: start.tokenizer)
    texts = pictures.texts(TOKENIZER_ROUNDS)
    return kept_tokenizer(config.run, lambda: train_clip_tokenizer(texts, config.model.vocabulary, MAX_TEXT))


def make_clip(size: ClipSize, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with random weights."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": size.text_hidden_size, "intermediate_size": size.text_mlp,
        "num_hidden_layers": size.text_layers, "num_attention_heads": size.text_heads,
        "max_position_embeddings": MAX_TEXT, "projection_dim": size.projection,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu",
    }  # fmt: skip
    vision = {
        "image_size": size.image_size, "patch_size": size.patch_size, "hidden_size": size.hidden_size,
        "intermediate_size": size.mlp, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "projection_dim": size.projection, "hidden_act": "gelu",
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.projection))


def make_image_processor(settings: CropSettings) -> CLIPImageProcessorPil:
    """CLIP's own: shortest side to the image size, bicubic, then the centre of it; needs no torchvision."""
    side = settings.size
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=list(settings.mean), image_std=list(settings.std),
    )  # fmt: skip


def save_clip(
    folder: Path,
    clip: CLIPModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    processor: CLIPImageProcessorPil,
    half: bool,
) -> None:
    """Write a folder that `CLIPModel`, `AutoTokenizer` and `AutoImageProcessor` take.

    Args:
        folder: where to.
        clip: gives the configuration.
        state: its trained weights.
        tokenizer: saved beside it.
        processor: likewise.
        half: store matrices in half precision; they load as float32.
    """
    if half:
        state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    clip.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main_of(__doc__, ClipTrainConfig, main)
