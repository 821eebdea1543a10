"""TAP's image encoder: window attention, joined by convolutional bottlenecks (arXiv:2312.09128, section 3).

Symbols: B images, G patch grid side, W windows per image, T tokens per window, C encoder width, D output channels.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tap import TapVisionConfig
from .layers import TapMLP, eager_attention_forward

# Widest activations of the windows that run at a time on a CPU, in bytes: windows do not see each other inside a
# block, and smaller tensors stay in the cache and off the page tables (8 % of the encoder's time at ViT-B size).
CPU_CHUNK_BYTES = 16 * 2**20


def window_partition(grid: Tensor, window_size: int) -> Tensor:
    """(B, G, G, C) -> (B * W, T, C): windows row by row, tokens row by row inside a window."""
    batch, side, _, channels = grid.shape
    count = side // window_size
    windows = grid.view(batch, count, window_size, count, window_size, channels).transpose(2, 3)
    return windows.reshape(batch * count * count, window_size * window_size, channels)


def window_unpartition(windows: Tensor, window_size: int, side: int) -> Tensor:
    """(B * W, T, C) -> (B, G, G, C), the inverse of [`window_partition`]."""
    count = side // window_size
    grid = windows.view(-1, count, count, window_size, window_size, windows.shape[-1]).transpose(2, 3)
    return grid.reshape(-1, side, side, windows.shape[-1])


def relative_position_index(window_size: int, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each pair of tokens in a window.

    Entry (i, j) = (y_i - y_j + w - 1) * (2w - 1) + (x_i - x_j + w - 1), for query i and key j.

    Returns:
        (T, T) int64 with T = window_size ** 2.
    """
    axis = torch.arange(window_size, device=device)
    offset = axis[:, None] - axis[None, :] + window_size - 1  # (w, w)
    index = offset[:, None, :, None] * (2 * window_size - 1) + offset[None, :, None, :]  # (y_i, x_i, y_j, x_j)
    return index.reshape(window_size**2, window_size**2)


class TapPatchEmbeddings(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, config: TapVisionConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, G, G, C)."""
        return self.projection(pixel_values).permute(0, 2, 3, 1).contiguous()


class TapVisionAttention(nn.Module):
    """Multi-head attention inside a window, with a learned bias per relative position."""

    def __init__(self, config: TapVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.num_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.rel_pos_bias = nn.Parameter(torch.zeros(self.num_heads, (2 * config.window_size - 1) ** 2))

    def forward(self, hidden_states: Tensor, relative_index: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B * W, T, C), (T, T) -> (B * W, T, C) and attention weights (B * W, heads, T, T) or None."""
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Four dimensions on purpose: with three, the CPU falls back from its fused kernel to the slow one.
        bias = self.rel_pos_bias[:, relative_index][None]  # (1, heads, T, T)
        if self.config._attn_implementation == "flex_attention":  # looks the bias up per window, without broadcasting
            bias = bias.expand(len(hidden_states), -1, -1, -1)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling, is_causal=False, position_bias=bias, **kwargs,
        )  # fmt: skip
        return self.proj(output.flatten(2)), weights


class TapVisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block on windows, with stochastic depth per image."""

    def __init__(self, config: TapVisionConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = TapVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TapMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.windows_per_image = (config.image_embedding_size // config.window_size) ** 2
        self.drop_path_rate = config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1)

    def _drop_path(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path_rate == 0.0:
            return branch
        keep = 1.0 - self.drop_path_rate
        images = branch.shape[0] // self.windows_per_image
        kept = torch.full((images, 1, 1), keep, dtype=branch.dtype, device=branch.device).bernoulli() / keep
        return branch * kept.repeat_interleave(self.windows_per_image, dim=0)

    def _chunk_size(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> int:
        """Windows to run at a time: all, or for inference on a CPU as many as stay in its cache."""
        recording = kwargs.get("output_attentions") or self.config.output_attentions
        whole = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or recording
        if whole or hidden_states.device.type != "cpu":
            return len(hidden_states)
        widest = hidden_states.shape[1] * self.config.intermediate_size * hidden_states.element_size()
        return max(1, CPU_CHUNK_BYTES // widest)

    def forward(self, hidden_states: Tensor, relative_index: Tensor, **kwargs: Any) -> Tensor:
        """(B * W, T, C) -> (B * W, T, C)."""
        size = self._chunk_size(hidden_states, kwargs)
        if size >= len(hidden_states):
            return self._run(hidden_states, relative_index, **kwargs)
        return torch.cat([self._run(windows, relative_index, **kwargs) for windows in hidden_states.split(size)])

    def _run(self, hidden_states: Tensor, relative_index: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.layer_norm1(hidden_states), relative_index, **kwargs)
        hidden_states = hidden_states + self._drop_path(attended)
        return hidden_states + self._drop_path(self.mlp(self.layer_norm2(hidden_states)))


class TapBottleneck(nn.Module):
    """Residual convolution block over the whole grid: the only place where windows exchange information."""

    def __init__(self, config: TapVisionConfig) -> None:
        super().__init__()
        width, middle, eps = config.hidden_size, config.hidden_size // 2, config.batch_norm_eps
        self.conv1 = nn.Conv2d(width, middle, kernel_size=1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle, eps=eps)
        self.conv2 = nn.Conv2d(middle, middle, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(middle, eps=eps)
        self.conv3 = nn.Conv2d(middle, width, kernel_size=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width, eps=eps)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, G, G) -> (B, C, G, G)."""
        hidden = self.activation(self.norm1(self.conv1(grid)))
        hidden = self.activation(self.norm2(self.conv2(hidden)))
        return grid + self.norm3(self.conv3(hidden))


