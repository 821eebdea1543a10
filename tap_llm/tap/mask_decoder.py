"""TAP's region decoder: prompts and image in, masks, scores and semantic tokens out (arXiv:2312.09128, section 3).

Symbols: B images, N regions, n prompt tokens, T = 9 + n tokens per region, L = G * G image tokens, D width,
E concept width.
Rows are regions, whatever image they lie on; what depends on the image alone is computed once per image.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tap import TapMaskDecoderConfig
from .layers import TapMLP, eager_attention_forward, few_keys_attention, prefers_few_keys, split_heads


@dataclass
class TapMaskDecoderOutput(ModelOutput):
    """Output of [`TapMaskDecoder`].

    Args:
        pred_masks: (N, 4, 4G, 4G) mask logits per slot.
        iou_scores: (N, 4) float32 predicted IoU per slot; linear, so it can leave [0, 1].
        semantic_tokens: (N, 4, D) one token per slot, prefix of the caption decoder.
        semantic_embeds: (N, 4, E) one embedding per slot, to compare with concepts.
        attentions: attention weights of every attention layer, on request.
    """

    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    semantic_tokens: Tensor | None = None
    semantic_embeds: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None


def rows_of(per_image: Tensor, region_index: Tensor | None) -> Tensor:
    """(B, ...) per image -> (N, ...) per region; for a single image a view, without a copy."""
    if region_index is None:
        return per_image
    if per_image.shape[0] == 1:
        return per_image.expand(region_index.shape[0], *per_image.shape[1:])
    return per_image.index_select(0, region_index)


class TapMaskDecoderMLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, sizes: list[int], hidden_act: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.activation = ACT2FN[hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., sizes[0]) -> (..., sizes[-1])."""
        for layer in self.layers[:-1]:
            hidden_states = self.activation(layer(hidden_states))
        return self.layers[-1](hidden_states)


