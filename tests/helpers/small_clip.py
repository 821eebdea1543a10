"""A CLIP model of a few thousand weights, and samples for it to look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tap_llm.concepts import ConceptSpace
from tap_llm.data.samples import RegionSample

SIDE, WIDTH = 16, 24
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    text = SMALL | {"vocab_size": 11, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = SMALL | {"image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def make_space(width: int = WIDTH) -> ConceptSpace:
    directions = torch.randn(width, 3, generator=torch.Generator().manual_seed(1))
    return ConceptSpace(["cat", "dog", "bus"], 20 * normalize(directions, dim=0))


def make_sample(number: int) -> RegionSample:
    """0 to 4 regions: masks, and in between a box and points alone."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    regions: list[dict[str, Any]] = []
    for index in range(number % 5):
        mask = np.zeros((20, 30), dtype=bool)
        x, y, w, h = rng.integers(0, 12, 4) + (0, 0, 3, 2)
        mask[y : y + h, x : x + w] = rng.random((min(h, 20 - y), w)) < 0.8
        mask[y, x] = True
        forms = {2: {"box": [3.5, 2.0, 40.0, 9.0]}, 3: {"points": [[4, 5]]}}
        regions.append(forms.get(index, {"mask": mask}))
    return RegionSample(image, regions, id=f"picture {number}")
