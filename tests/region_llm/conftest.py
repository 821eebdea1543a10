"""A tiny TAP, tiny LLMs of several families, and tokenizers made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from tap_llm import TapConfig, TapImageProcessor, TapLlmForConditionalGeneration, TapLlmProcessor, TapModel
from tap_llm.region_llm import BUNDLED_TEMPLATES

SIDE = 64  # TAP's canvas in pixels; its grid is 8 x 8
TEXT = ["What is this? It is a red square.", "And the region on the left: a blue circle.", "User: hello Assistant: yes"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "qwen3": SIZES,
    "gemma": SIZES,
    "gemma2": {**SIZES, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "phi": {**SIZES, "partial_rotary_factor": 0.5},
    "phi3": SIZES,
    "smollm3": SIZES,
    "gpt2": GPT2_SIZES,
}


def make_tokenizer(*special: str, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a ChatML template, without a sign of where assistant turns are, and a reserved token."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>")
    tokenizer = make_tokenizer(*specials, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = (
        BUNDLED_TEMPLATES["chatml"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    return tokenizer


@pytest.fixture(scope="session")
def bare_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: no template, and no token but the end."""
    return make_tokenizer("<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tap() -> TapModel:
    """A random TAP whose masks and tokens differ from region to region; not to be changed."""
    torch.manual_seed(0)
    config = TapConfig.from_variant(
        "tiny",
        vision_config={"image_size": SIDE, "patch_size": 8, "window_size": 4, "hidden_size": 32,
                       "num_attention_heads": 2, "output_channels": 32},
        prompt_config={"image_size": SIDE, "hidden_size": 32},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 48, "upscale_dim": 16,
                             "head_hidden_size": 24, "semantic_hidden_size": 40, "semantic_embed_dim": 12},
        text_config={"vocab_size": 50, "semantic_size": 32, "hidden_size": 32, "num_attention_heads": 2},
    )  # fmt: skip
    model = TapModel(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model.eval()


@pytest.fixture(scope="session")
def make_llm() -> Callable[..., Any]:
    """Makes a random LLM of a family, with weights large enough that its answers depend on what it reads."""

    def make(family: str, vocabulary: int = 320, **options: Any) -> Any:
        torch.manual_seed(1)
        config = CONFIG_MAPPING[family](
            vocab_size=vocabulary,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            **{**FAMILIES[family], **options},
        )
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for value in llm.parameters():
                value.add_(0.15 * torch.randn_like(value))
        return llm

    return make


@pytest.fixture(scope="session")
def join(tap: TapModel, make_llm: Callable[..., Any], chat_tokenizer: Any) -> Callable[..., Any]:
    """Makes a model and its processor."""

    def make(family: str = "llama", projector: str = "base", tokenizer: Any = chat_tokenizer, **options: Any) -> Any:
        torch.manual_seed(2)
        model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, make_llm(family), projector, roi_grid=2,
                                                                global_grid=2)  # fmt: skip
        processor = TapLlmProcessor.for_model(
            model, TapImageProcessor(size={"longest_edge": SIDE}), tokenizer, **options
        )
        return model, processor

    return make


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Three photos: square, wide and tall."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((40, 40), (30, 60), (50, 25))
    ]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def region(*box: float, **more: Any) -> dict[str, Any]:
    return {"type": "region", "box": list(box), **more}


@pytest.fixture(scope="session")
def talks(pictures: list[Image.Image]) -> list[list[dict[str, Any]]]:
    """Ragged: two regions in two turns; text alone; two images, three regions, one of them introduced later."""
    square, wide, tall = ({"type": "image", "image": picture} for picture in pictures)
    return [
        [
            {"role": "user", "content": [square, text("What is "), region(3, 4, 20, 25), text("?")]},
            {"role": "assistant", "content": "a red square"},
            {"role": "user", "content": [text("And "), region(10, 10, 40, 40), text("?")]},
        ],
        [{"role": "user", "content": "hello"}],
        [
            {"role": "user", "content": [wide, text("first "), tall, text("second: "), region(2, 2, 20, 40),
                                         text(" on the left, "), region(0, 0, 30, 20, image=0)]},
            {"role": "assistant", "content": [text("yes")]},
            {"role": "user", "content": [text("and "), {"type": "region", "points": [[5, 6]]}]},
        ],
    ]  # fmt: skip
