"""Grad-CAM: the scale-free form, batches, hooks and gradients that nobody asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_clip import SIDE, random_clip
from torch.nn.functional import normalize

from tap_llm.clip_as_rnn import CarConfig, Compat
from tap_llm.clip_as_rnn.affinity import min_max
from tap_llm.clip_as_rnn.cam import PatchFeatures, encode_patches, patch_pixels, resized_positions
from tap_llm.clip_as_rnn.loading import eager_float32
from tap_llm.clip_as_rnn.proposals import propose_masks, text_directions
from tap_llm.data.crops import CropSettings

SCALE = 10.0
EXACT = CarConfig(compat=Compat(probability_target=True))


@pytest.fixture(scope="module")
def model() -> Any:
    return eager_float32(random_clip().model).requires_grad_(False)


@pytest.fixture
def features(model: Any) -> PatchFeatures:
    return encode_patches(model, pixels(40, 24))


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))


def texts(count: int, seed: int = 5) -> torch.Tensor:
    return normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def scaled(features: PatchFeatures, directions: torch.Tensor) -> torch.Tensor:
    return min_max(features.cams(directions).flatten(1))


def test_shapes(features: PatchFeatures) -> None:
    assert features.grid == (5, 3)
    assert features.patches.shape == (15, 16)
    assert features.affinity.shape == (15, 15)
    assert features.embedding.norm() == pytest.approx(1, abs=1e-6)
    assert features.cams(texts(4)).shape == (4, 5, 3)


def test_scale_free_form_equals_the_gradient_of_the_probability(features: PatchFeatures) -> None:
    queries, background = texts(4), texts(3, 6)
    free = text_directions(features.embedding, queries, background, SCALE, CarConfig())
    exact = text_directions(features.embedding, queries, background, SCALE, EXACT)
    assert (scaled(features, free) - scaled(features, exact)).abs().max() < 2e-6


def test_directions_are_the_true_gradient(features: PatchFeatures) -> None:
    """Against autograd of the softmax itself."""
    queries, background = texts(4), texts(3, 6)
    score = features._score
    probabilities = (SCALE * torch.cat([queries, background]) @ score).softmax(dim=0)
    for index in range(4):
        (gradient,) = torch.autograd.grad(probabilities[index], features._layer, retain_graph=True)
        expected = gradient[0, 1:].mean(dim=0)
        exact = text_directions(features.embedding, queries, background, SCALE, EXACT)
        assert torch.allclose(features.channel_weights(exact)[index], expected, rtol=1e-4, atol=1e-8)


def test_gradients_of_all_probabilities_sum_to_zero(features: PatchFeatures) -> None:
    exact = text_directions(features.embedding, texts(6), texts(0), SCALE, EXACT)
    assert exact.sum(dim=0).abs().max() < 1e-6
    assert features.channel_weights(exact).sum(dim=0).abs().max() < 1e-7


def test_a_single_text_has_no_gradient_of_probability_but_a_logit(features: PatchFeatures) -> None:
    alone = texts(1)
    assert not text_directions(features.embedding, alone, texts(0), SCALE, EXACT).abs().max() > 1e-6
    assert torch.equal(text_directions(features.embedding, alone, texts(0), SCALE, CarConfig()), alone)


def test_referring_texts_do_not_compete(features: PatchFeatures) -> None:
    config = CarConfig(mode="referring")
    queries, background = texts(4), texts(3, 6)
    together = text_directions(features.embedding, queries, background, SCALE, config)
    for index in range(4):
        alone = text_directions(features.embedding, queries[index : index + 1], background, SCALE, CarConfig())
        assert torch.allclose(together[index], alone[0], atol=1e-6)


def test_batched_gradients_equal_the_loop(model: Any) -> None:
    directions = texts(7)
    one, several = (encode_patches(model, pixels(40, 24), batch).channel_weights(directions) for batch in (1, 3))
    assert torch.allclose(one, several, rtol=1e-6, atol=1e-9)


def test_many_texts_share_one_jacobian(model: Any) -> None:
    features = encode_patches(model, pixels(40, 24))
    few = features.channel_weights(texts(8))
    assert features._jacobian is None
    many = features.channel_weights(texts(40))
    assert features._jacobian is not None and features._jacobian.shape == (16, 16)
    assert torch.allclose(features.channel_weights(texts(8)), few, rtol=1e-4, atol=1e-8)
    assert many.shape == (40, 16)


def test_dead_maps_are_asked_again_without_background(features: PatchFeatures) -> None:
    """A background of the query itself leaves nothing to differentiate: p_c = p_b, and t_c minus the mean is zero."""
    query = texts(1)
    maps = propose_masks(features, query, query, SCALE, CarConfig())
    plain = propose_masks(features, query, query[:0], SCALE, CarConfig())
    assert plain.any()
    assert torch.equal(maps, plain)


def test_plain_grad_cam_neither_competes_nor_spreads(features: PatchFeatures) -> None:
    config = CarConfig(cam="grad_cam")
    maps = propose_masks(features, texts(3), texts(3, 6), SCALE, config)
    assert torch.allclose(maps.flatten(1), scaled(features, texts(3)))


def test_last_block_agrees_with_the_model_itself(model: Any) -> None:
    """At the model's own size: same patches as a full forward pass."""
    image = pixels(SIDE, SIDE)
    features = encode_patches(model, image)
    with torch.no_grad():
        hidden = model.vision_model(image).last_hidden_state
        pooled = model.vision_model.post_layernorm(hidden)[0, 1:].mean(dim=0)
        expected = normalize(model.visual_projection(pooled), dim=-1)
    assert torch.allclose(features.embedding, expected, atol=1e-5)


