"""A tiny model with random weights, whose vocabulary and concepts are real words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tap_llm.concepts import ConceptSpace
from tap_llm.data.shapes import SHAPE_COLOURS, SHAPE_NAMES
from tap_llm.pipelines import RegionPipeline
from tap_llm.tap import TapConfig, TapForConditionalGeneration
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.processing_tap import TapProcessor

SIDE = 64
WORDS = ["<unk>", "<s>", "</s>", "a", *SHAPE_NAMES, *(word for word in SHAPE_COLOURS if " " not in word), "<pad>"]


def build_pipe(seed: int = 3, words: bool = True) -> RegionPipeline:
    """With `words` False as official weights come: no tokenizer, and no concepts."""
    torch.manual_seed(seed)
    config = TapConfig.from_variant(
        "tiny",
        vision_config={"image_size": SIDE, "window_size": 2, "hidden_size": 32, "num_attention_heads": 2},
        prompt_config={"image_size": SIDE},
        mask_decoder_config={"mlp_dim": 64, "semantic_embed_dim": 16},
        text_config={"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    )
    model = TapForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that prompts matter
                parameter.normal_(std=0.2)
    processor = TapProcessor(TapImageProcessor(size={"longest_edge": SIDE}), _tokenizer() if words else None)
    names = list(SHAPE_NAMES)
    space = ConceptSpace(names, 5 * torch.randn(16, len(names))) if words else None
    return RegionPipeline(model=model, processor=processor, concepts=space, device="cpu")


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def make_pipe() -> Callable[..., RegionPipeline]:
    """Builds pipelines by seed."""
    return build_pipe


@pytest.fixture(scope="session")
def pipe() -> RegionPipeline:
    """Not to be changed."""
    return build_pipe()


@pytest.fixture(scope="session")
def model_folder(pipe: RegionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder
