"""f: a soft mask for each text (arXiv:2312.07661, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .affinity import min_max, refine_cams
from .cam import PatchFeatures
from .configuration_car import CarConfig

_NOISE = 1e-6  # n * max of a CAM that is nothing but rounding


def propose_masks(
    features: PatchFeatures,
    texts: Tensor,
    background: Tensor,
    scale: float,
    config: CarConfig,
    progress: bool = False,
) -> Tensor:
    """Soft masks at the resolution of the patches.

    Args:
        features: the picture after f.
        texts: (N, E) unit embeddings of the live queries.
        background: (B, E) of the background words, B may be 0.
        scale: tau, by which cosines are multiplied.
        config: see [`CarConfig`]; mode, cam, box_threshold and compat matter.
        progress: show a bar.

    Returns:
        (N, h, w) float32 in 0..1; zeros where nothing speaks for a text.
    """
    exact = config.compat.probability_target
    weights = text_directions(features.embedding, texts, background, scale, config)
    cams = features.cams(weights, progress)
    dead = ~_alive(cams, exact)
    if dead.any() and len(background):
        weights = text_directions(features.embedding, texts, background[:0], scale, config)
        cams = torch.where(dead[:, None, None], features.cams(weights, progress), cams)
    scaled = min_max(cams.flatten(1)).reshape(cams.shape) * _alive(cams, exact)[:, None, None]
    if config.cam == "grad_cam":
        return scaled
    return refine_cams(features.affinity, scaled, config.box_threshold, config.compat.box_clip)


def text_directions(embedding: Tensor, texts: Tensor, background: Tensor, scale: float, config: CarConfig) -> Tensor:
    """What to differentiate e by for each text: t_c minus the mean text, weighted by probability.

    A text without any competitor has probability 1 and no gradient: then its plain logit is taken, as "grad_cam" does
    always (the scale-free form; the probability target of `Compat` has a gradient of zero there).

    Args:
        embedding: (E,) unit vector e of the picture.
        texts: (N, E); background (B, E); scale tau; config as in [`propose_masks`].
        background: see there.
        scale: see there.
        config: see there.

    Returns:
        (N, E).
    """
    if config.cam == "grad_cam":
        return texts
    logits = scale * texts @ embedding
    rivals = scale * background @ embedding
    if config.mode == "referring":  # each text alone against the background
        table = torch.cat([logits[:, None], rivals.expand(len(texts), -1)], dim=1).softmax(dim=1)
        own, mean = table[:, 0], table[:, :1] * texts + table[:, 1:] @ background
        alone = not len(background)
    else:
        table = torch.cat([logits, rivals]).softmax(dim=0)
        own, mean = table[: len(texts)], table @ torch.cat([texts, background])
        alone = len(table) == 1
    if config.compat.probability_target:
        return (scale * own)[:, None] * (texts - mean)
    return texts if alone else texts - mean


def _alive(cams: Tensor, exact: bool) -> Tensor:
    """(N,) bool: which CAMs (N, h, w) are more than zero, or more than rounding."""
    peaks = cams.flatten(1).amax(dim=1)
    return peaks > 0 if exact else peaks * cams[0].numel() > _NOISE


__all__ = ["propose_masks", "text_directions"]
