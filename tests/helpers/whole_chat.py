"""A region chat model in one folder: the bundled TAP joined to a random LLM."""

from __future__ import annotations

from pathlib import Path

import torch
from region_chat import tokenizer, write_llm

from tap_llm import TapLlmForConditionalGeneration, TapLlmProcessor
from tap_llm.loading import load_tap
from tap_llm.region_llm.adapters import load_llm


def write_chat_model(folder: Path) -> None:
    torch.manual_seed(0)
    tap, tap_processor, _ = load_tap("tap-tiny")
    model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, load_llm(write_llm(folder / "llm")))
    processor = TapLlmProcessor.for_model(model, tap_processor, tokenizer(), "plain")
    for part in (model, processor):
        part.save_pretrained(folder)
