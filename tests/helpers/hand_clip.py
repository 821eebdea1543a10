"""A CLIP model made by hand: it knows colours, and its numbers can be worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize
from transformers import CLIPConfig, CLIPModel

from tap_llm.clip_as_rnn import CarConfig, Clip, ClipAsRnn, TextEmbeddings
from tap_llm.data.crops import CropSettings

SIDE, WIDTH = 32, 4
COLOURS = {"red": (1.0, 0, 0, 0), "green": (0, 1.0, 0, 0), "blue": (0, 0, 1.0, 0), "gray": (1.0, 1.0, 1.0, 0)}
PLAIN = CropSettings(SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SETTINGS = CarConfig(
    mask_threshold=0.5, keep_threshold=0.4, box_threshold=0.4, prompts=("gray",), templates=(), background=(),
    refine="none",
)  # fmt: skip
_ZERO = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 1}


def hand_made_clip() -> CLIPModel:
    """Attention between patches of one colour, embeddings that are the colour."""
    text = _ZERO | {"num_hidden_layers": 1, "vocab_size": 3, "max_position_embeddings": 2}
    vision = _ZERO | {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        tower = model.vision_model
        for channel in range(3):
            tower.embeddings.patch_embedding.weight[channel, channel] = 1 / 16
        for module in tower.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
        for block in tower.encoder.layers:
            for name, scale in {"q_proj": 6, "k_proj": 6, "v_proj": 1, "out_proj": 1}.items():
                getattr(block.self_attn, name).weight.copy_(scale * torch.eye(WIDTH))
        model.visual_projection.weight.copy_(torch.eye(WIDTH))
        model.logit_scale.fill_(math.log(20))
    return model.eval()


def colour_embeddings(names: list[str]) -> Tensor:
    """(N, 4) unit embeddings of colours."""
    values = torch.tensor([COLOURS[name] for name in names]).reshape(-1, WIDTH)
    return normalize(layer_norm(values, (WIDTH,)), dim=-1)


def colour_texts(queries: list[str], background: list[str] | None = None) -> TextEmbeddings:
    """Queries and background words as the hand-made model knows them."""
    words = ["gray"] if background is None else background
    return TextEmbeddings(queries=colour_embeddings(queries), background=colour_embeddings(words))


def colour_picture() -> np.ndarray:
    """Gray, with a red part of 6 patches and a green one of 12: (32, 32, 3) uint8."""
    image = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
    image[4:12, 4:16] = (255, 0, 0)
    image[16:28, 12:28] = (0, 255, 0)
    return image


def hand_made_car(**options: object) -> ClipAsRnn:
    """CaR on the hand-made model as f and g."""
    return ClipAsRnn(Clip(hand_made_clip(), settings=PLAIN), config=SETTINGS.updated(**options))
