"""CLIP models with random weights and a tokenizer of single bytes: for shapes, speed and what a user can get wrong."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from tap_llm.clip_as_rnn import CarConfig, Clip, ClipAsRnn

SIDE, WIDTH = 32, 16
_BOS, _EOS = "<s>", "</s>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, between a start and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([_BOS, _EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A {_EOS}", special_tokens=[(_BOS, 0), (_EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_EOS, model_max_length=77
    )


def random_clip(seed: int = 0, patch_size: int = 8, layers: int = 3, **sizes: int) -> Clip:
    """A CLIP model of 16 channels; `sizes` may change any of its vision tower."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = small | {"num_hidden_layers": 1, "vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = small | {"image_size": SIDE // patch_size * patch_size, "patch_size": patch_size} | sizes
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()
    # Random weights embed all pictures and texts alike; wider ones tell them apart.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d):
                module.weight.normal_(0, 1.5 / module.weight[0].numel() ** 0.5)
    return Clip(model, byte_tokenizer())


def random_car(seed: int = 0, **options: Any) -> ClipAsRnn:
    """CaR on random weights: f and g differ, nothing but their own masks comes out."""
    config = CarConfig(keep_threshold=0.3, refine="none").updated(**options)
    return ClipAsRnn(random_clip(seed), random_clip(seed + 1), config)
