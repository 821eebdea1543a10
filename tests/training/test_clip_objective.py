"""The losses of the small CLIP: by hand on two or three rows, against plain CLIP, and against CaR's gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tap_llm.clip_as_rnn.affinity import refine_cams
from tap_llm.clip_as_rnn.cam import encode_patches
from tap_llm.clip_as_rnn.loading import eager_float32
from tap_llm.data.crops import CropSettings
from training.clip import ClipSize, make_clip, make_image_processor
from training.clip_batches import ClipBatches, ClipDataConfig, ClipPictures
from training.clip_objective import (
    BACKGROUND,
    UNCLEAR,
    ClipLossConfig,
    ClipObjective,
    allowed_texts,
    cam_overlap,
    divergence,
    patch_owners,
    refined_cams,
    region_means,
)
from training.clip_tokenizer import train_clip_tokenizer

SIZE = ClipSize(
    image_size=64, hidden_size=32, layers=2, heads=2, mlp=48, text_hidden_size=16, text_layers=1, text_heads=2,
    text_mlp=24, projection=16, vocabulary=400,
)  # fmt: skip


@pytest.fixture(scope="module")
def batches() -> ClipBatches:
    config = ClipDataConfig(scene_side=[64, 96], mosaic_grid=[2, 2], distractors=6, background_words=4)
    pictures = ClipPictures(config, side=64, patch=16, seed=1)
    return ClipBatches(pictures, train_clip_tokenizer(pictures.texts(1), 400), batch_size=3)


@pytest.fixture
def objective(batches: ClipBatches) -> ClipObjective:
    torch.manual_seed(0)
    clip = make_clip(SIZE, batches.tokenizer)
    clip.set_attn_implementation("eager")
    processor = make_image_processor(CropSettings.of_tower(clip))
    return ClipObjective(clip, processor.image_mean, processor.image_std, ClipLossConfig())


# Parts by hand


def test_divergence_shares_the_target_among_what_is_wanted() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    wanted = torch.tensor([[True, True, False], [False, False, True]])
    whole = math.log(math.exp(2) + math.exp(1) + 1)
    found = divergence(logits, wanted, smoothing=0.0)
    assert found.tolist() == pytest.approx([whole - 1.5, math.log(3)])
    smoothed = divergence(logits, wanted, smoothing=0.3)
    assert smoothed.tolist() == pytest.approx([0.7 * (whole - 1.5) + 0.3 * (whole - 1.0), math.log(3)])


def test_owners_of_patches() -> None:
    cover = torch.tensor([[0.9, 0.4, 0.0, 0.0], [0.1, 0.2, 0.51, 0.0], [0.0, 0.03, 0.5, 1.0]])
    owners = patch_owners(cover, torch.tensor([0, 0, 1]), pictures=3)
    assert owners.tolist() == [
        [0, UNCLEAR, 1, BACKGROUND],
        [BACKGROUND, UNCLEAR, UNCLEAR, 2],  # half is not most
        [BACKGROUND] * 4,
    ]
    assert (patch_owners(cover[:0], torch.tensor([], dtype=torch.long), 2) == BACKGROUND).all()


def test_means_of_regions() -> None:
    patches = torch.tensor([[[1.0, 0.0], [3.0, 2.0]], [[5.0, 5.0], [7.0, 9.0]]])
    cover = torch.tensor([[1.0, 0.5], [0.0, 0.25]])
    found = region_means(patches, cover, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([[2.5 / 1.5, 1.0 / 1.5], [7.0, 9.0]]))


def test_accuracies_choose_among_the_picture_what_is_absent_and_background() -> None:
    # Regions 0 and 1 of pictures 0 and 1, then their views; texts: of 0, of 1, of view 1 alone, of nothing, background.
    positives = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    background = torch.tensor([0, 0, 0, 0, 1]).bool()
    allowed = allowed_texts(positives, background, torch.tensor([0, 1]), pictures=2)
    assert allowed.int().tolist() == [[1, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_overlap_of_cams() -> None:
    cams = torch.tensor([[1.0, 0.5, 0.3, -2.0], [-1.0, -1.0, -1.0, -1.0]])
    shapes = torch.tensor([[1.0, 0.0, 0.6, 0.0], [1.0, 0.0, 0.0, 0.0]])
    total, count = cam_overlap(cams, shapes)
    assert (float(total), int(count)) == (pytest.approx(1 / 3), 2)


# Towers


def test_tokens_and_texts_are_those_of_plain_clip(objective: ClipObjective, batches: ClipBatches) -> None:
    batch, clip = batches[0], objective.clip.eval()
    processor = make_image_processor(CropSettings.of_tower(clip))
    pixels = processor(list(batch["images"].numpy()), return_tensors="pt")["pixel_values"]
    output = clip(input_ids=batch["input_ids"], pixel_values=pixels)
    seen = objective.look(batch["images"])
    ours = F.normalize(clip.visual_projection(seen.tokens[:, 0]), dim=-1)
    texts = F.normalize(objective.text_vectors(batch["input_ids"]), dim=-1)
    torch.testing.assert_close(ours, output.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(texts, output.text_embeds, atol=1e-5, rtol=1e-4)
    logits = objective.logits(seen.tokens[:, 0], objective.text_vectors(batch["input_ids"]))
    torch.testing.assert_close(logits, output.logits_per_image, atol=1e-4, rtol=1e-4)


def test_padding_changes_no_text(objective: ClipObjective, batches: ClipBatches) -> None:
    texts = ["kite", "a photo of a red kite and a blue star"]
    together = batches.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    alone = batches.tokenizer(texts[:1], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(
        objective.text_vectors(together)[:1], objective.text_vectors(alone), atol=1e-6, rtol=1e-5
    )


def test_cams_are_gradients_of_probabilities(objective: ClipObjective, batches: ClipBatches) -> None:
    """Up to a positive factor, as the CAM is scaled anyway."""
    batch = batches[1]
    rows = batch["picked"][batch["picked"] >= 0]
    texts = objective.text_vectors(batch["input_ids"])[: len(batch["is_background"])].detach()
    seen = objective.look(batch["images"])
    cams, shapes = objective.cams(seen, texts, rows, batch["cover"], batch["region_image_index"], batch["positives"])
    for position, row in enumerate(rows.tolist()):
        image, text = int(batch["region_image_index"][row]), int(batch["positives"][row].int().argmax())
        chances = objective.logits(seen.tokens[image, 1:].mean(0)[None], texts).softmax(-1)
        (gradient,) = torch.autograd.grad(chances[0, text], seen.normed, retain_graph=True)
        expected = seen.normed[image, 1:] @ gradient[image, 1:].mean(0)
        assert F.cosine_similarity(cams[position], expected, dim=0).item() == pytest.approx(1, abs=1e-4)
        true = batch["positives"][: len(batch["cover"]), text] & (batch["region_image_index"] == image)
        torch.testing.assert_close(shapes[position], batch["cover"][true].sum(0))


def test_cams_are_refined_as_car_does(objective: ClipObjective, batches: ClipBatches) -> None:
    """With boxes around all that is above zero."""
    images = batches[0]["images"][:2]
    model = eager_float32(objective.clip).requires_grad_(False)
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - objective.mean) / objective.std
    features = [encode_patches(model, pixels[index : index + 1]) for index in range(2)]
    cams = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) + 0.01
    found = refined_cams(cams, objective.look(images).attention)
    for index in range(2):
        wanted = refine_cams(features[index].affinity, cams[index].reshape(1, 4, 4) / cams[index].max(), 0.0)
        torch.testing.assert_close(found[index] / found[index].max(), wanted.flatten(), atol=1e-4, rtol=1e-3)
    assert refined_cams(cams[:0], objective.look(images).attention[:0]).shape == (0, 16)


# The whole


def test_losses_are_finite_and_reach_every_weight(objective: ClipObjective, batches: ClipBatches) -> None:
    batch = batches[0]
    sums, metrics = objective(**batch)
    counts = objective.counts(batch)
    assert sums.keys() == counts.keys() == objective.weights.keys() and min(counts.values()) > 0
    assert all(0 <= float(value) <= float(count) for value, count in metrics.values())
    assert float(metrics["top1/view"][1]) == counts["view"] == 3
    sum(objective.weights[name] * value / counts[name] for name, value in sums.items()).backward()
    still = [name for name, weight in objective.clip.named_parameters() if weight.grad is None]
    assert still == []
    moved = {name for name, weight in objective.clip.named_parameters() if weight.grad.abs().sum() > 0}
    fixed = {name for name, _ in objective.clip.named_parameters()} - moved
    assert all("k_proj.bias" in name for name in fixed)  # no softmax feels the bias of keys


@pytest.mark.parametrize("name", ["patch", "region", "view", "caption", "cam", "affinity"])
def test_each_loss_falls_on_its_own(objective: ClipObjective, batches: ClipBatches, name: str) -> None:
    batch = batches[0]
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        sums, _ = objective(**batch)
        losses.append(float(sums[name].detach()) / objective.counts(batch)[name])
        optimizer.zero_grad()
        sums[name].backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_validation_has_cams_too_and_leaves_no_graph(objective: ClipObjective, batches: ClipBatches) -> None:
    objective.eval()
    with torch.no_grad():
        sums, metrics = objective(**batches[0])
    assert 0 <= float(metrics["iou/cam"][0]) <= float(metrics["iou/cam"][1]) > 0
    objective.train()
    expected, _ = objective(**batches[0])
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)


def test_pictures_without_objects(objective: ClipObjective, batches: ClipBatches) -> None:
    full = batches[0]
    batch: dict[str, Any] = {**full, "cover": full["cover"][:0], "region_image_index": full["region_image_index"][:0]}
    batch |= {"picked": torch.full((3,), -1), "positives": full["positives"][-3:]}
    sums, _ = objective(**batch)
    counts = objective.counts(batch)
    assert counts["patch"] == 3 * 16 and counts["region"] == counts["cam"] == 0 == float(sums["cam"].detach())
    assert all(bool(value.isfinite()) for value in sums.values())
