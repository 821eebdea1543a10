"""The promptable model: a region's result does not depend on its company, its padding, the back-end or the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskGeneration

from tap_llm import TapCaptionDecoder, TapConfig, TapForConditionalGeneration, TapModel, TapOutput
from tap_llm.tap import modeling_tap
from tap_llm.tap.layers import eager_attention_forward, few_keys_attention, prefers_few_keys
from tap_llm.tap.outputs import route_slots, take_slots
from tap_llm.tap.prompt_encoder import attended_points
from tap_llm.tap.vision_encoder import TapVisionEncoder, relative_position_index

FIELDS = ("pred_masks", "iou_scores", "semantic_tokens", "semantic_embeds", "slots")
SIDE, GRID, WIDTH, CONCEPTS, VOCABULARY = 128, 16, 32, 12, 50
CAPTIONS = torch.tensor([[1, 7, 8, 9, 2], [1, 30, 2, -100, -100], [1, 5, 6, 2, -100]])

# A prompt is a list of (x, y, label).
BOX = [(20, 30, 2), (90, 100, 3)]
POINT = [(40, 50, 1), (0, 0, 4)]
NINE_POINTS = [(10 * i, 120 - 12 * i, i % 2) for i in range(1, 10)] + [(0, 0, 4)]
BOX_AND_POINTS = [(5, 5, 2), (60, 70, 3), (30, 30, 1), (50.5, 20.25, 0)]
MIXED = [BOX, NINE_POINTS, POINT, BOX_AND_POINTS, BOX]
Prompt = list[tuple[float, float, int]]


def small_config(**vision: Any) -> TapConfig:
    return TapConfig.from_variant(
        "tiny",
        vision_config={"image_size": SIDE, "patch_size": 8, "window_size": 4, "hidden_size": 32,
                       "num_attention_heads": 2, "output_channels": WIDTH, **vision},
        prompt_config={"image_size": SIDE, "hidden_size": WIDTH},
        mask_decoder_config={"hidden_size": WIDTH, "num_attention_heads": 2, "mlp_dim": 48, "upscale_dim": 16,
                             "head_hidden_size": 24, "semantic_hidden_size": 40, "semantic_embed_dim": CONCEPTS},
        text_config={"vocab_size": VOCABULARY, "semantic_size": WIDTH, "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 2},
    )  # fmt: skip


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> Any:
    """Give every tensor values that leave nothing the identity: tables and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.ndim == 1:
            value.copy_(float(name.endswith("weight")) + 0.3 * noise)
        elif name.endswith(("rel_pos_bias", "embeddings", "tokens", "token", "coord_matrix", "embed.weight")):
            value.copy_(noise)
        elif value.is_floating_point():
            value.copy_(noise / math.sqrt(value[0].numel()))
    return model.eval()


@pytest.fixture(scope="module")
def shared_model() -> TapForConditionalGeneration:
    """Not to be changed."""
    return randomize(TapForConditionalGeneration(small_config()))


