"""g: judges which prompted pictures show what their texts say (arXiv:2312.07661, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..data.crops import CropSettings, normalise_pixels
from ..errors import InputError
from .cam import run_blocks
from .configuration_car import Resize
from .visual_prompts import Pixels


def square_picture(image: Pixels, side: int, resize: Resize = "crop") -> Pixels:
    """What g sees of a picture, bicubically resized.

    Args:
        image: (H, W, 3) uint8.
        side: of the result.
        resize: "crop": the shortest side becomes `side` and the ends of the long one are cut off, as CLIP does;
            "squash": all of it, distorted.

    Returns:
        (side, side, 3) uint8.
    """
    picture = Image.fromarray(image)
    if resize == "squash":
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    shortest = min(picture.size)
    width, height = (side * length // shortest for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def embed_pictures(
    model: Any,
    settings: CropSettings,
    images: Iterable[Pixels],
    batch_size: int = 16,
    resize: Resize = "crop",
    skip_last_block: bool = False,
) -> Tensor:
    """Unit image embeddings of prompted pictures, of which only `batch_size` exist at a time.

    Args:
        model: a `CLIPModel`.
        settings: side, mean and standard deviation of its input.
        images: N pictures (H, W, 3) uint8.
        batch_size: pictures encoded at once.
        resize: see [`square_picture`].
        skip_last_block: see `Compat.g_skip_last_block`.

    Returns:
        (N, E) float32 on the model's device.

    Raises:
        InputError: the model answers with NaN.
    """
    squares = (square_picture(image, settings.size, resize) for image in images)
    embeddings = [_embed_batch(model, settings, batch, skip_last_block) for batch in _batches(squares, batch_size)]
    return torch.cat(embeddings)


def _batches(images: Iterator[Pixels], size: int) -> Iterator[Tensor]:
    while batch := list(islice(images, size)):
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


@torch.no_grad()
def _embed_batch(model: Any, settings: CropSettings, batch: Tensor, skip_last_block: bool) -> Tensor:
    pixels = normalise_pixels(batch.to(model.device), settings).to(model.dtype)
    if skip_last_block:
        features = _features_without_last_block(model, pixels)
    else:
        features = model.get_image_features(pixel_values=pixels)
        features = features if isinstance(features, Tensor) else features.pooler_output
    if not torch.isfinite(features).all():
        raise InputError("g answers with NaN or infinite values: damaged weights, or too small a dtype; try float32")
    return normalize(features.float(), dim=-1)


def _features_without_last_block(model: Any, pixels: Tensor) -> Tensor:
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixels))
    hidden = run_blocks(vision.encoder.layers[:-1], hidden)
    return model.visual_projection(vision.post_layernorm(hidden[:, 0]))


def class_table(
    images: Tensor, texts: Tensor, scale: float, ensemble: bool, background: Tensor | None = None
) -> Tensor:
    """Probability of each text for each prompted picture.

    With templates, each template has a softmax of its own; these are summed, and a second softmax goes over the sums.
    So the first one's confidence counts up to e^K, and a single query always has probability 1.

    Args:
        images: (N, E) unit embeddings, one picture per query.
        texts: (K, N, E) unit embeddings of the queries in K templates.
        scale: tau, by which cosines are multiplied.
        ensemble: whether templates are configured; else the first softmax stands (of several, the mean).
        background: (K, B, E) of words that compete as one class more, by the sum of their probabilities.

    Returns:
        (N, N), or (N, N + 1) with the background last.
    """
    total = images.new_zeros(len(images), texts.shape[1] + (background is not None))
    for index, queries in enumerate(texts):
        rivals = queries[:0] if background is None else background[index]
        shares = (scale * images @ torch.cat([queries, rivals]).T).softmax(dim=1)
        total[:, : len(queries)] += shares[:, : len(queries)]
        if background is not None:
            total[:, -1] += shares[:, len(queries) :].sum(dim=1)
    return total.softmax(dim=1) if ensemble else total / len(texts)


def survivors(table: Tensor, threshold: float, keep_at_least_one: bool = True) -> list[int]:
    """Rows whose own class is strictly above the threshold.

    Args:
        table: (N, N) or (N, N + 1) of [`class_table`].
        threshold: theta; 0 keeps all.
        keep_at_least_one: where none passes, the best one stays, unless the background class is likelier than it.

    Returns:
        Row numbers, ascending.
    """
    scores = table.diagonal()
    kept = (scores > threshold).nonzero()[:, 0].tolist() if threshold > 0 else list(range(len(scores)))
    if kept or not keep_at_least_one or not len(scores):
        return kept
    best = int(scores.argmax())
    beaten = table.shape[1] > len(table) and table[best, -1] >= scores[best]
    return [] if beaten else [best]


__all__ = ["class_table", "embed_pictures", "square_picture", "survivors"]
