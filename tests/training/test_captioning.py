"""The caption decoder's training: ids and their shift, the tokens it reads, and a TAP that stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tap_llm.errors import InputError
from training.captioning import CaptionBatches, CaptionLossConfig, CaptionObjective
from training.examples import DataConfig, Pictures
from training.prompts import Prompts
from training.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of the miniature vocabulary."""
    return train_tokenizer(["a red star behind the blue ring"] * 3, 400, tmp_path_factory.mktemp("words"))


def make(tiny: Any, **config: Any) -> CaptionObjective:
    return CaptionObjective(tiny[0], CaptionLossConfig(**config))


def batches(
    tiny: Any, words: Any, size: int = 3, regions: int = 4, max_length: int = 40, **data: Any
) -> CaptionBatches:
    pictures = Pictures(DataConfig(**{"scene_side": [64, 80], **data}), captioned=True)
    return CaptionBatches(pictures, words, tiny[1].image_processor, size, regions, max_length)


def semantic_tokens(objective: CaptionObjective, batch: dict[str, Tensor]) -> Tensor:
    return objective._semantic_tokens(batch["pixel_values"], batch)


# Batches


def test_labels_hold_the_captions_of_the_regions(tiny: Any, words: Any) -> None:
    source = batches(tiny, words, max_length=300)
    batch = source[2]
    labels, owners = batch["labels"], batch["region_image_index"].tolist()
    assert (labels[:, 0] == 1).all() and int(batch["seed"]) == 6
    for row, owner in enumerate(owners):
        picture, ids = source.pictures[6 + owner], labels[row][labels[row] != -100].tolist()
        assert ids[-1] == 2 and (labels[row, len(ids) :] == -100).all()
        text = words.decode(ids[1:-1])
        (place,) = [i for i, captions in enumerate(picture.captions) if text in captions]
        box = torch.from_numpy(picture.boxes[place]) * 64 / max(picture.image.shape[:2])
        torch.testing.assert_close(batch["boxes"][row], box.float())
    assert (labels != -100).any(0).all()  # no column of pads alone
    counts = [min(4, sum(map(bool, source.pictures[number].captions))) for number in (6, 7, 8)]
    assert [owners.count(image) for image in range(3)] == counts


def test_long_captions_are_cut_and_end_all_the_same(tiny: Any, words: Any) -> None:
    labels = batches(tiny, words, max_length=5)[0]["labels"]
    assert labels.shape[1] == 5 and (labels[:, 0] == 1).all()
    lengths = (labels != -100).sum(1)
    assert (labels[torch.arange(len(labels)), lengths - 1] == 2).all()


def test_a_batch_depends_on_its_number_alone(tiny: Any, words: Any, samples: Path) -> None:
    data = {"samples": [str(samples)], "sample_share": 0.5}
    first, second = batches(tiny, words, **data), batches(tiny, words, **data)
    second[7]
    assert all(torch.equal(first[3][key], second[3][key]) for key in first[3])
    assert not torch.equal(first[3]["pixel_values"], first[4]["pixel_values"])


def test_every_caption_of_a_region_is_drawn(tiny: Any, words: Any, samples: Path) -> None:
    regions = [{"box": [1, 1, 30, 30], "captions": ["a cat", "a dog", "a bus"]}]
    samples.write_text(json.dumps({"image": "0.png", "regions": regions}))
    source = batches(tiny, words, size=1, regions=8, samples=[str(samples)], sample_share=1.0)
    said = {words.decode(source[number]["labels"][0, 1:-1].tolist()) for number in range(30)}
    assert said == {"a cat", "a dog", "a bus"}
    assert len(source[0]["labels"]) == 1  # fewer regions than are wanted are not repeated


# Loss


def test_loss_is_that_of_the_model(tiny: Any, words: Any) -> None:
    """Without smoothing and with box prompts: TAP's own caption loss, the shift included."""
    objective, batch = make(tiny, smoothing=0.0, box_share=1.0).eval(), batches(tiny, words)[0]
    prompts = Prompts.from_boxes(batch["boxes"])
    with torch.no_grad():
        sums, metrics = objective(**batch)
        output = tiny[0](pixel_values=batch["pixel_values"], input_points=prompts.points, input_labels=prompts.labels,
                         region_image_index=batch["region_image_index"], labels=batch["labels"])  # fmt: skip
    count = objective.counts(batch)["caption"]
    assert count == int((batch["labels"] != -100).sum()) - len(batch["labels"])
    torch.testing.assert_close(sums["caption"], output.loss * count, rtol=1e-5, atol=1e-4)
    guessed, wanted = output.logits.argmax(-1)[:, :-1], batch["labels"][:, 1:]
    right, known = metrics["accuracy"]
    assert int(known) == count and int(right) == int((guessed == wanted)[wanted != -100].sum())


def test_smoothing_spreads_over_all_ids_but_not_over_pads(tiny: Any, words: Any) -> None:
    batch = batches(tiny, words)[0]
    sums = {}
    for smoothing in (0.0, 0.1, 1.0):
        objective = make(tiny, smoothing=smoothing, box_share=1.0).eval()
        with torch.no_grad():
            sums[smoothing] = objective(**batch)[0]["caption"]
    torch.testing.assert_close(sums[0.1], 0.9 * sums[0.0] + 0.1 * sums[1.0])
    longer = {**batch, "labels": F.pad(batch["labels"], (0, 3), value=-100)}
    objective = make(tiny, smoothing=0.1, box_share=1.0).eval()
    with torch.no_grad():
        torch.testing.assert_close(objective(**longer)[0]["caption"], sums[0.1])


