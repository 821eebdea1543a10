"""How much faster is a step of region chat from cached region tokens than from images?

    python benchmarks/token_cache.py [--variant vit_b] [--llm small medium] [--pictures 2] [--steps 3]

LoRA training (stage 2) of random LLMs of 7 and of 98 M parameters on a random TAP, the same conversations both ways in
turns; minimum of the steps. Making a batch (reading pictures, or shards) is part of the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `training` is beside this folder, not installed

from tap_llm import (
    TapConfig,
    TapImageProcessor,
    TapLlmForConditionalGeneration,
    TapLlmProcessor,
    TapModel,
    TapProcessor,
)
from tap_llm.data.readers import open_samples
from tap_llm.region_llm.adapters import attach_lora, lora_config
from tap_llm.region_llm.token_builder import build_token_cache
from tap_llm.region_llm.token_cache import TokenCache
from training.chat_objective import ChatObjective
from training.dialogues import DialogueBatches, DialogueConfig, Dialogues

REGIONS, VOCABULARY = 4, 8192
LLMS = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "medium": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def write_samples(folder: Path, count: int) -> Path:
    """Noise of 1024 x 768 pixels with boxes and a dialogue each."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (768, 1024, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
        boxes = [[100 * i, 50 * i, 100 * i + 300, 50 * i + 300] for i in range(REGIONS)]
        parts: list[Any] = [{"type": "image"}, {"type": "text", "text": "What is this? "}]
        parts += [{"type": "region", "index": index} for index in range(REGIONS)]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a red square " * 20}]
        regions = [{"box": box} for box in boxes]
        lines.append(json.dumps({"image": f"{number}.jpg", "regions": regions, "messages": messages}))
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "talk.jsonl"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: the text does not matter here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|pad|>", "<|end|>", "<|reserved_0|>"]
    words = {word: index for index, word in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.add_special_tokens(specials)
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")


def make_model(tap: TapModel, size: str) -> tuple[TapLlmForConditionalGeneration, TapLlmProcessor]:
    """Joined, with LoRA."""
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **LLMS[size]))
    model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, llm, "base")
    image_processor = TapImageProcessor(size={"longest_edge": tap.config.vision_config.image_size})
    processor = TapLlmProcessor.for_model(model, image_processor, byte_tokenizer(), "plain")
    attach_lora(model, lora_config(model))
    return model, processor


def step(objective: ChatObjective, optimizer: torch.optim.Optimizer, batches: DialogueBatches, number: int) -> float:
    """Seconds of a training step, its batch included."""
    started = time.perf_counter()
    batch = batches[number]
    with torch.autocast("cpu", torch.bfloat16):
        sums, _ = objective(**batch)
    (sums["text"] / objective.counts(batch)["text"]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def compare(tap: TapModel, size: str, pictures: int, steps: int, folder: Path) -> dict[str, float]:
    """Seconds of the fastest step from images, and from tokens."""
    samples = write_samples(folder, pictures)
    model, processor = make_model(tap, size)
    build_token_cache(open_samples(samples), tap, TapProcessor(processor.image_processor), folder / "tokens")
    config = DialogueConfig(samples=[str(samples)], group=1)
    stores: dict[str, list[TokenCache]] = {"images": [], "tokens": [TokenCache.open(folder / "tokens")]}
    batches = {
        kind: DialogueBatches(Dialogues(config, caches=caches), processor, pictures) for kind, caches in stores.items()
    }
    objective = ChatObjective(model).train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-5)
    seconds: dict[str, list[float]] = {kind: [] for kind in batches}
    for number in range(steps + 1):
        for kind, source in batches.items():
            seconds[kind].append(step(objective, optimizer, source, number))
    return {kind: min(values[1:]) for kind, values in seconds.items()}  # the first warms up


def main() -> None:
    """Print seconds per step and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--llm", nargs="+", choices=LLMS, default=list(LLMS))
    parser.add_argument("--pictures", type=int, default=2, help="per batch")
    parser.add_argument("--steps", type=int, default=3, help="of each kind")
    args = parser.parse_args()
    torch.manual_seed(0)
    tap = TapModel(TapConfig.from_variant(args.variant)).to(torch.bfloat16).eval()
    for size in args.llm:
        with tempfile.TemporaryDirectory() as folder:
            best = compare(tap, size, args.pictures, args.steps, Path(folder))
        ratio = best["images"] / best["tokens"]
        print(f"{args.variant}, {size} LLM, {args.pictures} pictures x {REGIONS} regions: a step takes "
              f"{best['images']:.2f} s from images, {best['tokens']:.2f} s from tokens: ratio {ratio:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
