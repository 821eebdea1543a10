"""A miniature run: 64 pixels, a few thousand weights, drawn shapes."""

from __future__ import annotations

from typing import Any

import pytest

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
