"""TAP's caption decoder: a small causal language model that reads one semantic token (arXiv:2312.09128, section 3).

Symbols: N sequences, L tokens, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tap import TapTextConfig
from .layers import TapMLP, eager_attention_forward, split_heads


def rotary_angles(config: TapTextConfig, position_ids: Tensor) -> Tensor:
    """Rotation angles (N, L, head_dim / 2) in float32 of positions (N, L)."""
    head_dim = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    return position_ids.unsqueeze(-1).float() * config.rope_theta**-exponents


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of (N, heads, L, head_dim) by angles (N, 1, L, head_dim / 2)."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TapTextAttention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: TapTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.num_heads) ** -0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(N, L, C) -> (N, L, C) and attention weights (N, heads, L, S) or None."""
        query = apply_rotary(split_heads(self.q_proj(hidden_states), self.num_heads), *rotary)
        key = apply_rotary(split_heads(self.k_proj(hidden_states), self.num_heads), *rotary)
        value = split_heads(self.v_proj(hidden_states), self.num_heads)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0, scaling=self.scaling, **kwargs,
        )  # fmt: skip
        return self.o_proj(output.flatten(2)), weights


class TapTextLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: TapTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TapTextAttention(config, layer_idx)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TapMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), rotary, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.layer_norm2(hidden_states)))


class TapTextPreTrainedModel(PreTrainedModel):
    """Base of the caption models."""

    config: TapTextConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TapTextLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TapTextLayer, "attentions": TapTextAttention}


class TapTextModel(TapTextPreTrainedModel):
    """Transformer of the caption decoder, without its output layer."""

    def __init__(self, config: TapTextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TapTextLayer(config, index) for index in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the transformer.

        Args:
            input_ids: (N, L) int64; or `inputs_embeds` (N, L, C).
            attention_mask: (N, S) 1 for tokens, 0 for padding.
            position_ids: (N, L); counted from the cache if not given.
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: in place of `input_ids`.
            use_cache: return a cache.
            kwargs: passed to the attention function.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles = rotary_angles(self.config, position_ids).unsqueeze(1)  # (N, 1, L, head_dim / 2)
        rotary = (angles.cos().to(inputs_embeds.dtype), angles.sin().to(inputs_embeds.dtype))
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, rotary, attention_mask=mask, past_key_values=past_key_values,
                position_ids=position_ids, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=self.layer_norm(hidden_states), past_key_values=past_key_values
        )


class TapCaptionDecoder(TapTextPreTrainedModel, GenerationMixin):
    """Causal language model that can put a semantic token in the place of the first id.

    Without `semantic_tokens` it is an ordinary language model.
    """

    def __init__(self, config: TapTextConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # Transformers would guess it from the name of the class
        self.semantic_projection = nn.Linear(config.semantic_size, config.hidden_size, bias=False)
        self.model = TapTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _embed(self, input_ids: Tensor | None, semantic_tokens: Tensor) -> Tensor:
        if input_ids is None:
            raise ValueError("semantic_tokens take the place of the first of input_ids: give input_ids with them")
        if len(input_ids) != len(semantic_tokens):
            raise ValueError(f"{len(semantic_tokens)} semantic_tokens for {len(input_ids)} rows of input_ids")
        # The embedding's dtype, not the projection's: quantised layers store integers.
        prefix = self.semantic_projection(semantic_tokens.to(self.model.embed_tokens.weight.dtype))
        return torch.cat([prefix.unsqueeze(1), self.model.embed_tokens(input_ids[:, 1:])], dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        semantic_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: (N, L) int64. With `semantic_tokens` the first column is a placeholder.
            semantic_tokens: (N, D), fills position 0; only with the first step when generating.
            attention_mask: (N, S) 1 for tokens, 0 for padding.
            position_ids: (N, L).
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: (N, L, C) in place of `input_ids`.
            labels: (N, L) int64, -100 ignored; shifted inside.
            use_cache: return a cache.
            logits_to_keep: compute logits of the last so many positions only; 0 means all.
            kwargs: passed to the loss and attention functions.

        Returns:
            `logits` (N, L, V), `loss` with labels, `past_key_values`.
        """
        if semantic_tokens is not None:
            input_ids, inputs_embeds = None, self._embed(input_ids, semantic_tokens)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        is_first_iteration: bool | None = False,
        inputs_embeds: Tensor | None = None,  # named so that `generate` accepts it
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step; the semantic token is an input of the first step, or of all steps without a cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:  # position 0 is in the cache already
            inputs.pop("semantic_tokens", None)
        return inputs


__all__ = ["TapCaptionDecoder", "TapTextModel", "TapTextPreTrainedModel"]
