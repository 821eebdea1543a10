"""The promptable model in other ways to compute it: back-ends, number formats, folded BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_tap import (
    FIELDS,
    GRID,
    MIXED,
    close,
    randomize,
    rows,
    run,
    same,
    small_config,
    train_step,
)
from torch import Tensor, nn

from tap_llm import TapConfig, TapForConditionalGeneration, TapModel
from tap_llm.tap.layers import eager_attention_forward, few_keys_attention, prefers_few_keys

# Back-ends


def test_eager_equals_sdpa(model: TapForConditionalGeneration, pixels: Tensor) -> None:
    parts = (model.model.vision_encoder, model.model.mask_decoder, model.caption_decoder)
    results = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert {part.config._attn_implementation for part in parts} == {implementation}
        results[implementation] = train_step(model, pixels)
    (loss, grads), (eager_loss, eager_grads) = results["sdpa"], results["eager"]
    close(loss, eager_loss)
    assert grads.keys() == eager_grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, eager_grads[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_attentions_and_hidden_states_on_request(model: TapForConditionalGeneration, pixels: Tensor) -> None:
    model.set_attn_implementation("eager")
    wanted = {"output_attentions": True, "output_hidden_states": True}
    outputs = run(model, MIXED[:3], pixel_values=pixels, **wanted)
    assert [weights.shape for weights in outputs.vision_attentions] == [(3 * 16, 2, 16, 16)] * 4
    assert len(outputs.vision_hidden_states) == 5
    assert len(outputs.mask_decoder_attentions) == 7  # three in each of two blocks, and the last one
    same(run(model, MIXED[:3], pixel_values=pixels), outputs)


def test_attention_with_few_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator) for length in (200, 12, 12))
    assert prefers_few_keys(query, key)
    assert not prefers_few_keys(query[:, :, :50], key)
    mask = torch.zeros(2, 1, 1, 12).masked_fill(torch.arange(12) >= torch.tensor([[[[12]]], [[[9]]]]), -1e30)
    arguments = (nn.Identity(), query, key, value, mask)
    expected, weights = eager_attention_forward(*arguments, scaling=0.3)
    close(few_keys_attention(*arguments, scaling=0.3)[0], expected)
    assert weights[1, :, :, 9:].max() == 0


@pytest.mark.slow
def test_flex_attention_in_the_image_encoder(
    model: TapForConditionalGeneration, pixels: Tensor, embeddings: Tensor
) -> None:
    encoder = model.model.vision_encoder
    encoder.set_attn_implementation("flex_attention")
    with torch.no_grad():
        close(encoder(pixels).last_hidden_state, embeddings)


def check_compiled(config: TapConfig, parts: list[str], backend: str, pixels: Tensor, tolerance: float) -> None:
    """Compiled parts do what they did; a graph break is an error."""
    model = randomize(TapModel(config))
    expected = run(model, MIXED[:3], pixel_values=pixels)
    torch.compiler.reset()
    for part in parts:
        model.get_submodule(part).compile(fullgraph=True, backend=backend)
    compiled = run(model, MIXED[:3], pixel_values=pixels)
    close(compiled.image_embeddings, expected.image_embeddings, tolerance)
    same(compiled, expected, tolerance=tolerance)


def test_compiled_without_graph_breaks(pixels: Tensor) -> None:
    check_compiled(small_config(), ["vision_encoder", "mask_decoder"], "eager", pixels, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vision_encoder", "mask_decoder"])
def test_compiled_by_inductor(pixels: Tensor, part: str) -> None:
    check_compiled(small_config(num_hidden_layers=1, num_bottlenecks=1), [part], "inductor", pixels, 1e-4)


# Number formats


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half()": lambda model: model.half(),
    "bfloat16()": lambda model: model.bfloat16(),
    "to(float16)": lambda model: model.to(torch.float16),
    "to(bfloat16)": lambda model: model.to(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_half_precision(
    shared_model: TapForConditionalGeneration, model: TapForConditionalGeneration, pixels: Tensor, cast: str
) -> None:
    half = CASTS[cast](model)
    dtype = next(half.parameters()).dtype
    assert dtype in (torch.float16, torch.bfloat16)
    frequencies = half.model.prompt_encoder.coord_matrix
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, shared_model.model.prompt_encoder.coord_matrix)
    outputs, expected = (run(m, MIXED[:3], pixel_values=pixels) for m in (half, shared_model))
    assert (outputs.pred_masks.dtype, outputs.semantic_tokens.dtype) == (dtype, dtype)
    assert outputs.iou_scores.dtype == torch.float32
    for field in FIELDS[:4]:
        error = (outputs[field].float() - expected[field]).norm() / expected[field].norm()
        assert error < (0.01 if dtype == torch.float16 else 0.1), field
    assert half.generate(pixel_values=pixels, **rows(*MIXED[:3]), max_new_tokens=3).shape == (3, 4)


def test_autocast_leaves_positions_exact(shared_model: TapForConditionalGeneration) -> None:
    encoder = shared_model.model.prompt_encoder
    with torch.no_grad():
        prompts, grid = encoder(**rows(*MIXED)), encoder.grid_encoding(GRID)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder(**rows(*MIXED)), prompts)
            assert torch.equal(encoder.grid_encoding(GRID), grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loading_in_half_precision(
    shared_model: TapForConditionalGeneration, tmp_path: Path, dtype: torch.dtype
) -> None:
    shared_model.save_pretrained(tmp_path / "full")
    half = TapForConditionalGeneration.from_pretrained(tmp_path / "full", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    for model in (half, TapForConditionalGeneration.from_pretrained(tmp_path / "half")):
        assert model.caption_decoder.lm_head.weight.dtype == dtype
        frequencies = model.model.prompt_encoder.coord_matrix
        assert torch.equal(frequencies, shared_model.model.prompt_encoder.coord_matrix)


# Folded BatchNorm


def test_folding_batch_norm(
    shared_model: TapForConditionalGeneration, model: TapForConditionalGeneration, pixels: Tensor
) -> None:
    expected = run(shared_model, MIXED[:3], pixel_values=pixels)
    assert model.train().fold_batch_norm() is model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    folded = run(model, MIXED[:3], pixel_values=pixels)
    close(folded.image_embeddings, expected.image_embeddings)
    same(folded, expected)
    same(run(model.fold_batch_norm(), MIXED[:3], pixel_values=pixels), folded, tolerance=0)


def test_a_folded_model_is_for_inference_only(model: TapForConditionalGeneration, tmp_path: Path) -> None:
    model.fold_batch_norm().eval()
    with pytest.raises(RuntimeError, match="folded.*load the model again to train"):
        model.train()
    for part in (model, model.model, model.model.vision_encoder):
        with pytest.raises(ValueError, match="folded for inference: load .* again to save"):
            part.save_pretrained(tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