@pytest.fixture
def model(shared_model: TapForConditionalGeneration) -> TapForConditionalGeneration:
    """A copy that the test may change."""
    return deepcopy(shared_model)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def embeddings(shared_model: TapForConditionalGeneration, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return shared_model.get_image_embeddings(pixels)


def rows(*prompts: Prompt) -> dict[str, Tensor]:
    """Prompts as the model's flat rows, equalised with pads."""
    longest = max(map(len, prompts))
    table = torch.tensor([prompt + [(0, 0, 4)] * (longest - len(prompt)) for prompt in prompts])
    return {"input_points": table[..., :2], "input_labels": table[..., 2].long()}


@torch.no_grad()
def run(model: nn.Module, prompts: list[Prompt], index: list[int] | None = None, **inputs: Any) -> TapOutput:
    images = torch.tensor(index) if index is not None else None
    return model(**rows(*prompts), region_image_index=images, **inputs)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


def same(ours: TapOutput, expected: TapOutput, rows: Any = slice(None), tolerance: float = 1e-5) -> None:
    """All that belongs to regions is equal; of `expected`, the given rows."""
    for field in FIELDS:
        close(ours[field], expected[field][rows], tolerance)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def train_step(model: nn.Module, pixels: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss over every output, and the gradients; whatever is random starts from the seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model(
        pixel_values=pixels,
        labels=CAPTIONS,
        region_image_index=torch.tensor([2, 0, 0]),
        **rows(BOX, NINE_POINTS, POINT),
    )
    total = outputs.loss + sum(outputs[field].square().mean() for field in FIELDS[:4])
    total.backward()
    return total.detach(), gradients(model)


# Regions


def test_windows_in_chunks_give_the_same_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = TapVisionEncoder(TapConfig.from_variant("tiny").vision_config).eval()
    pixels = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        whole = encoder(pixels).last_hidden_state
        monkeypatch.setattr("tap_llm.tap.vision_encoder.CPU_CHUNK_BYTES", 3 * 64 * 512 * 4)  # three windows
        calls: list[int] = []
        encoder.layers[0].attention.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
        torch.testing.assert_close(encoder(pixels).last_hidden_state, whole, rtol=0, atol=1e-5)
    assert calls == [3, 3, 2]


def test_shapes(shared_model: TapForConditionalGeneration, pixels: Tensor) -> None:
    outputs = run(shared_model, MIXED, [0, 0, 1, 1, 2], pixel_values=pixels)
    shapes = {key: tuple(value.shape) for key, value in outputs.items()}
    assert shapes == {
        "pred_masks": (5, 4, 4 * GRID, 4 * GRID),
        "iou_scores": (5, 4),
        "semantic_tokens": (5, 4, WIDTH),
        "semantic_embeds": (5, 4, CONCEPTS),
        "slots": (5,),
        "image_embeddings": (3, WIDTH, GRID, GRID),
    }


def test_a_region_does_not_depend_on_its_company(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    index = [2, 0, 1, 0, 1]
    together = run(shared_model, MIXED, index, image_embeddings=embeddings)
    for row, (prompt, image) in enumerate(zip(MIXED, index, strict=True)):
        alone = run(shared_model, [prompt], image_embeddings=embeddings[image : image + 1])
        same(alone, together, slice(row, row + 1))


def test_images_with_two_none_and_three_regions(shared_model: TapForConditionalGeneration, pixels: Tensor) -> None:
    together = run(shared_model, MIXED, [0, 0, 2, 2, 2], pixel_values=pixels)
    same(run(shared_model, MIXED[:2], pixel_values=pixels[:1]), together, slice(0, 2))
    same(run(shared_model, MIXED[2:], pixel_values=pixels[2:]), together, slice(2, 5))


def test_index_may_be_left_out(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    one_each = run(shared_model, MIXED[:3], image_embeddings=embeddings)
    same(one_each, run(shared_model, MIXED[:3], [0, 1, 2], image_embeddings=embeddings))
    one_image = run(shared_model, MIXED, image_embeddings=embeddings[1:2])
    same(one_image, run(shared_model, MIXED, [1] * 5, image_embeddings=embeddings))
    with pytest.raises(ValueError, match="5 regions on 3 images.*region_image_index"):
        run(shared_model, MIXED, image_embeddings=embeddings)


def test_rows_that_do_not_fit_together(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    prompts = rows(*MIXED)
    with pytest.raises(ValueError, match="region_image_index must be"):
        run(shared_model, MIXED, [0, 1], image_embeddings=embeddings)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"region_image_index holds {wrong}, but there are 3 images"):
            run(shared_model, MIXED, [0, 1, 2, wrong, 0], image_embeddings=embeddings)
    with pytest.raises(ValueError, match="input_points must be"):
        shared_model(
            image_embeddings=embeddings, input_points=prompts["input_points"][:2], input_labels=prompts["input_labels"]
        )
    with pytest.raises(ValueError, match="call the processor with regions"):
        shared_model(image_embeddings=embeddings)


def test_embeddings_in_place_of_pixels(
    shared_model: TapForConditionalGeneration, pixels: Tensor, embeddings: Tensor
) -> None:
    from_pixels = run(shared_model, MIXED[:3], pixel_values=pixels)
    close(from_pixels.image_embeddings, embeddings)
    same(run(shared_model, MIXED[:3], image_embeddings=embeddings), from_pixels)
    for inputs in ({}, {"pixel_values": pixels, "image_embeddings": embeddings}):
        with pytest.raises(ValueError, match="exactly one of pixel_values and image_embeddings"):
            run(shared_model, MIXED[:3], **inputs)


def test_plain_tuples(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    named = run(shared_model, MIXED[:3], image_embeddings=embeddings)
    plain: Any = run(shared_model, MIXED[:3], image_embeddings=embeddings, return_dict=False)
    assert isinstance(plain, tuple)
    assert all(torch.equal(a, b) for a, b in zip(plain, named.to_tuple(), strict=True))


def test_canvas_of_another_size(shared_model: TapForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 128, 128\), got \(1, 3, 64, 64\)"):
        shared_model.get_image_embeddings(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(("rows_at_a_time", "calls"), [(1, 5), (2, 3), (100, 1)])
def test_decoding_in_chunks(
    model: TapForConditionalGeneration,
    embeddings: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    rows_at_a_time: int,
    calls: int,
) -> None:
    index = [2, 1, 0, 0, 2]
    with_gradients = {"region_image_index": torch.tensor(index), **rows(*MIXED)}
    expected = model(image_embeddings=embeddings, **with_gradients)  # in one pass
    bytes_per_row = WIDTH * GRID * GRID * 4
    monkeypatch.setattr(modeling_tap, "CPU_CHUNK_BYTES", rows_at_a_time * bytes_per_row)
    passes: list[int] = []
    model.model.mask_decoder.register_forward_hook(lambda *_: passes.append(1))
    same(run(model, MIXED, index, image_embeddings=embeddings), expected)
    assert len(passes) == calls
    model(image_embeddings=embeddings, **with_gradients)
    assert len(passes) == calls + 1


def test_no_regions(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    none = {"input_points": torch.zeros(0, 2, 2), "input_labels": torch.zeros(0, 2, dtype=torch.long)}
    for index in (None, torch.zeros(0, dtype=torch.long)):
        with torch.no_grad():
            images = embeddings if index is not None else embeddings[:1]
            outputs = shared_model(image_embeddings=images, region_image_index=index, **none)
        assert outputs.pred_masks.shape == (0, 4, 4 * GRID, 4 * GRID)
        assert outputs.semantic_embeds.shape == (0, 4, CONCEPTS)
        assert outputs.slots.shape == (0,)


def test_three_hundred_regions(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [[(float(x), float(y), 1), (0, 0, 4)] for x, y in torch.rand(300, 2, generator=generator) * SIDE]
    many = run(shared_model, prompts, image_embeddings=embeddings[:1])
    assert many.pred_masks.shape[0] == 300
    for row in (0, 150, 299):
        same(run(shared_model, [prompts[row]], image_embeddings=embeddings[:1]), many, slice(row, row + 1))


# Pads


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 4], [1, 1]),
        ([1, 4, 4], [1, 1, 0]),
        ([1, 0, 1], [1, 1, 1]),
        ([4, 4], [1, 0]),
        ([2, 3], [1, 1]),
        ([2, 3, 4, 4], [1, 1, 0, 0]),
        ([2, 3, 1, 4], [1, 1, 1, 0]),
        ([4, 1, 4], [1, 1, 0]),
    ],
)
def test_which_pads_are_real(labels: list[int], expected: list[int]) -> None:
    assert attended_points(torch.tensor([labels])).int().tolist() == [expected]


@pytest.mark.parametrize("prompt", [BOX, POINT, BOX_AND_POINTS], ids=["box", "point", "box_and_points"])
def test_mere_padding_changes_nothing(
    shared_model: TapForConditionalGeneration, embeddings: Tensor, prompt: Prompt
) -> None:
    plain = run(shared_model, [prompt], image_embeddings=embeddings[:1])
    padded = run(shared_model, [prompt + [(70, 9, 4)] * 3], image_embeddings=embeddings[:1])
    same(padded, plain)


def test_the_first_pad_without_a_box_is_a_token(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    without = run(shared_model, [POINT[:1]], image_embeddings=embeddings[:1])
    with_pad = run(shared_model, [POINT], image_embeddings=embeddings[:1])
    assert (with_pad.pred_masks - without.pred_masks).abs().max() > 0.01
    elsewhere = run(shared_model, [[POINT[0], (99, 3, 4)]], image_embeddings=embeddings[:1])
    same(elsewhere, with_pad)  # where a pad lies never matters


def test_coordinates_are_clipped_to_the_canvas(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    outside = run(shared_model, [[(-40, 500, 1), (0, 0, 4)]], image_embeddings=embeddings[:1])
    same(outside, run(shared_model, [[(-0.5, SIDE - 0.5, 1), (0, 0, 4)]], image_embeddings=embeddings[:1]))


# Slots


def test_slot_routing() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.3, 0.2]]).repeat(5, 1)
    scores[2] = torch.tensor([0.1, 0.2, 0.3, 0.9])
    labels = torch.tensor([[2, 3, 4], [1, 4, 4], [2, 3, 1], [0, 1, 4], [4, 4, 4]])
    assert route_slots(scores, labels).tolist() == [0, 2, 0, 2, 2]


def test_slots_follow_the_scores(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    outputs = run(shared_model, MIXED, image_embeddings=embeddings[:1])
    best = 1 + outputs.iou_scores[:, 1:].argmax(-1)
    assert outputs.slots.tolist() == [0, best[1], best[2], 0, 0]
    routed = take_slots(outputs.semantic_tokens, outputs.slots)
    assert torch.equal(routed[2], outputs.semantic_tokens[2, best[2]])


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


# Saving and loading


@pytest.mark.parametrize("part", ["TapForConditionalGeneration", "TapModel"])
def test_save_and_load(shared_model: TapForConditionalGeneration, pixels: Tensor, tmp_path: Path, part: str) -> None:
    original = shared_model if part == "TapForConditionalGeneration" else shared_model.model
    original.save_pretrained(tmp_path)
    restored, report = type(original).from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert load_file(tmp_path / "model.safetensors").keys() == original.state_dict().keys()
    for name, value in original.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    same(run(restored, MIXED[:3], pixel_values=pixels), run(original, MIXED[:3], pixel_values=pixels))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskGeneration])
@pytest.mark.parametrize("saved", ["base", "with captions"])
def test_auto_classes_give_the_promptable_model(
    shared_model: TapForConditionalGeneration, tmp_path: Path, auto_class: Any, saved: str
) -> None:
    (shared_model if saved == "with captions" else shared_model.model).save_pretrained(tmp_path)
    restored, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(restored) is TapModel
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in shared_model.model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name


def test_the_caption_decoder_is_a_causal_language_model(
    shared_model: TapForConditionalGeneration, tmp_path: Path
) -> None:
    shared_model.caption_decoder.save_pretrained(tmp_path)
    restored = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(restored) is TapCaptionDecoder
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        close(restored(ids).logits, shared_model.caption_decoder(ids).logits)


def test_captions_on_top_of_a_base_checkpoint(shared_model: TapForConditionalGeneration, tmp_path: Path) -> None:
    shared_model.model.save_pretrained(tmp_path)
    restored, report = TapForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("caption_decoder.") for name in report["missing_keys"])
    assert torch.equal(restored.model.mask_decoder.mask_tokens, shared_model.model.mask_decoder.mask_tokens)


# Training


def caption_outputs(
    model: TapForConditionalGeneration, embeddings: Tensor, labels: Tensor, **options: Any
) -> TapOutput:
    return model(image_embeddings=embeddings, labels=labels, **rows(BOX, NINE_POINTS, POINT), **options)


def test_caption_loss(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    with torch.no_grad():
        outputs = caption_outputs(shared_model, embeddings, CAPTIONS)
        plain = run(shared_model, [BOX, NINE_POINTS, POINT], image_embeddings=embeddings)
    same(outputs, plain)
    assert plain.loss is None and plain.logits is None
    assert outputs.logits.shape == (3, 5, VOCABULARY)  # text positions: not that of the semantic token
    terms = [
        -outputs.logits[row, step].log_softmax(-1)[CAPTIONS[row, step + 1]]
        for row in range(3)
        for step in range(4)
        if CAPTIONS[row, step + 1] != -100
    ]
    assert len(terms) == 9
    close(outputs.loss, torch.stack(terms).mean())
    with torch.no_grad():
        scaled = caption_outputs(shared_model, embeddings, CAPTIONS, num_items_in_batch=torch.tensor(36))
    close(scaled.loss, torch.stack(terms).sum() / 36)


def test_caption_logits_belong_to_the_routed_token(
    shared_model: TapForConditionalGeneration, embeddings: Tensor
) -> None:
    with torch.no_grad():
        outputs = caption_outputs(shared_model, embeddings, CAPTIONS)
        routed = take_slots(outputs.semantic_tokens, outputs.slots)
        for row, length in enumerate((5, 3, 4)):
            ids = torch.cat([torch.tensor([0]), CAPTIONS[row, :length]])[None]
            expected = shared_model.caption_decoder(ids, semantic_tokens=routed[row : row + 1]).logits[0, 1:]
            close(outputs.logits[row, :length], expected)


def test_ignored_labels_do_not_count(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    wider = nn.functional.pad(CAPTIONS, (0, 6), value=-100)
    first_only = CAPTIONS.clone()
    first_only[1:, 1:] = -100
    with torch.no_grad():
        loss = caption_outputs(shared_model, embeddings, CAPTIONS).loss
        close(caption_outputs(shared_model, embeddings, wider).loss, loss)
        alone = shared_model(image_embeddings=embeddings[:1], labels=CAPTIONS[:1], **rows(BOX)).loss
        close(caption_outputs(shared_model, embeddings, first_only).loss, alone)


def test_no_captions_cost_nothing(shared_model: TapForConditionalGeneration, embeddings: Tensor) -> None:
    none = {"input_points": torch.zeros(0, 2, 2), "input_labels": torch.zeros(0, 2, dtype=torch.long)}
    labels = torch.zeros(0, 5, dtype=torch.long)
    with torch.no_grad():
        outputs = shared_model(image_embeddings=embeddings[:1], labels=labels, **none)
    assert outputs.loss == 0
    assert outputs.logits.shape == (0, 5, VOCABULARY)


def test_the_caption_loss_reaches_every_part(model: TapForConditionalGeneration, pixels: Tensor) -> None:
    model(pixel_values=pixels, labels=CAPTIONS, **rows(BOX, NINE_POINTS, POINT)).loss.backward()
    reached = gradients(model)
    for name in ("model.vision_encoder.patch_embeddings.projection.weight", "model.vision_encoder.position_embeddings",
                 "model.vision_encoder.layers.0.attention.rel_pos_bias", "model.prompt_encoder.point_embed.weight",
                 "model.mask_decoder.semantic_tokens", "caption_decoder.semantic_projection.weight",
                 "caption_decoder.model.embed_tokens.weight", "caption_decoder.lm_head.weight"):  # fmt: skip
        assert reached[name].abs().max() > 0, name
    assert "model.mask_decoder.iou_head.layers.0.weight" not in reached  # routing is no path for gradients


def test_frozen_tap_trains_the_caption_decoder_only(model: TapForConditionalGeneration, pixels: Tensor) -> None:
    model.model.requires_grad_(False)
    model(pixel_values=pixels, labels=CAPTIONS, **rows(BOX, NINE_POINTS, POINT)).loss.backward()
    expected = {name for name, _ in model.named_parameters() if name.startswith("caption_decoder.")}
    assert gradients(model).keys() == expected


def test_gradient_checkpointing(pixels: Tensor) -> None:
    model = randomize(TapForConditionalGeneration(small_config(drop_path_rate=0.3))).train()
    loss, grads = train_step(model, pixels)  # dropout and drop path are on
    other_loss, _ = train_step(model, pixels, seed=1)
    assert other_loss != loss
    model.activation_checkpointing_enable()
    layers = (
        model.model.vision_encoder.layers[0],
        model.model.mask_decoder.layers[1],
        model.caption_decoder.model.layers[0],
    )
    runs = dict.fromkeys(layers, 0)
    for layer in layers:
        layer.layer_norm1.register_forward_hook(lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1))
    checkpointed_loss, checkpointed_grads = train_step(model, pixels)
    assert list(runs.values()) == [2, 2, 2]  # once forward, once again in the backward pass
    close(checkpointed_loss, loss)
    assert checkpointed_grads.keys() == grads.keys()
    for name, grad in grads.items():
        close(checkpointed_grads[name], grad)


def test_drop_path_drops_whole_images_in_training_only(pixels: Tensor) -> None:
    encoder = randomize(TapForConditionalGeneration(small_config(drop_path_rate=0.8))).model.vision_encoder
    images, windows = 40, 16
    hidden = torch.randn(images * windows, 16, 32, generator=torch.Generator().manual_seed(0))

    def unchanged(layer: nn.Module) -> Tensor:
        """(images, windows) bool."""
        torch.manual_seed(0)
        with torch.no_grad():
            result = layer(hidden, relative_position_index(4))
        return (result == hidden).flatten(1).all(1).view(images, windows)

    first, last = encoder.layers[0], encoder.layers[-1]
    assert not unchanged(last).any()
    encoder.train()
    dropped = unchanged(last)
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert 15 <= int(dropped[:, 0].sum()) < 40  # both branches: 0.8 * 0.8 of 40 images
    assert not unchanged(first).any()  # the rate grows from 0


def test_drop_path_keeps_the_mean() -> None:
    encoder = TapForConditionalGeneration(small_config(drop_path_rate=0.5)).model.vision_encoder.train()
    layer = encoder.layers[-1]
    torch.nn.init.zeros_(layer.attention.proj.weight)
    torch.nn.init.zeros_(layer.attention.proj.bias)
    torch.nn.init.zeros_(layer.mlp.fc2.weight)
    torch.nn.init.ones_(layer.mlp.fc2.bias)
    torch.manual_seed(0)
    with torch.no_grad():
        branch = layer(torch.zeros(2000 * 16, 16, 32)[:, :1], torch.zeros(1, 1, dtype=torch.long))
    assert set(branch.unique().tolist()) == {0.0, 2.0}
    assert branch.mean() == pytest.approx(1, abs=0.1)