class TapVisionNeck(nn.Module):
    """Projection of the grid to the width of the region decoder; no activation."""

    def __init__(self, config: TapVisionConfig) -> None:
        super().__init__()
        channels, eps = config.output_channels, config.batch_norm_eps
        self.conv1 = nn.Conv2d(config.hidden_size, channels, kernel_size=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels, eps=eps)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels, eps=eps)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, G, G) -> (B, D, G, G)."""
        return self.norm2(self.conv2(self.norm1(self.conv1(grid))))


class TapVisionEncoder(PreTrainedModel):
    """Image encoder of TAP."""

    config: TapVisionConfig
    base_model_prefix = "vision_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TapVisionLayer", "TapBottleneck", "TapVisionNeck"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # flash kernels take no position bias
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TapVisionLayer, "attentions": TapVisionAttention}

    def __init__(self, config: TapVisionConfig) -> None:
        super().__init__(config)
        self.patch_embeddings = TapPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(config.image_embedding_size**2, config.hidden_size))
        self.layers = nn.ModuleList(TapVisionLayer(config, index) for index in range(config.num_hidden_layers))
        self.bottlenecks = nn.ModuleList(TapBottleneck(config) for _ in range(config.num_bottlenecks))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.neck = TapVisionNeck(config)
        self.gradient_checkpointing = False
        self.batch_norm_folded = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TapVisionEncoder):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, TapVisionAttention):
            init.zeros_(module.rel_pos_bias)
        elif isinstance(module, TapBottleneck):  # starts as the identity
            init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
            init.kaiming_normal_(module.conv2.weight, mode="fan_out", nonlinearity="relu")
            init.kaiming_normal_(module.conv3.weight, mode="fan_out", nonlinearity="relu")
            init.zeros_(module.norm3.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.patch_embeddings.projection

    def fold_batch_norm(self) -> Self:
        """Fold every BatchNorm into the convolution before it, in place: faster inference, same results.

        The folded encoder can neither be trained nor saved; load it again for that.

        Returns:
            itself.
        """
        self.eval()
        for block in (*self.bottlenecks, self.neck):
            for number in (1, 2, 3) if isinstance(block, TapBottleneck) else (1, 2):
                conv, norm = getattr(block, f"conv{number}"), getattr(block, f"norm{number}")
                if not isinstance(norm, nn.Identity):
                    setattr(block, f"conv{number}", fuse_conv_bn_eval(conv, norm))
                    setattr(block, f"norm{number}", nn.Identity())
        self.batch_norm_folded = True
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; raises ValueError for an encoder whose BatchNorm was folded."""
        if self.batch_norm_folded:
            raise ValueError("this encoder's BatchNorm was folded for inference: load the model again to save it")
        super().save_pretrained(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As in torch; raises RuntimeError for an encoder whose BatchNorm was folded."""
        if mode and getattr(self, "batch_norm_folded", False):
            raise RuntimeError("this encoder's BatchNorm was folded for inference: load the model again to train it")
        return super().train(mode)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, 3, S, S), normalised RGB, S = `config.image_size`.
            kwargs: passed to the attention function.

        Returns:
            `last_hidden_state` (B, D, G, G), the image embeddings; on request `hidden_states`, each (B * W, T, C).

        Raises:
            ValueError: the canvas has another size.
        """
        config = self.config
        if pixel_values.shape[-2:] != (config.image_size, config.image_size):
            raise ValueError(
                f"pixel_values must be (B, 3, {config.image_size}, {config.image_size}), got "
                f"{tuple(pixel_values.shape)}; use the processor that belongs to the model"
            )
        side, window = config.image_embedding_size, config.window_size
        hidden = self.patch_embeddings(pixel_values.to(self.patch_embeddings.projection.weight.dtype))
        hidden = hidden + self.position_embeddings.view(side, side, -1)
        hidden = window_partition(hidden, window)
        relative_index = relative_position_index(window, hidden.device)
        last = len(self.bottlenecks) - 1
        for stage, bottleneck in enumerate(self.bottlenecks):
            for layer in self.layers[stage * config.bottleneck_interval : (stage + 1) * config.bottleneck_interval]:
                hidden = layer(hidden, relative_index, **kwargs)
            if stage == last:  # TAP normalises before the last bottleneck, not after it
                hidden = self.layer_norm(hidden)
            grid = bottleneck(window_unpartition(hidden, window, side).permute(0, 3, 1, 2))
            if stage < last:
                hidden = window_partition(grid.permute(0, 2, 3, 1), window)
        return BaseModelOutput(last_hidden_state=self.neck(grid))


__all__ = ["TapVisionEncoder"]
