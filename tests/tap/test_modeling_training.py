"""Training TAP: the caption loss, what gradients reach, checkpointing, drop path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tap import (
    BOX,
    CAPTIONS,
    NINE_POINTS,
    POINT,
    VOCABULARY,
    close,
    gradients,
    randomize,
    rows,
    run,
    same,
    small_config,
    train_step,
)
from torch import Tensor, nn

from tap_llm import TapForConditionalGeneration, TapOutput
from tap_llm.tap.outputs import take_slots
from tap_llm.tap.vision_encoder import relative_position_index


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
