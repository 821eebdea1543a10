"""A TAP of a few thousand weights, prompts for it, and what its tests compare."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tap_llm import TapConfig, TapOutput

FIELDS = ("pred_masks", "iou_scores", "semantic_tokens", "semantic_embeds", "slots")
SIDE, GRID, WIDTH, CONCEPTS, VOCABULARY = 128, 16, 32, 12, 50
CAPTIONS = torch.tensor([[1, 7, 8, 9, 2], [1, 30, 2, -100, -100], [1, 5, 6, 2, -100]])

# A prompt is a list of (x, y, label).
BOX = [(20, 30, 2), (90, 100, 3)]
POINT = [(40, 50, 1), (0, 0, 4)]
NINE_POINTS = [(10 * i, 120 - 12 * i, i % 2) for i in range(1, 10)] + [(0, 0, 4)]
BOX_AND_POINTS = [(5, 5, 2), (60, 70, 3), (30, 30, 1), (50.5, 20.25, 0)]
MIXED = [BOX, NINE_POINTS, POINT, BOX_AND_POINTS, BOX]
Prompt = list[tuple[float, float, int]]


def small_config(**vision: Any) -> TapConfig:
    return TapConfig.from_variant(
        "tiny",
        vision_config={"image_size": SIDE, "patch_size": 8, "window_size": 4, "hidden_size": 32,
                       "num_attention_heads": 2, "output_channels": WIDTH, **vision},
        prompt_config={"image_size": SIDE, "hidden_size": WIDTH},
        mask_decoder_config={"hidden_size": WIDTH, "num_attention_heads": 2, "mlp_dim": 48, "upscale_dim": 16,
                             "head_hidden_size": 24, "semantic_hidden_size": 40, "semantic_embed_dim": CONCEPTS},
        text_config={"vocab_size": VOCABULARY, "semantic_size": WIDTH, "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 2},
    )  # fmt: skip


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> Any:
    """Give every tensor values that leave nothing the identity: tables and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.ndim == 1:
            value.copy_(float(name.endswith("weight")) + 0.3 * noise)
        elif name.endswith(("rel_pos_bias", "embeddings", "tokens", "token", "coord_matrix", "embed.weight")):
            value.copy_(noise)
        elif value.is_floating_point():
            value.copy_(noise / math.sqrt(value[0].numel()))
    return model.eval()


def rows(*prompts: Prompt) -> dict[str, Tensor]:
    """Prompts as the model's flat rows, equalised with pads."""
    longest = max(map(len, prompts))
    table = torch.tensor([prompt + [(0, 0, 4)] * (longest - len(prompt)) for prompt in prompts])
    return {"input_points": table[..., :2], "input_labels": table[..., 2].long()}


@torch.no_grad()
def run(model: nn.Module, prompts: list[Prompt], index: list[int] | None = None, **inputs: Any) -> TapOutput:
    images = torch.tensor(index) if index is not None else None
    return model(**rows(*prompts), region_image_index=images, **inputs)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


def same(ours: TapOutput, expected: TapOutput, rows: Any = slice(None), tolerance: float = 1e-5) -> None:
    """All that belongs to regions is equal; of `expected`, the given rows."""
    for field in FIELDS:
        close(ours[field], expected[field][rows], tolerance)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def train_step(model: nn.Module, pixels: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss over every output, and the gradients; whatever is random starts from the seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model(
        pixel_values=pixels,
        labels=CAPTIONS,
        region_image_index=torch.tensor([2, 0, 0]),
        **rows(BOX, NINE_POINTS, POINT),
    )
    total = outputs.loss + sum(outputs[field].square().mean() for field in FIELDS[:4])
    total.backward()
    return total.detach(), gradients(model)