class TapMaskDecoderAttention(nn.Module):
    """Multi-head attention whose inner width may be smaller than that of the tokens."""

    def __init__(self, config: TapMaskDecoderConfig, downsample_rate: int = 1) -> None:
        super().__init__()
        self.config = config
        inner = config.hidden_size // downsample_rate
        self.num_heads = config.num_attention_heads
        self.scaling = (inner // self.num_heads) ** -0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, inner)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.o_proj = nn.Linear(inner, config.hidden_size)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        query_index: Tensor | None = None,
        key_index: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (N, T, D), or (B, T, D) with `query_index`.
            key: (N, S, D), or (B, S, D) with `key_index`.
            value: as `key`.
            attention_mask: additive, (N, 1, 1, S), or None.
            query_index: (N,) image of each region if `query` is per image: projected once per image.
            key_index: the same for `key` and `value`.
            kwargs: passed to the attention function.

        Returns:
            (N, T, D) and attention weights (N, heads, T, S) or None.
        """
        queries = rows_of(split_heads(self.q_proj(query), self.num_heads), query_index)
        keys = rows_of(split_heads(self.k_proj(key), self.num_heads), key_index)
        values = rows_of(split_heads(self.v_proj(value), self.num_heads), key_index)
        implementation = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if len(queries) == 0:  # Transformers' SDPA wrapper cannot reshape zero rows
            attention = eager_attention_forward
        elif implementation == "sdpa" and prefers_few_keys(queries, keys):
            attention = few_keys_attention
        output, weights = attention(
            self, queries, keys, values, attention_mask,
            dropout=0.0, scaling=self.scaling, is_causal=False, **kwargs,
        )  # fmt: skip
        return self.o_proj(output.flatten(2)), weights


class TapMaskDecoderLayer(GradientCheckpointingLayer):
    """Two-way block: tokens look at themselves and at the image, then the image looks at the tokens."""

    def __init__(self, config: TapMaskDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        rate, width, eps = config.attention_downsample_rate, config.hidden_size, config.layer_norm_eps
        self.is_first = layer_idx == 0
        self.self_attn = TapMaskDecoderAttention(config)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.cross_attn_token_to_image = TapMaskDecoderAttention(config, rate)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = TapMLP(width, config.mlp_dim, config.hidden_act)
        self.layer_norm3 = nn.LayerNorm(width, eps=eps)
        self.cross_attn_image_to_token = TapMaskDecoderAttention(config, rate)
        self.layer_norm4 = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Tensor,
        image: Tensor,
        token_positions: Tensor,
        image_positions: Tensor,
        attention_mask: Tensor | None,
        region_index: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) and image (B, L, D) with `region_index`, or (N, L, D) -> (N, T, D) and (N, L, D)."""
        if self.is_first:  # no positions and no residual here: the tokens are their own positions
            tokens = self.layer_norm1(self.self_attn(tokens, tokens, tokens, attention_mask, **kwargs)[0])
        else:
            placed = tokens + token_positions
            attended = self.self_attn(placed, placed, tokens, attention_mask, **kwargs)[0]
            tokens = self.layer_norm1(tokens + self.dropout(attended))

        placed_image = image + image_positions
        attended = self.cross_attn_token_to_image(
            tokens + token_positions, placed_image, image, key_index=region_index, **kwargs
        )[0]
        tokens = self.layer_norm2(tokens + self.dropout(attended))
        tokens = self.layer_norm3(tokens + self.dropout(self.mlp(tokens)))
        attended = self.cross_attn_image_to_token(
            placed_image, tokens + token_positions, tokens, attention_mask, query_index=region_index, **kwargs
        )[0]
        return tokens, self.layer_norm4(rows_of(image, region_index) + attended)


class TapPixelUpsample(nn.ConvTranspose2d):
    """Transposed 2 x 2 convolution with stride 2, as a matrix product on channels-last tokens."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """(..., C_in) -> (..., 4, C_out): the four pixels of a token, row by row."""
        weight = self.weight.permute(2, 3, 1, 0).reshape(-1, self.in_channels)  # (4 * C_out, C_in)
        bias = None if self.bias is None else self.bias.repeat(4)
        return nn.functional.linear(hidden_states, weight, bias).unflatten(-1, (4, self.out_channels))


class TapMaskUpscaler(nn.Module):
    """Image tokens to pixel features at four times the resolution."""

    def __init__(self, config: TapMaskDecoderConfig) -> None:
        super().__init__()
        self.conv1 = TapPixelUpsample(config.hidden_size, config.upscale_dim)
        self.layer_norm = nn.LayerNorm(config.upscale_dim, eps=config.layer_norm_eps)
        self.conv2 = TapPixelUpsample(config.upscale_dim, config.upscale_dim // 2)
        self.activation = nn.GELU()

    def forward(self, image: Tensor) -> Tensor:
        """(N, L, D) -> (N, L * 16, C): pixels grouped by image token, then by its 2 x 2, then by their 2 x 2."""
        hidden = self.activation(self.layer_norm(self.conv1(image)))  # (N, L, 4, C1)
        return self.activation(self.conv2(hidden)).flatten(1, 3)


def unshuffle_masks(masks: Tensor, side: int) -> Tensor:
    """(N, K, L * 16) logits in the order of [`TapMaskUpscaler`] -> (N, K, 4G, 4G)."""
    batch, slots, _ = masks.shape
    grouped = masks.view(batch, slots, side, side, 2, 2, 2, 2)  # token y, x, then dy1, dx1, dy2, dx2
    return grouped.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(batch, slots, 4 * side, 4 * side)


class TapMaskDecoder(PreTrainedModel):
    """Region decoder of TAP."""

    config: TapMaskDecoderConfig
    base_model_prefix = "mask_decoder"
    main_input_name = "image_embeddings"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TapMaskDecoder"]
    _supports_sdpa = True
    _supports_flash_attn = False  # masked keys are not contiguous padding
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": TapMaskDecoderAttention}

    def __init__(self, config: TapMaskDecoderConfig) -> None:
        super().__init__(config)
        width, slots, head = config.hidden_size, config.num_masks, config.head_hidden_size
        self.iou_token = nn.Parameter(torch.zeros(1, width))
        self.semantic_tokens = nn.Parameter(torch.zeros(slots, width))
        self.mask_tokens = nn.Parameter(torch.zeros(slots, width))
        self.layers = nn.ModuleList(TapMaskDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_attn_token_to_image = TapMaskDecoderAttention(config, config.attention_downsample_rate)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.upscaler = TapMaskUpscaler(config)
        self.mask_heads = nn.ModuleList(
            TapMaskDecoderMLP([width, head, head, config.upscale_dim // 2], config.hidden_act) for _ in range(slots)
        )
        self.iou_head = TapMaskDecoderMLP([width, head, head, slots], config.hidden_act)
        semantic = config.semantic_hidden_size
        self.semantic_head = TapMaskDecoderMLP(
            [width, semantic, semantic, config.semantic_embed_dim], config.hidden_act
        )
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TapMaskDecoder):
            for tokens in (module.iou_token, module.semantic_tokens, module.mask_tokens):
                init.normal_(tokens, std=1.0)

    def _key_mask(self, attended: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask (N, 1, 1, T) for tokens that are mere padding, or None if there are none."""
        if attended is None or (not torch.compiler.is_compiling() and bool(attended.all())):
            return None
        learned = 2 * self.config.num_masks + 1
        attended = nn.functional.pad(attended, (learned, 0), value=True)
        mask = torch.zeros(attended.shape, dtype=dtype, device=attended.device)
        return mask.masked_fill(~attended, torch.finfo(dtype).min)[:, None, None, :]

    def _predict_masks(self, mask_tokens: Tensor, image: Tensor, side: int) -> Tensor:
        """Mask tokens (N, K, D) and image tokens (N, L, D) -> logits (N, K, 4G, 4G)."""
        kernels = torch.stack([head(mask_tokens[:, slot]) for slot, head in enumerate(self.mask_heads)], dim=1)
        pixels = self.upscaler(image)  # (N, L * 16, C)
        return unshuffle_masks(kernels @ pixels.transpose(1, 2), side)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        image_embeddings: Tensor,
        image_positions: Tensor,
        prompt_tokens: Tensor,
        region_image_index: Tensor,
        attended: Tensor | None = None,
        **kwargs: Any,
    ) -> TapMaskDecoderOutput:
        """Decode regions.

        Args:
            image_embeddings: (B, D, G, G).
            image_positions: (1, L, D) position code of the grid.
            prompt_tokens: (N, n, D).
            region_image_index: (N,) int64, image of each region.
            attended: (N, n) bool, False where a prompt token only pads the row; None if none does.
            kwargs: passed to the attention function.

        Returns:
            [`TapMaskDecoderOutput`].
        """
        side, slots = image_embeddings.shape[-1], self.config.num_masks
        # Contiguous: sums with it would otherwise inherit its layout, and every LayerNorm copy them back.
        image = image_embeddings.to(self.iou_token.dtype).flatten(2).transpose(1, 2).contiguous()  # (B, L, D)
        learned = torch.cat([self.semantic_tokens, self.iou_token, self.mask_tokens])
        positions = torch.cat([learned.expand(len(prompt_tokens), -1, -1), prompt_tokens], dim=1)  # (N, T, D)
        mask = self._key_mask(attended, positions.dtype)

        tokens = positions
        region_index: Tensor | None = region_image_index
        for layer in self.layers:
            tokens, image = layer(tokens, image, positions, image_positions, mask, region_index, **kwargs)
            region_index = None  # from the first block on, the image tokens are per region
        attention = self.final_attn_token_to_image(tokens + positions, image + image_positions, image, **kwargs)[0]
        tokens = self.layer_norm(tokens + self.dropout(attention))

        semantic_tokens = tokens[:, :slots]
        return TapMaskDecoderOutput(
            pred_masks=self._predict_masks(tokens[:, slots + 1 : 2 * slots + 1], image, side),
            iou_scores=self.iou_head(tokens[:, slots]).float(),
            semantic_tokens=semantic_tokens,
            semantic_embeds=self.semantic_head(semantic_tokens),
        )


__all__ = ["TapMaskDecoder", "TapMaskDecoderOutput"]
