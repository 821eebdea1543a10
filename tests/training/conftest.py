"""A miniature run: 64 pixels, a few thousand weights, drawn shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tap_llm.concepts import ConceptSpace
from tap_llm.data.shapes import SHAPE_NAMES
from tap_llm.tap.modeling_tap import TapForConditionalGeneration
from tap_llm.tap.processing_tap import TapProcessor
from training.config import from_dict
from training.models import ModelConfig, build_tap

MODEL = {
    "variant": "tiny",
    "attention": "eager",
    "learn_concepts": True,
    "overrides": {
        "vision_config": {
            "image_size": 64, "window_size": 4, "hidden_size": 32, "num_attention_heads": 2, "output_channels": 32,
        },
        "prompt_config": {"hidden_size": 32, "image_size": 64},
        "mask_decoder_config": {
            "hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 32, "upscale_dim": 16, "head_hidden_size": 16,
            "semantic_hidden_size": 32, "semantic_embed_dim": 16, "dropout": 0.0,
        },
        "text_config": {"vocab_size": 400, "semantic_size": 32, "hidden_size": 32, "intermediate_size": 32},
    },
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Any) -> dict[str, Any]:
    """Settings of a miniature pre-training run of four steps."""
    return {
        "model": MODEL,
        "data": {"regions": 3, "scene_side": [64, 80]},
        "loss": {"all_slots": True, "colour": 0.5, "cell_name": 0.5, "cell_colour": 0.5},
        "optimizer": {"warmup": 1},
        "run": {
            "output_dir": str(tmp_path / "run"), "steps": 4, "batch_size": 2, "precision": "no", "workers": 0,
            "checkpoint_every": 2, "evaluate_every": 4, "log_every": 1, "tensorboard": False,
        },
    }  # fmt: skip


@pytest.fixture
def tiny() -> tuple[TapForConditionalGeneration, TapProcessor, ConceptSpace]:
    """A miniature TAP with fresh weights, its processor, and a space of the names of shapes."""
    torch.manual_seed(0)
    return build_tap(from_dict(ModelConfig, MODEL), SHAPE_NAMES)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Ten pictures of 60 x 40 pixels; number i shows i % 3 + 1 squares in their own grey, named after the picture."""
    lines = []
    for number in range(10):
        pixels = np.full((40, 60, 3), 10 * number, dtype=np.uint8)
        regions: list[dict[str, Any]] = []
        for place in range(number % 3 + 1):
            x, y, side = 4 + 18 * place, 5 + 3 * place, 9 + place
            pixels[y : y + side, x : x + side] = 120 + place
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            words = [f"grey square {place} of picture {number}"]
            regions.append({"mask": [corners], "category": f"Square {number}", "captions": words})
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "regions": regions}))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    return tmp_path / "samples.jsonl"
