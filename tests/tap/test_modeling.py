"""The promptable model: a region's result does not depend on its company or its padding, nor on being stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_tap import (
    BOX,
    BOX_AND_POINTS,
    CONCEPTS,
    GRID,
    MIXED,
    POINT,
    SIDE,
    WIDTH,
    Prompt,
    close,
    rows,
    run,
    same,
)
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskGeneration

from tap_llm import TapCaptionDecoder, TapConfig, TapForConditionalGeneration, TapModel
from tap_llm.tap import modeling_tap
from tap_llm.tap.outputs import route_slots, take_slots
from tap_llm.tap.prompt_encoder import attended_points
from tap_llm.tap.vision_encoder import TapVisionEncoder

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
