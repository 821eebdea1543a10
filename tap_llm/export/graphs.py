"""The parts of TAP as graphs with plain tensors on both sides: what is written as ONNX.

Symbols: B images, N regions, n prompt points, L new ids, P ids in the cache, D width, E concept width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..tap.caption_decoder import TapCaptionDecoder
from ..tap.modeling_tap import TapForConditionalGeneration, TapModel

IMAGE_ENCODER, REGION_DECODER, CAPTION_STEP = GRAPHS = ("image_encoder", "region_decoder", "caption_step")


@dataclass(frozen=True, eq=False)
class Graph:
    """A module and how to trace it.

    Attributes:
        name: of the file, without suffix.
        module: takes the inputs by position, returns the outputs as a tuple.
        inputs: example tensors by name.
        axes: names of the axes of each input that may have any length.
        outputs: names, in order.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


class ImageEncoderGraph(nn.Module):
    """Pixels to image embeddings."""

    def __init__(self, tap: TapModel) -> None:
        super().__init__()
        self.tap = tap

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """(B, 3, S, S) -> (B, D, G, G)."""
        return (self.tap.get_image_embeddings(pixel_values),)


class RegionDecoderGraph(nn.Module):
    """Prompts on encoded images to masks, scores, tokens and the routed slot."""

    def __init__(self, tap: TapModel) -> None:
        super().__init__()
        self.tap = tap

    def forward(
        self, image_embeddings: Tensor, input_points: Tensor, input_labels: Tensor, region_image_index: Tensor
    ) -> tuple[Tensor, ...]:
        """See [`TapModel.forward`]: (B, D, G, G), (N, n, 2), (N, n), (N,) -> the five outputs of `REGION_OUTPUTS`."""
        out = self.tap(
            image_embeddings=image_embeddings,
            input_points=input_points,
            input_labels=input_labels,
            region_image_index=region_image_index,
            return_dict=True,
        )
        return tuple(out[name] for name in REGION_OUTPUTS)


REGION_OUTPUTS = ("pred_masks", "iou_scores", "semantic_tokens", "semantic_embeds", "slots")


class CaptionStepGraph(nn.Module):
    """One step of a caption. The first step and all others are the same graph: position 0 is the semantic token."""

    def __init__(self, decoder: TapCaptionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, semantic_tokens: Tensor, input_ids: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, ...]:
        """Predict the id that follows.

        Args:
            semantic_tokens: (N, D), the same in every step.
            input_ids: (N, L) int64 that the cache does not hold yet; what stands at position 0 is not read.
            past_keys: (layers, N, heads, P, head_dim); P = 0 at first.
            past_values: as `past_keys`.

        Returns:
            `logits` (N, V) after the last id, `keys` and `values` (layers, N, heads, P + L, head_dim).
        """
        decoder = self.decoder
        seen = past_keys.shape[3]
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + seen
        prefix = decoder.semantic_projection(semantic_tokens).unsqueeze(1)
        embeds = torch.where((positions == 0)[:, None], prefix, decoder.model.embed_tokens(input_ids))
        visible = torch.arange(seen + input_ids.shape[1], device=input_ids.device) <= positions[:, None]
        mask = torch.where(visible, 0.0, torch.finfo(embeds.dtype).min)[None, None]  # (1, 1, L, P + L)
        cache = DynamicCache(config=decoder.config)
        for layer, (keys, values) in enumerate(zip(past_keys.unbind(), past_values.unbind(), strict=True)):
            cache.update(keys, values, layer)
        hidden = decoder.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        keys, values = (torch.stack([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
        return decoder.lm_head(hidden[:, -1]), keys, values


def graphs_of(model: TapForConditionalGeneration) -> list[Graph]:
    """The three graphs of a model, in the order of `GRAPHS`."""
    return [image_encoder_graph(model.model), _region_decoder_graph(model.model), _caption_step_graph(model)]


def image_encoder_graph(tap: TapModel) -> Graph:
    """The image encoder; its batch may have any length."""
    vision = tap.config.vision_config
    pixels = torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size)
    return Graph(
        IMAGE_ENCODER,
        ImageEncoderGraph(tap),
        {"pixel_values": pixels},
        {"pixel_values": {0: "images"}},
        ("image_embeddings",),
    )


def _region_decoder_graph(tap: TapModel) -> Graph:
    # Lengths that differ, and are not 1: torch takes equal ones for the same axis, and 1 for a constant.
    images, regions, points = 2, 3, 4
    vision = tap.config.vision_config
    side = vision.image_embedding_size
    inputs = {
        "image_embeddings": torch.zeros(images, vision.output_channels, side, side),
        "input_points": torch.zeros(regions, points, 2),
        "input_labels": torch.ones(regions, points, dtype=torch.long),
        "region_image_index": torch.tensor([0, 1, 1]),
    }
    axes = {
        "image_embeddings": {0: "images"},
        "input_points": {0: "regions", 1: "points"},
        "input_labels": {0: "regions", 1: "points"},
        "region_image_index": {0: "regions"},
    }
    return Graph(REGION_DECODER, RegionDecoderGraph(tap), inputs, axes, REGION_OUTPUTS)


def _caption_step_graph(model: TapForConditionalGeneration) -> Graph:
    text = model.config.text_config
    regions, new, past = 3, 4, 5
    cache = torch.zeros(cache_shape(model, regions, past))
    inputs = {
        "semantic_tokens": torch.zeros(regions, text.semantic_size),
        "input_ids": torch.ones(regions, new, dtype=torch.long),
        "past_keys": cache,
        "past_values": cache.clone(),
    }
    axes = {
        "semantic_tokens": {0: "regions"},
        "input_ids": {0: "regions", 1: "new"},
        "past_keys": {1: "regions", 3: "past"},
        "past_values": {1: "regions", 3: "past"},
    }
    return Graph(CAPTION_STEP, CaptionStepGraph(model.caption_decoder), inputs, axes, ("logits", "keys", "values"))


def cache_shape(model: TapForConditionalGeneration, regions: int, past: int) -> tuple[int, int, int, int, int]:
    """Shape (layers, N, heads, P, head_dim) of the caption decoder's keys."""
    text = model.config.text_config
    heads = text.num_attention_heads
    return text.num_hidden_layers, regions, heads, past, text.hidden_size // heads


__all__ = ["CAPTION_STEP", "GRAPHS", "IMAGE_ENCODER", "REGION_DECODER", "Graph", "graphs_of", "image_encoder_graph"]
