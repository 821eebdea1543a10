"""A tiny language model with its tokenizer, and a file of dialogues, for tests of region chat's training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tap_llm import TapImageProcessor, TapLlmProcessor

TEXT = ["What is region 1? a red square", "the blue circle on the left", "User: Assistant: yes no"]
VOCABULARY = 300


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|end|>", "<|reserved_0|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")


def chat_processor(**costs: int) -> TapLlmProcessor:
    """A processor without a model."""
    costs = {"tokens_per_region": 1, "tokens_per_image": 0, **costs}
    return TapLlmProcessor(TapImageProcessor(size={"longest_edge": 64}), tokenizer(), chat_template="plain", **costs)


def write_llm(folder: Path, hidden_size: int = 32) -> Path:
    """A random Llama with its tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_dialogues(path: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """Samples of one picture each with two regions and a dialogue; longer from one to the next."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        picture = path.parent / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(picture)
        parts: list[dict[str, Any]] = [
            {"type": "image"},
            {"type": "text", "text": "What is " + "the " * number},
            {"type": "region", "index": 9 if number in broken else number % 2},
        ]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"square {number}"}]
        regions = [{"box": [1, 2, 20, 22]}, {"box": [12, 4, 38, 29], "category": "cat"}]
        lines.append(json.dumps({"id": str(number), "image": picture.name, "regions": regions, "messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path
