"""Names and layouts of official TAP checkpoints, and ours: one table, read in both directions.

Official models see BGR images, keep queries, keys and values of the caption decoder in one matrix and rotate
neighbouring channels for positions. Ours see RGB and follow Transformers' layout. The rest is only renamed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

VISION, PROMPT, DECODER = "model.vision_encoder", "model.prompt_encoder", "model.mask_decoder"
TEXT = "caption_decoder.model"

_ATTENTIONS = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")


def _attention_rules(official: str, ours: str) -> list[tuple[str, str]]:
    rules = [(f"{official}.{name}", f"{ours}.{name}") for name in ("q_proj", "k_proj", "v_proj")]
    return [*rules, (f"{official}.proj", f"{ours}.o_proj")]


def _numbered(official: str, ours: str, numbers: Iterable[int]) -> list[tuple[str, str]]:
    return [(f"{official}{number}", f"{ours}{number}") for number in numbers]


# Official name, our name; `*` is a layer number. A rule covers a parameter, or a module with all its tensors.
_RULES: list[tuple[str, str]] = [
    ("image_encoder.patch_embed.proj", f"{VISION}.patch_embeddings.projection"),
    ("image_encoder.pos_embed.weight", f"{VISION}.position_embeddings"),
    *_numbered("image_encoder.blocks.*.norm", f"{VISION}.layers.*.layer_norm", (1, 2)),
    ("image_encoder.blocks.*.attn.qkv", f"{VISION}.layers.*.attention.qkv"),
    ("image_encoder.blocks.*.attn.proj", f"{VISION}.layers.*.attention.proj"),
    ("image_encoder.blocks.*.attn.rel_pos_embed.weight", f"{VISION}.layers.*.attention.rel_pos_bias"),
    *_numbered("image_encoder.blocks.*.mlp.fc", f"{VISION}.layers.*.mlp.fc", (1, 2)),
    *_numbered("image_encoder.cross_conv.*.conv", f"{VISION}.bottlenecks.*.conv", (1, 2, 3)),
    *_numbered("image_encoder.cross_conv.*.norm", f"{VISION}.bottlenecks.*.norm", (1, 2, 3)),
    ("image_encoder.norm", f"{VISION}.layer_norm"),
    ("image_encoder.neck.lateral_conv.0.0", f"{VISION}.neck.conv1"),
    ("image_encoder.neck.lateral_conv.0.1", f"{VISION}.neck.norm1"),
    ("image_encoder.neck.output_conv.0.0", f"{VISION}.neck.conv2"),
    ("image_encoder.neck.output_conv.0.1", f"{VISION}.neck.norm2"),
    ("prompt_encoder.coord_matrix", f"{PROMPT}.coord_matrix"),
    ("prompt_encoder.point_embed", f"{PROMPT}.point_embed"),
    *(
        rule
        for name in _ATTENTIONS
        for rule in _attention_rules(f"image_decoder.transformer.blocks.*.{name}", f"{DECODER}.layers.*.{name}")
    ),
    *_numbered("image_decoder.transformer.blocks.*.norm", f"{DECODER}.layers.*.layer_norm", (1, 2, 3, 4)),
    *_numbered("image_decoder.transformer.blocks.*.mlp.fc", f"{DECODER}.layers.*.mlp.fc", (1, 2)),
    *_attention_rules("image_decoder.transformer.final_attn_token_to_image", f"{DECODER}.final_attn_token_to_image"),
    ("image_decoder.transformer.norm", f"{DECODER}.layer_norm"),
    ("image_decoder.iou_token.weight", f"{DECODER}.iou_token"),
    ("image_decoder.sem_tokens.weight", f"{DECODER}.semantic_tokens"),
    ("image_decoder.mask_tokens.weight", f"{DECODER}.mask_tokens"),
    ("image_decoder.output_conv.0", f"{DECODER}.upscaler.conv1"),
    ("image_decoder.output_conv.1", f"{DECODER}.upscaler.layer_norm"),
    ("image_decoder.output_conv.3", f"{DECODER}.upscaler.conv2"),
    ("image_decoder.mask_pred.*.layers.*", f"{DECODER}.mask_heads.*.layers.*"),
    ("image_decoder.iou_pred.layers.*", f"{DECODER}.iou_head.layers.*"),
    ("image_decoder.sem_pred.layers.*", f"{DECODER}.semantic_head.layers.*"),
    ("text_decoder.encoder", "caption_decoder.semantic_projection"),
    ("text_decoder.transformer.tok_embeddings", f"{TEXT}.embed_tokens"),
    ("text_decoder.transformer.text_proj", "caption_decoder.lm_head"),
    *_numbered("text_decoder.transformer.blocks.*.norm", f"{TEXT}.layers.*.layer_norm", (1, 2)),
    ("text_decoder.transformer.blocks.*.attn.qkv", f"{TEXT}.layers.*.self_attn.qkv_proj"),
    ("text_decoder.transformer.blocks.*.attn.proj", f"{TEXT}.layers.*.self_attn.o_proj"),
    *_numbered("text_decoder.transformer.blocks.*.mlp.fc", f"{TEXT}.layers.*.mlp.fc", (1, 2)),
    ("text_decoder.transformer.norm", f"{TEXT}.layer_norm"),
]

PATCH_WEIGHT = f"{VISION}.patch_embeddings.projection.weight"
REL_POS_INDEX = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.rel_pos_embed\.index")
_FUSED = re.compile(rf"({re.escape(TEXT)}\.layers\.\d+\.self_attn\.)qkv_proj(\..+)")
_SPLIT = re.compile(rf"({re.escape(TEXT)}\.layers\.\d+\.self_attn\.)([qkv])_proj(\..+)")
_TENSORS = r"(|\.weight|\.bias|\.running_mean|\.running_var|\.num_batches_tracked)"


def _renamer(rules: Iterable[tuple[str, str]]) -> Callable[[str], str | None]:
    """Function that turns a name matching the first of a pair into the second; None where no pair matches."""
    compiled = []
    for source, target in rules:
        pattern = re.escape(source).replace(r"\*", r"(\d+)") + _TENSORS
        compiled.append((re.compile(pattern), target.replace("*", "{}") + "{}"))

    def rename(name: str) -> str | None:
        for pattern, template in compiled:
            match = pattern.fullmatch(name)
            if match:
                return template.format(*match.groups())
        return None

    return rename


our_name = _renamer(_RULES)
_official_name = _renamer((ours, official) for official, ours in _RULES)


def official_name(name: str) -> str | None:
    """Official name of one of our tensors; queries, keys and values of the caption decoder share one."""
    return _official_name(_SPLIT.sub(r"\1qkv_proj\3", name))


def _to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rotary channels of each head: neighbours (0, 1), (2, 3) … -> halves (0, d/2), (1, d/2 + 1) …"""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Inverse of [`_to_halves`]."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def layout_from_official(state: Mapping[str, Tensor], text_heads: int) -> dict[str, Tensor]:
    """Bring values under our names from the official layout into ours: RGB, split heads, rotary halves."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        fused = _FUSED.fullmatch(name)
        if fused:
            query, key, other = value.chunk(3)
            parts = (_to_halves(query, text_heads), _to_halves(key, text_heads), other)
            result.update({f"{fused[1]}{p}_proj{fused[2]}": v for p, v in zip("qkv", parts, strict=True)})
        else:
            result[name] = value.flip(1) if name == PATCH_WEIGHT else value
    return result


def layout_to_official(state: Mapping[str, Tensor], text_heads: int) -> dict[str, Tensor]:
    """Inverse of [`layout_from_official`]."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        split = _SPLIT.fullmatch(name)
        if split is None:
            result[name] = value.flip(1) if name == PATCH_WEIGHT else value
        elif split[2] == "q":
            query, key, other = (state[f"{split[1]}{part}_proj{split[3]}"] for part in "qkv")
            parts = [_to_neighbours(query, text_heads), _to_neighbours(key, text_heads), other]
            result[f"{split[1]}qkv_proj{split[3]}"] = torch.cat(parts)
    return result


__all__ = [
    "REL_POS_INDEX",
    "layout_from_official",
    "layout_to_official",
    "official_name",
    "our_name",
]