def test_no_hook_and_no_gradient_is_left(model: Any) -> None:
    features = encode_patches(model, pixels(16, 24))
    features.cams(texts(3))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_go_even_after_an_error(model: Any) -> None:
    with pytest.raises(RuntimeError):
        encode_patches(model, torch.zeros(1, 5, 16, 16))  # five colour channels
    with pytest.raises(RuntimeError):
        encode_patches(model.double(), pixels(16, 16))
    model.float()
    assert not any(module._forward_hooks for module in model.modules())


def test_works_without_gradients(model: Any) -> None:
    with torch.no_grad():
        features = encode_patches(model, pixels(16, 24))
        assert features.cams(texts(3)).any()


def test_eager_copy_shares_float32_weights_and_leaves_others_alone() -> None:
    source = random_clip().model
    source.set_attn_implementation("sdpa")
    twin = eager_float32(source)
    assert twin.config._attn_implementation == "eager" and source.config._attn_implementation == "sdpa"
    assert twin.logit_scale is source.logit_scale
    half = random_clip().model.half()
    wide = eager_float32(half)
    assert half.dtype == torch.float16 and wide.dtype == torch.float32


def test_positions_keep_cls_and_are_bilinear() -> None:
    table = torch.randn(17, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized_positions(table, (4, 4)), table)
    resized = resized_positions(table, (5, 8))
    assert resized.shape == (41, 6) and torch.equal(resized[0], table[0])
    # Twice as wide: columns 1 and 2 lie at a quarter and three quarters between the old 0 and 1.
    row = resized_positions(table, (4, 8))[1:9]
    assert torch.allclose(row[1], 0.75 * table[1] + 0.25 * table[2], atol=1e-6)


@pytest.mark.parametrize(
    ("size", "patch", "limit", "expected"),
    [
        ((375, 500), 16, 800, (384, 512)),
        ((375, 500), 14, 800, (378, 504)),
        ((16, 16), 16, 800, (16, 16)),
        ((1, 3), 16, 800, (16, 16)),
        ((600, 1000), 16, 800, (480, 800)),
        ((2, 1000), 16, 100, (16, 112)),
    ],
)
def test_what_f_sees(size: tuple[int, int], patch: int, limit: int, expected: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), dtype=np.uint8)
    assert patch_pixels(image, patch, limit, CropSettings()).shape == (1, 3, *expected)
