"""Grad-CAM on a CLIP image encoder: one picture is encoded once, then asked for any number of texts.

The layer is the first layer norm of the last block, and the score that of the mean over all patches
(arXiv:2312.07661, section 3.2; after CLIP-ES). Differentiated is not the probability p_c of a text but
<e, t_c - sum_j p_j t_j> with p held fixed: the gradient of p_c is the same times the factor tau * p_c, which
scaling to 0..1 cancels, and which vanishes in floating point for texts that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from tqdm import tqdm

from ..data.crops import CropSettings, normalise_pixels
from .affinity import attention_affinity

AFFINITY_BLOCKS = 8
_BATCH_VALUES = 2**24  # attention values of one batch of gradients on an accelerator


@dataclass(eq=False)
class PatchFeatures:
    """A picture after f: all that its CAMs need, for any texts and steps.

    Attributes:
        grid: (h, w) patches, n = h * w.
        embedding: (E,) unit vector, the mean over patches as f's score path sees it.
        affinity: (n, n), see [`attention_affinity`].
        patches: (n, d), output of the last block's first layer norm.
        batch: gradients computed at once.
    """

    grid: tuple[int, int]
    embedding: Tensor
    affinity: Tensor
    patches: Tensor
    batch: int
    _score: Tensor = field(repr=False)  # (E,), the embedding with its graph
    _layer: Tensor = field(repr=False)  # (1, 1 + n, d), the patches with theirs, CLS first
    _jacobian: Tensor | None = field(default=None, repr=False)  # (E, d)

    def cams(self, directions: Tensor, progress: bool = False) -> Tensor:
        """Class activation maps, not yet scaled.

        Args:
            directions: (N, E), one t_c - sum_j p_j t_j per map.
            progress: show a bar.

        Returns:
            (N, h, w), at least 0.
        """
        weights = self.channel_weights(directions, progress)
        return (weights @ self.patches.T).relu().unflatten(1, self.grid)

    def channel_weights(self, directions: Tensor, progress: bool = False) -> Tensor:
        """Mean over the patches of the gradient of <e, direction>: (N, E) directions -> (N, d).

        It is linear in the direction: with at least E of them, the E unit vectors' gradients give all.
        """
        width = len(self.embedding)
        if self._jacobian is None and len(directions) >= width:
            self._jacobian = self._gradients(torch.eye(width, device=directions.device), progress)
        return self._gradients(directions, progress) if self._jacobian is None else directions @ self._jacobian

    def _gradients(self, directions: Tensor, progress: bool) -> Tensor:
        batches = tqdm(directions.split(self.batch), desc="maps", leave=False, disable=not progress)
        return torch.cat([self._batch_gradients(rows) for rows in batches])

    def _batch_gradients(self, rows: Tensor) -> Tensor:
        several = len(rows) > 1
        outputs = rows if several else rows[0]
        (gradient,) = torch.autograd.grad(
            self._score, self._layer, outputs, retain_graph=True, is_grads_batched=several
        )
        return gradient.reshape(len(rows), *self._layer.shape[1:])[:, 1:].mean(dim=1)


def encode_patches(model: Any, pixels: Tensor, batch: int | None = None) -> PatchFeatures:
    """Run f's image encoder: all blocks but the last without gradients, the last one with.

    Args:
        model: float32 `CLIPModel` with eager attention, whose weights need no gradient.
        pixels: (1, 3, H, W) normalised, H and W multiples of the patch size.
        batch: gradients computed at once; by default one on the CPU, and what fits on accelerators.

    Returns:
        The features, on the model's device. Their graph holds the last block's activations.
    """
    vision = model.vision_model
    *first, last = vision.encoder.layers
    side = vision.config.patch_size
    grid = pixels.shape[2] // side, pixels.shape[3] // side
    attention: list[Tensor] = []
    layer_norms: list[Tensor] = []
    watched = [*first, last][-AFFINITY_BLOCKS:]
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [
        *((block.self_attn, lambda module, inputs, output: _add_attention(attention, output[1])) for block in watched),
        (last.layer_norm1, lambda module, inputs, output: layer_norms.append(output)),
    ]
    with forward_hooks(hooks):
        with torch.no_grad():
            hidden = run_blocks(first, _embed(vision, pixels, grid))
        with torch.enable_grad():
            output = run_blocks([last], hidden.detach().requires_grad_())
            pooled = vision.post_layernorm(output)[0, 1:].mean(dim=0)
            score = normalize(model.visual_projection(pooled), dim=-1)
    if batch is None:
        batch = 1 if pixels.device.type == "cpu" else max(1, _BATCH_VALUES // attention[0].numel())
    return PatchFeatures(
        grid=grid,
        embedding=score.detach(),
        affinity=attention_affinity(attention[0] / len(watched)),
        patches=layer_norms[0][0, 1:].detach(),
        batch=batch,
        _score=score,
        _layer=layer_norms[0],
    )


@contextmanager
def forward_hooks(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Hooks that are gone afterwards, whatever happens."""
    handles: list[Any] = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_attention(total: list[Tensor], weights: Tensor) -> None:
    """Add (1, heads, 1 + n, 1 + n) to the sum, as mean over heads without CLS: one block's worth of memory."""
    mean = weights.detach()[0, :, 1:, 1:].mean(dim=0)
    total[:] = [total[0] + mean] if total else [mean]


def run_blocks(blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """Hidden states (B, T, d) after vision blocks, whether these return a tensor or a tuple."""
    for block in blocks:
        output = block(hidden, None)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _embed(vision: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (1, 1 + n, d) with positions for any grid."""
    embeddings = vision.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    tokens = torch.cat([embeddings.class_embedding.expand(1, 1, -1), patches], dim=1)
    return vision.pre_layrnorm(tokens + resized_positions(embeddings.position_embedding.weight, grid))


def resized_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position table (1 + s * s, d) for a grid (h, w): the CLS row as it is, the others bilinearly resized.

    Transformers' own resizing is bicubic; CaR's is bilinear.
    """
    side = round((len(table) - 1) ** 0.5)
    square = table[1:].T.unflatten(1, (side, side))
    resized = interpolate(square[None], grid, mode="bilinear", align_corners=False)[0]
    return torch.cat([table[:1], resized.flatten(1).T])


def patch_pixels(image: np.ndarray, patch_size: int, max_side: int, settings: CropSettings) -> Tensor:
    """What f sees: the whole picture, bicubic, each side rounded up to a multiple of the patch size.

    Args:
        image: (H, W, 3) uint8.
        patch_size: of the model.
        max_side: longest side before rounding; larger pictures are shrunk.
        settings: the model's mean and standard deviation of colours.

    Returns:
        (1, 3, H', W') float32, normalised.
    """
    shrink = min(1.0, max_side / max(image.shape[:2]))
    height, width = (-(-round(side * shrink) // patch_size) * patch_size for side in image.shape[:2])
    size = (max(width, patch_size), max(height, patch_size))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return normalise_pixels(torch.from_numpy(resized.copy()).permute(2, 0, 1)[None], settings)


__all__ = ["PatchFeatures", "encode_patches", "forward_hooks", "patch_pixels", "resized_positions", "run_blocks"]