def test_pads_and_later_words_change_nothing_before_them(tiny: Any, words: Any) -> None:
    objective, batch = make(tiny, smoothing=0.0, box_share=1.0).eval(), batches(tiny, words)[0]
    shorter = {**batch, "labels": batch["labels"][:, :4].clone()}
    masked = {**batch, "labels": batch["labels"].clone()}
    masked["labels"][:, 4:] = -100
    with torch.no_grad():
        torch.testing.assert_close(objective(**shorter)[0]["caption"], objective(**masked)[0]["caption"])


def test_a_process_without_captions_takes_part(tiny: Any, words: Any) -> None:
    objective, batch = make(tiny), batches(tiny, words)[0]
    rows = ("boxes", "region_image_index", "labels")
    nothing = {key: value[:0, :2] if key == "labels" else value[:0] if key in rows else value
               for key, value in batch.items()}  # fmt: skip
    sums, metrics = objective(**nothing)
    sums["caption"].backward()
    assert sums["caption"] == 0 and int(metrics["accuracy"][1]) == 0 and objective.counts(nothing) == {"caption": 0.0}
    gradients = [parameter.grad for parameter in objective.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None and (gradient == 0).all() for gradient in gradients)


# The frozen part


def test_tap_stays_as_it_is(tiny: Any, words: Any) -> None:
    tap = tiny[0]
    objective = make(tiny).train()
    assert tap.caption_decoder.training and not any(module.training for module in tap.model.modules())
    before = {key: value.clone() for key, value in tap.model.state_dict().items()}
    sums, _ = objective(**batches(tiny, words)[0])
    sums["caption"].backward()
    assert all(torch.equal(before[key], value) for key, value in tap.model.state_dict().items())
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == name.startswith("tap.caption_decoder."), name


def test_half_of_the_tokens_come_from_boxes(tiny: Any, words: Any) -> None:
    batch = batches(tiny, words, size=8)[0]
    tokens = {share: semantic_tokens(make(tiny, box_share=share).eval(), batch) for share in (0.0, 0.5, 1.0)}
    by_box = (tokens[0.5] == tokens[1.0]).all(1)
    by_points = (tokens[0.5] == tokens[0.0]).all(1)
    assert (by_box | by_points).all() and 0.25 < by_box.float().mean() < 0.75


def test_tokens_of_boxes_are_those_of_slot_0(tiny: Any, words: Any) -> None:
    batch = batches(tiny, words)[0]
    prompts = Prompts.from_boxes(batch["boxes"])
    with torch.no_grad():
        output = tiny[0].eval().model(
            pixel_values=batch["pixel_values"], input_points=prompts.points, input_labels=prompts.labels,
            region_image_index=batch["region_image_index"],
        )  # fmt: skip
    torch.testing.assert_close(semantic_tokens(make(tiny, box_share=1.0).eval(), batch), output.semantic_tokens[:, 0])


def test_points_are_drawn_from_the_mask_that_is_seen_in_the_box(tiny: Any, words: Any) -> None:
    """2 to 9 foreground points and TAP's one pad; a box in which nothing is seen keeps its own token."""
    objective, batch = make(tiny, box_share=0.0, max_points=9).eval(), batches(tiny, words)[0]
    asked: list[tuple[Prompts, Any]] = []
    prompt = objective._prompt

    def noted(images: Tensor, prompts: Prompts, rows: dict[str, Tensor]) -> Any:
        output = prompt(images, prompts, rows)
        if not asked:
            output.pred_masks[0] = -1.0
            output.pred_masks[1:, 0, 2:9, 3:8] = 1.0
        asked.append((prompts, output))
        return output

    objective._prompt = noted  # type: ignore[method-assign]
    tokens = semantic_tokens(objective, batch)
    (boxes, by_box), (points, by_points) = asked
    assert boxes.from_box.all() and not points.from_box.any()
    predicted = by_box.pred_masks[:, 0] > 0
    assert (
        3 <= points.labels.shape[1] <= 10 and (points.labels[1:, :-1] == 1).all() and (points.labels[:, -1] == 4).all()
    )
    cells = ((points.points + 0.5) / 4).long()
    for row in range(1, len(cells)):
        assert predicted[row, cells[row, :-1, 1], cells[row, :-1, 0]].all()
    torch.testing.assert_close(tokens[0], by_box.semantic_tokens[0, 0])
    rows = torch.arange(1, len(tokens))
    assert (by_points.slots > 0).all()
    torch.testing.assert_close(tokens[1:], by_points.semantic_tokens[rows, by_points.slots[1:]])


def test_captions_longer_than_the_decoder_takes(tiny: Any) -> None:
    longest = tiny[0].config.text_config.max_position_embeddings
    make(tiny, max_length=longest)
    for length in (1, longest + 1):
        with pytest.raises(InputError, match=f"loss.max_length must be 2 to {longest}"):
            make(tiny, max_length=length)


def test_pictures_may_have_any_size(tiny: Any, words: Any) -> None:
    batch = batches(tiny, words, scene_side=[40, 300])[0]
    assert batch["pixel_values"].shape == (3, 3, 64, 64) and float(batch["boxes"].max()) <= 64
    assert np.isfinite(batch["boxes"].numpy()).all()
