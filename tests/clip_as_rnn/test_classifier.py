"""g: scores in closed form, survivors, and what the image encoder sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from random_clip import SIDE, random_clip
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil

from tap_llm import InputError
from tap_llm.clip_as_rnn.classifier import class_table, embed_pictures, square_picture, survivors
from tap_llm.data.crops import CropSettings

TEMPLATES = 15


def table_of(probabilities: torch.Tensor, ensemble: bool = True) -> torch.Tensor:
    """Class table of prompted pictures whose first softmax gives (N, N) `probabilities` in each template."""
    count = len(probabilities)
    texts = probabilities.log().T.expand(TEMPLATES if ensemble else 1, count, count)
    return class_table(torch.eye(count), texts, 1.0, ensemble)


def spread(count: int, own: float) -> torch.Tensor:
    """(N, N): `own` on the diagonal, the rest evenly."""
    return torch.full((count, count), (1 - own) / (count - 1)).fill_diagonal_(own)


def unit(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


def test_a_single_query_is_certain() -> None:
    for ensemble in (True, False):
        table = class_table(unit(1, 8), unit(TEMPLATES, 1, 8), 100.0, ensemble)
        assert table.tolist() == [[1.0]]
    assert survivors(table, 0.6) == [0]


@pytest.mark.parametrize("count", [2, 5, 20])
@pytest.mark.parametrize("ensemble", [True, False])
def test_equal_evidence_gives_equal_shares(count: int, ensemble: bool) -> None:
    texts = unit(1, 1, 8).expand(TEMPLATES if ensemble else 1, count, 8)
    table = class_table(unit(count, 8), texts, 100.0, ensemble)
    assert torch.allclose(table, torch.full((count, count), 1 / count), atol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "count", "needed"),
    [(0.6, 20, 0.262), (0.6, 5, 0.296), (0.6, 3, 0.382), (0.3, 80, 0.244), (0.25, 38, 0.189), (0.25, 150, 0.265)],
)
def test_first_softmax_needed_to_survive(threshold: float, count: int, needed: float) -> None:
    assert table_of(spread(count, needed + 6e-4))[0, 0] > threshold
    assert table_of(spread(count, needed - 6e-4))[0, 0] < threshold


@pytest.mark.parametrize(("mean", "score"), [(0.52, 0.646), (0.55, 0.818), (0.60, 0.953)])
def test_two_queries(mean: float, score: float) -> None:
    assert table_of(spread(2, mean))[0, 0].item() == pytest.approx(score, abs=5e-4)


def test_without_templates_the_first_softmax_stands() -> None:
    assert torch.allclose(table_of(spread(4, 0.7), ensemble=False), spread(4, 0.7), atol=1e-6)


def test_templates_are_summed_before_the_second_softmax() -> None:
    images, texts = unit(3, 8), unit(5, 3, 8)
    sums = sum((7.0 * images @ texts[index].T).softmax(1) for index in range(5))
    assert torch.allclose(class_table(images, texts, 7.0, True), torch.as_tensor(sums).softmax(1), atol=1e-6)


def test_permuting_the_queries_permutes_everything() -> None:
    images, texts, order = unit(6, 8), unit(TEMPLATES, 6, 8), torch.tensor([3, 1, 5, 0, 2, 4])
    table = class_table(images, texts, 20.0, True)
    permuted = class_table(images[order], texts[:, order], 20.0, True)
    assert torch.allclose(permuted, table[order][:, order], atol=1e-6)
    kept = {int(order[row]) for row in survivors(permuted, 0.2)}
    assert kept == set(survivors(table, 0.2))


def test_thresholds() -> None:
    table = torch.diag(torch.tensor([0.3, 0.6, 0.1, 0.6]))
    assert survivors(table, 0.0) == [0, 1, 2, 3]
    assert survivors(table, 0.3) == [1, 3]  # strictly above
    assert survivors(table, 1.0) == [1]  # the best one, first of two
    assert survivors(table, 1.0, keep_at_least_one=False) == []


def test_background_is_one_more_class() -> None:
    images, texts, background = unit(3, 8), unit(TEMPLATES, 3, 8), unit(TEMPLATES, 5, 8)
    table = class_table(images, texts, 20.0, False, background)
    assert table.shape == (3, 4)
    assert torch.allclose(table.sum(1), torch.ones(3), atol=1e-6)
    # The background's own picture rejects even a single query.
    alone = class_table(background[0, :1], texts[:1, :1], 100.0, False, background[:1])
    assert alone[0, 0] < 0.01
    assert survivors(alone, 0.3) == []
    assert survivors(torch.tensor([[0.2, 0.1]]), 0.3) == [0]


def test_square_pictures_are_those_of_clip() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False
    )
    expected = np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0])
    assert np.array_equal(square_picture(image, 32).transpose(2, 0, 1), expected.astype(np.uint8))


def test_squashing_keeps_the_ends() -> None:
    image = np.zeros((10, 40, 3), dtype=np.uint8)
    image[:, :4] = 255
    assert square_picture(image, 20, "squash")[:, 0].min() > 200
    assert not square_picture(image, 20, "crop").any()


@pytest.mark.parametrize("size", [(1, 1), (1, 97), (89, 3), (224, 224)])
def test_pictures_of_any_shape(size: tuple[int, int]) -> None:
    for resize in ("crop", "squash"):
        assert square_picture(np.zeros((*size, 3), dtype=np.uint8), 32, resize).shape == (32, 32, 3)  # type: ignore[arg-type]


def test_embeddings_are_those_of_the_model_whatever_the_batch() -> None:
    clip = random_clip()
    settings = CropSettings.of_tower(clip.model)
    images = list(np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8))
    together = embed_pictures(clip.model, settings, images, batch_size=5)
    by_two = embed_pictures(clip.model, settings, iter(images), batch_size=2)
    assert torch.allclose(together, by_two, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(5), atol=1e-6)


def test_no_more_pictures_at_once_than_asked_for() -> None:
    clip = random_clip()
    sizes: list[int] = []
    handle = clip.model.vision_model.embeddings.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output))
    )
    pictures = (np.full((9, 9, 3), value, dtype=np.uint8) for value in range(7))
    embed_pictures(clip.model, clip.settings, pictures, batch_size=3)
    handle.remove()
    assert sizes == [3, 3, 1]


def test_the_last_block_can_be_left_out() -> None:
    clip = random_clip(layers=3)
    short = random_clip(layers=3)
    short.model.vision_model.encoder.layers = short.model.vision_model.encoder.layers[:-1]
    image = [np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)]
    skipped = embed_pictures(clip.model, clip.settings, image, skip_last_block=True)
    assert torch.allclose(skipped, embed_pictures(short.model, short.settings, image), atol=1e-6)
    assert not torch.allclose(skipped, embed_pictures(clip.model, clip.settings, image), atol=1e-2)


def test_damaged_weights_are_named() -> None:
    clip = random_clip()
    with torch.no_grad():
        clip.model.visual_projection.weight.fill_(math.nan)
    with pytest.raises(InputError, match="NaN"):
        embed_pictures(clip.model, clip.settings, [np.zeros((9, 9, 3), dtype=np.uint8)])
