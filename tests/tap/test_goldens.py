"""Every stored stage of the reference implementation, within 1e-4; captions token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from tap_llm import ConceptSpace, TapForConditionalGeneration, TapProcessor
from tap_llm.tap.caption_decoder import rotary_angles
from tap_llm.tap.image_processing_tap import resize_factor, resized_size
from tap_llm.tap.outputs import take_slots
from tap_llm.tap.vision_encoder import relative_position_index, window_partition

CASES = [
    "point_fg", "point_fg_nopad", "point_fg_bg_pad", "box", "box_via_boxes", "boxes_and_points", "sketch", "multi",
    "ensemble", "edge", "pad_only", "batch2", "batch2_single",
]  # fmt: skip
# Prompts that a user can give, as regions in pixels of the photo (the others are for the model alone).
AS_REGIONS: dict[str, list[list[dict[str, Any]]]] = {
    "point_fg": [[{"points": [[60, 40]]}]],
    "point_fg_bg_pad": [[{"points": [[60, 40], [110, 70]], "labels": [1, 0]}]],
    "box": [[{"box": [20, 15, 100, 80]}]],
    "box_via_boxes": [[{"box": [20, 15, 100, 80]}, {"box": [5, 30, 60, 90]}]],
    "boxes_and_points": [[{"box": [20, 15, 100, 80], "points": [[60, 40], [30, 70]], "labels": [1, 0]}]],
    "ensemble": [[{"box": [25, 40, 105, 160], "points": [[60, 100], [80, 120], [30, 50]], "labels": [1, 1, 0]}]],
    "batch2_single": [[{"points": [[75, 48]]}], [{"box": [20, 40, 90, 170]}]],
}


@pytest.fixture(scope="module")
def model(golden_folder: Path) -> TapForConditionalGeneration:
    return TapForConditionalGeneration.from_pretrained(golden_folder).eval()


@pytest.fixture(scope="module")
def processor(golden_folder: Path) -> TapProcessor:
    return TapProcessor.from_pretrained(golden_folder)


@pytest.fixture(scope="module")
def arrays(golden_data: Path) -> dict[str, Any]:
    return {name: np.load(golden_data / f"{name}.npz") for name in ("images", "encoder", "cases", "text")}


@pytest.fixture(scope="module")
def strings(golden_data: Path) -> dict[str, Any]:
    return json.loads((golden_data / "strings.json").read_text())


def close(ours: Tensor | np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


def until_eos(ids: np.ndarray) -> list[list[int]]:
    rows = [row.tolist() for row in ids]
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


def record(modules: dict[str, torch.nn.Module]) -> dict[str, Any]:
    """Outputs of the named modules, once they have run."""
    outputs: dict[str, Any] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _i, output, name=name: outputs.__setitem__(name, output))
    return outputs


def prompt_tensors(cases: Any, case: str) -> tuple[Tensor, Tensor]:
    rows = []
    if f"{case}.boxes_scaled" in cases:
        corners = cases[f"{case}.boxes_scaled"].reshape(-1, 2, 2)
        labels = np.broadcast_to(np.array([[2], [3]]), (len(corners), 2, 1))
        rows.append(np.concatenate([corners, labels], axis=2))
    if f"{case}.points_scaled" in cases:
        rows.append(cases[f"{case}.points_scaled"])
    joined = torch.from_numpy(np.concatenate(rows, axis=1).astype(np.float32))
    return joined[..., :2], joined[..., 2].long()


def run_case(model: TapForConditionalGeneration, arrays: dict, strings: dict, case: str) -> Any:
    pictures = strings["cases"][case]["images"]
    points, labels = prompt_tensors(arrays["cases"], case)
    index = torch.arange(len(pictures)).repeat_interleave(len(points) // len(pictures))
    embeddings = torch.from_numpy(arrays["encoder"]["features"][pictures])
    with torch.no_grad():
        return model(image_embeddings=embeddings, input_points=points, input_labels=labels, region_image_index=index)


def test_preprocessing(processor: TapProcessor, arrays: dict, strings: dict) -> None:
    images = arrays["images"]
    pictures = [images["image0_rgb"], images["image1_rgb"]]
    features = processor(pictures)
    assert features["original_sizes"].tolist() == [[96, 150], [200, 130]]
    assert features["resized_sizes"].tolist() == [[82, 128], [128, 83]]
    close(features["pixel_values"].flip(1), images["network_input"], 1e-5)
    channels_first = images["image2_rgb"].transpose(2, 0, 1)
    small = processor.image_processor.resize(channels_first, SizeDict(longest_edge=128))
    assert (small.transpose(1, 2, 0)[..., ::-1] == images["image2_resized_bgr"]).all()
    for row in strings["resize_rule"]:
        if not row["larger_than_target"]:
            size = resized_size(row["height"], row["width"], row["target"])
            assert size == (row["out_height"], row["out_width"])
            assert resize_factor(row["height"], row["width"], row["target"]) == pytest.approx(row["scale"], rel=1e-6)


def test_image_encoder_stages(golden_folder: Path, arrays: dict) -> None:
    encoder = TapForConditionalGeneration.from_pretrained(golden_folder).eval().model.vision_encoder
    modules = {"patch_embed": encoder.patch_embeddings, "norm": encoder.layer_norm,
               "block0_attn": encoder.layers[0].attention, "neck_lateral": encoder.neck.norm1}  # fmt: skip
    modules |= {f"block{i}": layer for i, layer in enumerate(encoder.layers)}
    modules |= {f"cross_conv{i}": bottleneck for i, bottleneck in enumerate(encoder.bottlenecks)}
    outputs = record(modules)
    expected = arrays["encoder"]
    with torch.no_grad():
        features = encoder(torch.from_numpy(arrays["images"]["network_input"]).flip(1)).last_hidden_state
    placed = outputs["patch_embed"] + encoder.position_embeddings.view(8, 8, -1)
    close(outputs["patch_embed"].flatten(1, 2), expected["patch_embed"])
    close(placed.flatten(1, 2), expected["pos_embed"])
    close(window_partition(placed, 4), expected["windows"])
    bias = encoder.layers[0].attention.rel_pos_bias[:, relative_position_index(4)]
    close(bias, expected["rel_pos_bias_block0"])
    close(outputs["block0_attn"][0], expected["block0_attn"])
    for name in outputs.keys() - {"patch_embed", "block0_attn"}:
        close(outputs[name], expected[name])
    close(features, expected["features"])


@pytest.mark.parametrize("case", CASES)
def test_region_decoder(model: TapForConditionalGeneration, arrays: dict, strings: dict, case: str) -> None:
    def expected(field: str) -> np.ndarray:
        return arrays["cases"][f"{case}.{field}"]

    outputs = run_case(model, arrays, strings, case)
    with torch.no_grad():
        close(model.model.prompt_encoder(*prompt_tensors(arrays["cases"], case)), expected("sparse_embeds"))
    close(outputs.iou_scores, expected("iou_pred"))
    close(outputs.pred_masks, expected("mask_pred"))
    close(outputs.semantic_tokens.unsqueeze(2), expected("sem_tokens"))
    close(outputs.semantic_embeds, expected("sem_embeds"))
    assert outputs.slots.tolist() == expected("mask_index").tolist()
    close(take_slots(outputs.iou_scores, outputs.slots), expected("iou_score"))


def test_grid_encoding(model: TapForConditionalGeneration, arrays: dict) -> None:
    close(model.model.prompt_encoder.grid_encoding(8)[0], arrays["cases"]["img_pos"])


def test_region_decoder_inner_steps(golden_folder: Path, arrays: dict, strings: dict) -> None:
    model = TapForConditionalGeneration.from_pretrained(golden_folder).eval()
    decoder = model.model.mask_decoder
    steps = record({"block0": decoder.layers[0], "block1": decoder.layers[1], "final": decoder.layer_norm,
                    "pixels": decoder.upscaler})  # fmt: skip
    run_case(model, arrays, strings, "point_fg_bg_pad")
    trace = {key.split("trace_")[1]: arrays["cases"][key] for key in arrays["cases"].files if "trace_" in key}
    for block in ("block0", "block1"):
        close(steps[block][0], trace[f"{block}_query"])
        close(steps[block][1], trace[f"{block}_key"])
    close(steps["final"], trace["final_query"])
    pixels = steps["pixels"].unflatten(1, (8, 8, 2, 2, 2, 2)).permute(0, 7, 1, 3, 5, 2, 4, 6)
    close(pixels.reshape(trace["mask_embeds"].shape), trace["mask_embeds"])


@pytest.mark.parametrize("case", CASES)
def test_final_masks(
    model: TapForConditionalGeneration, processor: TapProcessor, arrays: dict, strings: dict, case: str
) -> None:
    outputs = run_case(model, arrays, strings, case)
    pictures = strings["cases"][case]["images"]
    originals = [arrays["images"][f"image{picture}_rgb"].shape[:2] for picture in pictures]
    resized = [arrays["images"]["im_info"][picture][:2] for picture in pictures]
    rows = len(outputs.slots) // len(pictures)
    index = torch.arange(len(pictures)).repeat_interleave(rows)
    arguments = (outputs.pred_masks, originals, resized, index, outputs.slots)
    masks = processor.post_process_masks(*arguments)
    for row, mask in enumerate(masks):
        expected = arrays["cases"][f"{case}.mask{row}"]
        assert mask.shape == expected.shape
        assert mask.dtype == torch.bool
        assert (mask.numpy() != expected).mean() <= 1e-3
    if f"{case}.mask0_logits" in arrays["cases"]:
        logits = processor.post_process_masks(*arguments, binarize=False)[0]
        close(logits, arrays["cases"][f"{case}.mask0_logits"])


@pytest.mark.parametrize("case", CASES)
def test_captions_and_concepts(
    model: TapForConditionalGeneration, golden_data: Path, arrays: dict, strings: dict, case: str
) -> None:
    outputs = run_case(model, arrays, strings, case)
    ids = model.generate(semantic_tokens=take_slots(outputs.semantic_tokens, outputs.slots))
    assert until_eos(ids.numpy()) == until_eos(arrays["cases"][f"{case}.caption_tokens"])
    embeds = take_slots(outputs.semantic_embeds, outputs.slots)
    for kind in ("scaled", "unit"):
        space = ConceptSpace.from_pretrained(golden_data / f"concepts_{kind}.pkl")
        names, scores = space.classify(embeds, top_k=5)
        assert names == strings["cases"][case][f"concepts_{kind}_top5"]
        close(scores, arrays["cases"][f"{case}.concept_{kind}_top5_score"])


@pytest.mark.parametrize("case", AS_REGIONS)
def test_regions_through_the_processor(
    model: TapForConditionalGeneration, processor: TapProcessor, arrays: dict, strings: dict, case: str
) -> None:
    pictures = strings["cases"][case]["images"]
    inputs = processor([arrays["images"][f"image{picture}_rgb"] for picture in pictures], AS_REGIONS[case])
    points, labels = prompt_tensors(arrays["cases"], case)
    assert inputs["input_labels"].tolist() == labels.tolist()
    close(inputs["input_points"], points.numpy(), 1e-4)
    with torch.no_grad():
        outputs = model(**inputs)
    close(outputs.pred_masks, arrays["cases"][f"{case}.mask_pred"])
    ids = model.generate(**inputs)
    assert until_eos(ids.numpy()) == until_eos(arrays["cases"][f"{case}.caption_tokens"])
    captions = processor.batch_decode(ids)
    assert captions == [caption.strip() for caption in strings["cases"][case]["captions"]]


def test_caption_decoder_stages(golden_folder: Path, arrays: dict) -> None:
    decoder = TapForConditionalGeneration.from_pretrained(golden_folder).eval().caption_decoder
    steps = record({"prompts": decoder.semantic_projection, "block0": decoder.model.layers[0],
                    "block1": decoder.model.layers[1], "normed": decoder.model.layer_norm})  # fmt: skip
    text = arrays["text"]
    ids = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.from_numpy(text["tokens"])], dim=1)
    with torch.no_grad():
        logits = decoder(ids, semantic_tokens=torch.from_numpy(text["visual_tokens"])[:, 0]).logits[:, 1:]
    close(steps["prompts"].unsqueeze(1), text["prompts"])
    close(steps["block0"], text["block0"])
    close(steps["block1"], text["block1"])
    close(steps["normed"][:, 1:], text["normed"])
    close(logits[..., text["logit_columns"]], text["logits_at_columns"])
    close(logits[0, 0], text["logits_full_row0_first"])
    close(logits[1, -1], text["logits_full_row1_last"])
    close(logits.logsumexp(-1), text["logits_logsumexp"])
    assert (logits.argmax(-1).numpy() == text["logits_argmax"]).all()
    assert (logits.topk(5).indices.numpy() == text["logits_top5_index"]).all()
    angles = rotary_angles(decoder.config, torch.arange(40)[None])[0]
    close(angles.cos(), text["rotary_cos"])
    close(angles.sin(), text["rotary_sin"])


def test_greedy_captions(
    model: TapForConditionalGeneration, processor: TapProcessor, arrays: dict, strings: dict
) -> None:
    text = arrays["text"]
    for tokens, expected in (("visual_tokens", "greedy"), ("greedy16_visual_tokens", "greedy16")):
        ids = model.generate(semantic_tokens=torch.from_numpy(text[tokens])[:, 0])
        assert until_eos(ids.numpy()) == until_eos(text[f"{expected}_tokens"])
        assert processor.batch_decode(ids) == [c.strip() for c in strings["text"][f"{expected}_captions"]]
    stopping = torch.from_numpy(text["greedy16_visual_tokens"])[text["greedy_stop_rows"], 0]
    ids = model.generate(semantic_tokens=stopping)
    assert until_eos(ids.numpy()) == until_eos(text["greedy_stop_tokens"])
    assert ids.shape[1] == max(map(len, until_eos(text["greedy_stop_tokens"])))


def test_length_limit_leaves_no_pad_glyph(
    model: TapForConditionalGeneration, processor: TapProcessor, arrays: dict
) -> None:
    text = arrays["text"]
    ids = model.generate(semantic_tokens=torch.from_numpy(text["visual_tokens"])[:, 0], max_new_tokens=5)
    assert ids.tolist() == text["greedy_max6_tokens"][:, :6].tolist()
    padded = torch.nn.functional.pad(ids, (0, 3), value=31999)
    assert processor.batch_decode(padded) == processor.batch_decode(ids)
    assert all("给" not in caption for caption in processor.batch_decode(padded))


def test_concept_probabilities(golden_data: Path, arrays: dict) -> None:
    embeds = torch.from_numpy(arrays["text"]["concept_embeds"])
    for kind in ("scaled", "unit"):
        space = ConceptSpace.from_pretrained(golden_data / f"concepts_{kind}.pkl")
        names, probabilities = space.classify(embeds, top_k=20)
        order = torch.tensor([[space.names.index(name) for name in row] for row in names])
        full = torch.zeros(6, 20).scatter_(1, order, probabilities)
        close(full, arrays["text"][f"concept_{kind}_prob"])
        close(full.log(), arrays["text"][f"concept_{kind}_log_prob"], 2e-3 if kind == "scaled" else 1e-4)


def test_half_precision_stays_near(golden_folder: Path, arrays: dict, strings: dict) -> None:
    """bfloat16 against float32: features, tokens and logits differ by at most 3 % (relative, in norm)."""
    full = TapForConditionalGeneration.from_pretrained(golden_folder, dtype=torch.float32).eval()
    half = TapForConditionalGeneration.from_pretrained(golden_folder, dtype=torch.bfloat16).eval()
    pixels = torch.from_numpy(arrays["images"]["network_input"]).flip(1)

    def error(ours: Tensor, expected: Tensor) -> float:
        return float((ours.float() - expected).norm() / expected.norm())

    with torch.no_grad():
        assert error(half.get_image_embeddings(pixels), full.get_image_embeddings(pixels)) <= 0.03
        ids = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.from_numpy(arrays["text"]["tokens"])], dim=1)
        visual = torch.from_numpy(arrays["text"]["visual_tokens"])[:, 0]
        assert error(half.caption_decoder(ids, visual).logits, full.caption_decoder(ids, visual).logits) <= 0.03
    for case in CASES:
        ours, expected = run_case(half, arrays, strings, case), run_case(full, arrays, strings, case)
        assert error(ours.semantic_tokens, expected.semantic_tokens) <= 0.03, case
        assert error(ours.pred_masks, expected.pred_masks) <= 0.03, case
