"""Layers that the parts of TAP share: the MLP, and the reference attention.

Other attention back-ends come from Transformers' attention interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class TapMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention that also returns its weights.

    Args:
        module: the attention module, for its training flag.
        query: (N, heads, T, head_dim).
        key: (N, heads, S, head_dim).
        value: (N, heads, S, head_dim).
        attention_mask: additive, broadcastable to (N, heads, T, S), or None.
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.
        position_bias: added to the scaled scores, broadcastable to (N, heads, T, S), or None.
        kwargs: ignored.

    Returns:
        Output (N, T, heads, head_dim) and attention weights (N, heads, T, S).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def few_keys_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of very many queries to a few keys, laid out so that queries are the fast axis.

    PyTorch's fused CPU kernel walks the keys innermost; with a dozen of them it is about four times slower than this.

    Args and shapes: as [`eager_attention_forward`]; the output is a view, not contiguous.
    """
    scores = torch.matmul(key * scaling, query.transpose(-1, -2))  # (N, heads, S, T)
    if attention_mask is not None:
        scores = scores + attention_mask.transpose(-1, -2)
    weights = nn.functional.dropout(scores.softmax(dim=-2), p=dropout, training=module.training)
    return torch.matmul(value.transpose(-1, -2), weights).permute(0, 3, 1, 2), None


def prefers_few_keys(query: Tensor, key: Tensor) -> bool:
    """Whether [`few_keys_attention`] is the faster form of SDPA for these shapes."""
    return query.device.type == "cpu" and key.shape[2] <= 32 and query.shape[2] >= 8 * key.shape[2]


def split_heads(hidden_states: Tensor, num_heads: int) -> Tensor:
    """(N, T, heads * head_dim) -> (N, heads, T, head_dim)."""
    return hidden_states.unflatten(-1, (num_heads, -1)).transpose(1, 2)
