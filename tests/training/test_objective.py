"""The losses of pre-training against direct computation; what is unknown, unused or frozen learns nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tap_llm.concepts import ConceptSpace
from tap_llm.data.colours import COLOUR_WORDS
from tap_llm.errors import InputError
from tap_llm.tap.outputs import TapOutput
from training.examples import DataConfig, Pictures, RegionBatches
from training.losses import mask_loss, true_iou
from training.objective import HEADS_FILE, LossConfig, PromptConfig, RegionObjective
from training.prompts import Prompts

ALL = {"colour": 0.5, "cell_name": 0.5, "cell_colour": 0.5}


def make(tiny: Any, learn: bool = True, freeze: bool = False, prompts: Any = None, **loss: Any) -> RegionObjective:
    tap, _, concepts = tiny
    return RegionObjective(tap.model, concepts, learn, PromptConfig(**(prompts or {})), LossConfig(**loss), freeze)


def batch_of(tiny: Any, objective: RegionObjective, number: int = 0) -> dict[str, Tensor]:
    """Three pictures with four regions each; some regions without name or colours."""
    data = DataConfig(regions=4, scene_side=[64, 80])
    source = RegionBatches(Pictures(data), tiny[2], tiny[1].image_processor, objective.sampler, 3, 4)
    batch = source[number]
    batch["names"][::3] = -100
    batch["colours"][1::4] = torch.nan
    return batch


def answer_to(objective: RegionObjective, batch: dict[str, Tensor], prompts: Prompts | None = None) -> TapOutput:
    """TAP's own output."""
    points = prompts.points if prompts else batch["input_points"]
    labels = prompts.labels if prompts else batch["input_labels"]
    return objective.model(pixel_values=batch["pixel_values"], input_points=points, input_labels=labels,
                           region_image_index=batch["region_image_index"])  # fmt: skip


def slots_by_hand(losses: Tensor, from_box: Tensor) -> list[int]:
    """Boxes learn in slot 0, points in the best of the others."""
    return [0 if box else 1 + int(row[1:].argmin()) for row, box in zip(losses, from_box.tolist(), strict=True)]


@pytest.mark.parametrize("pixel", ["focal", "bce", "soft"])
def test_losses_of_one_prompt(tiny: Any, pixel: str) -> None:
    objective = make(tiny, prompts={"stages": 1}, pixel=pixel, smoothing=0.1, **ALL).eval()
    batch, concepts = batch_of(tiny, objective), tiny[2]
    with torch.no_grad():
        sums, metrics = objective(**batch)
        output = answer_to(objective, batch)
    cover = batch["masks"].float() / 255
    inside = cover > 0.5
    per_slot = mask_loss(output.pred_masks, cover if pixel == "soft" else inside, pixel)
    slots = slots_by_hand(per_slot, batch["from_box"])
    assert set(slots) > {0} and len(set(slots)) > 1
    ious = true_iou(output.pred_masks, inside)
    expected = dict.fromkeys(("mask", "iou", "concept", "colour"), torch.zeros(()))
    for row, slot in enumerate(slots):
        expected["mask"] = expected["mask"] + per_slot[row, slot]
        expected["iou"] = expected["iou"] + (output.iou_scores[row, slot] - ious[row, slot]) ** 2
        if (name := int(batch["names"][row])) >= 0:
            log_p = concepts.logits(output.semantic_embeds[row, slot]).log_softmax(-1)
            target = torch.full((len(concepts),), 0.1 / len(concepts))
            target[name] += 0.9
            expected["concept"] = expected["concept"] + F.kl_div(log_p, target, reduction="sum")
        if not batch["colours"][row].isnan().any():
            logits = objective.colour_head(output.semantic_tokens[row, slot])
            colour = F.binary_cross_entropy_with_logits(logits, batch["colours"][row], reduction="sum")
            expected["colour"] = expected["colour"] + colour
    for key, value in expected.items():
        torch.testing.assert_close(sums[key], value, rtol=1e-4, atol=1e-5, msg=key)
    routed = ious[torch.arange(12), output.slots]
    for key, rows in (("box", batch["from_box"]), ("point", ~batch["from_box"])):
        torch.testing.assert_close(metrics[f"iou/{key}"][0], routed[rows].sum())
        assert int(metrics[f"iou/{key}"][1]) == int(rows.sum())
        assert int(metrics[f"name/{key}"][1]) == int((rows & (batch["names"] >= 0)).sum())


def test_losses_of_cells(tiny: Any) -> None:
    objective = make(tiny, prompts={"stages": 1}, smoothing=0.05, **ALL).eval()
    batch, concepts = batch_of(tiny, objective), tiny[2]
    with torch.no_grad():
        sums, metrics = objective(**batch)
        images = objective.model.get_image_embeddings(batch["pixel_values"])
    names = colours = right = torch.zeros(())
    for image, y, x in (batch["cell_names"] >= 0).nonzero().tolist():
        name, colour = int(batch["cell_names"][image, y, x]), int(batch["cell_colours"][image, y, x])
        logits = concepts.logits(objective.cell_name_head(images[image, :, y, x]))
        target = torch.full((len(concepts),), 0.05 / len(concepts))
        target[name] += 0.95
        names = names + F.kl_div(logits.log_softmax(-1), target, reduction="sum")
        colours = colours - objective.cell_colour_head(images[image, :, y, x]).log_softmax(-1)[colour]
        right = right + (logits.argmax() == name)
    torch.testing.assert_close(sums["cell_name"], names, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums["cell_colour"], colours, rtol=1e-4, atol=1e-4)
    assert metrics["name/cell"] == (int(right), int((batch["cell_names"] >= 0).sum()))


def test_all_slots_that_may_answer_are_judged_alike(tiny: Any) -> None:
    objective = make(tiny, prompts={"stages": 1}, all_slots=True).eval()
    batch = batch_of(tiny, objective)
    with torch.no_grad():
        sums, _ = objective(**batch)
        output = answer_to(objective, batch)
    errors = (output.iou_scores - true_iou(output.pred_masks, batch["masks"] > 127)).square()
    expected = sum(row[0] if box else row[1:].mean() for row, box in zip(errors, batch["from_box"], strict=True))
    torch.testing.assert_close(sums["iou"], expected, rtol=1e-4, atol=1e-6)


def test_counts(tiny: Any) -> None:
    objective = make(tiny, prompts={"stages": 2}, **ALL)
    batch = batch_of(tiny, objective)
    named, coloured = int((batch["names"] >= 0).sum()), int((~batch["colours"].isnan().any(1)).sum())
    assert 0 < named <= 8 and 0 < coloured <= 9
    cells = {key: float((batch[f"{key}s"] >= 0).sum()) for key in ("cell_name", "cell_colour")}
    expected = {"mask": 24.0, "iou": 24.0, "concept": 2.0 * named, "colour": 2.0 * coloured, **cells}
    assert objective.counts(batch) == expected
    assert objective.weights == {"mask": 1.0, "iou": 1.0, "concept": 1.0, **ALL}
    assert make(tiny, mask=0.0, cell_name=1.0).counts(batch) == {"cell_name": cells["cell_name"]}
    batch["teacher"] = torch.full((12, 16), torch.nan)
    batch["teacher"][0] = 1.0  # a region without a name
    assert objective.counts(batch)["concept"] == 2.0 * (named + 1)


def test_two_prompts_count_twice_and_cells_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(tiny, prompts={"stages": 2}, **ALL).eval()
    asked: list[Prompts] = []
    ask = objective._ask

    def noted(images: Tensor, prompts: Prompts, index: Tensor) -> Any:
        asked.append(prompts)
        return ask(images, prompts, index)

    monkeypatch.setattr(objective, "_ask", noted)
    batch = batch_of(tiny, objective)
    with torch.no_grad():
        both, metrics = objective(**batch)
    assert len(asked) == 2 and asked[1].points.shape[1] > asked[0].points.shape[1]
    second = {**batch, "input_points": asked[1].points, "input_labels": asked[1].labels}
    objective.stages = 1
    with torch.no_grad():
        alone, corrected = (objective(**given)[0] for given in (batch, second))
    for key in ("mask", "iou", "concept", "colour"):
        torch.testing.assert_close(both[key], alone[key] + corrected[key], rtol=1e-5, atol=1e-6)
    for key in ("cell_name", "cell_colour"):
        torch.testing.assert_close(both[key], alone[key])
    assert {"iou/box", "iou/box_corrected", "name/point_corrected"} <= metrics.keys()


@pytest.mark.parametrize("error_region", [True, False])
def test_corrections_lie_where_the_first_mask_is_wrong(tiny: Any, error_region: bool) -> None:
    objective = make(tiny, prompts={"interactive_probability": 1.0, "error_region": error_region}).eval()
    batch = batch_of(tiny, objective)
    first = Prompts(batch["input_points"], batch["input_labels"], batch["from_box"])
    with torch.no_grad():
        output = answer_to(objective, batch)
    masks = batch["masks"] > 127
    prompts = objective._corrected(output.pred_masks, first, batch)
    assert torch.equal(prompts.from_box, batch["from_box"])
    assert torch.equal(prompts.points[:, :2], first.points) and torch.equal(prompts.labels[:, :2], first.labels)
    best = slots_by_hand(-true_iou(output.pred_masks, masks), batch["from_box"])
    outside = 0
    for row, slot in enumerate(best):
        wrong = (output.pred_masks[row, slot] > 0) ^ masks[row]
        region = wrong if error_region and wrong.any() else masks[row]
        for point, label in zip(prompts.points[row, 2:], prompts.labels[row, 2:].tolist(), strict=True):
            x, y = ((point + 0.5) / 4).long().tolist()
            if label != 4:
                assert region[y, x] and label == int(masks[row, y, x])
                outside += label == 0
    assert (outside > 0) == error_region
    again = objective._corrected(output.pred_masks, first, batch)
    assert torch.equal(again.points, prompts.points)  # by the batch's own seed


def test_nothing_is_learnt_of_what_is_unknown(tiny: Any) -> None:
    objective = make(tiny, **ALL).eval()
    batch = batch_of(tiny, objective)
    batch["names"][:] = -100
    batch["colours"][:] = torch.nan
    batch["cell_names"][:] = batch["cell_colours"][:] = -100
    sums, _ = objective(**batch)
    for key in ("concept", "colour", "cell_name", "cell_colour"):
        assert sums[key] == 0 and objective.counts(batch)[key] == 0
    sum(sums[key] for key in ("concept", "colour", "cell_name", "cell_colour")).backward()
    touched = [p.grad for p in objective.parameters() if p.grad is not None]
    assert touched and all((gradient == 0).all() for gradient in touched)


@pytest.mark.parametrize(
    ("loss", "frozen"),
    [
        ({}, {"colour_head", "cell_name_head", "cell_colour_head"}),
        (ALL, set()),
        ({"concept": 0.0}, {"semantic_head", "concept_weights", "colour_head", "cell_name_head", "cell_colour_head"}),
        ({"concept": 0.0, "cell_name": 1.0}, {"semantic_head", "colour_head", "cell_colour_head"}),
        ({"iou": 0.0, **ALL}, {"iou_head"}),
        ({"mask": 0.0, "cell_name": 1.0, "cell_colour": 1.0}, {"mask_decoder", "prompt_encoder", "colour_head"}),
    ],
)
@pytest.mark.parametrize("freeze", [False, True])
def test_all_that_is_trained_has_a_gradient(tiny: Any, loss: dict[str, float], frozen: set[str], freeze: bool) -> None:
    """DistributedDataParallel waits for every trainable parameter, also where a batch has no names."""
    objective = make(tiny, freeze=freeze, prompts={"stages": 2}, **loss)
    batch = batch_of(tiny, objective)
    batch["names"][:] = -100
    batch["cell_names"][:] = -100
    sums, _ = objective(**batch)
    torch.stack(list(sums.values())).sum().backward()
    wanted = frozen | ({"vision_encoder"} if freeze else set())
    for name, parameter in objective.named_parameters():
        is_frozen = any(part in name.split(".") for part in wanted)
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name


def test_a_frozen_encoder_stays_as_it_is(tiny: Any) -> None:
    objective = make(tiny, freeze=True, **ALL).train()
    assert not objective.model.vision_encoder.training and objective.model.mask_decoder.training
    before = {key: value.clone() for key, value in objective.model.vision_encoder.state_dict().items()}
    sums, _ = objective(**batch_of(tiny, objective))
    sums["mask"].backward()
    after = objective.model.vision_encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert objective.eval().train().model.vision_encoder.training is False
    free = make(tiny).train()
    free(**batch_of(tiny, free))
    assert not torch.equal(before["neck.norm1.running_mean"], after["neck.norm1.running_mean"])


def test_a_teacher_wins_over_names(tiny: Any) -> None:
    objective = make(tiny, prompts={"stages": 1}, smoothing=0.1).eval()
    batch, concepts = batch_of(tiny, objective), tiny[2]
    teacher = torch.full((12, 16), torch.nan)
    teacher[:5] = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        by_name, _ = objective(**batch)
    sums, metrics = objective(**batch, teacher=teacher)
    output = answer_to(objective, batch)
    slots = slots_by_hand(mask_loss(output.pred_masks, batch["masks"] > 127), batch["from_box"])
    student = [concepts.logits(output.semantic_embeds[row, slot]) for row, slot in enumerate(slots)]
    expected = sum(
        F.kl_div(student[row].log_softmax(-1), concepts.logits(teacher[row]).softmax(-1), reduction="sum")
        if row < 5
        else F.cross_entropy(student[row], batch["names"][row], label_smoothing=0.1) - entropy(len(concepts), 0.1)
        for row in range(12)
        if row < 5 or batch["names"][row] >= 0
    )
    torch.testing.assert_close(sums["concept"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(sums["concept"], by_name["concept"])
    assert int(metrics["name/box"][1]) == int((batch["from_box"] & (batch["names"] >= 0)).sum())


def entropy(concepts: int, smoothing: float) -> Tensor:
    target = torch.full((concepts,), smoothing / concepts)
    target[0] += 1 - smoothing
    return -(target * target.log()).sum()


def test_a_perfect_student_of_a_teacher_has_nothing_to_learn(tiny: Any) -> None:
    """And targets are constants, also where the concepts are learnt."""
    objective = make(tiny)
    embeds = torch.randn(3, 4, 16)
    batch = {"names": torch.tensor([-100, 1, 2]), "teacher": embeds[:, 0].clone()}
    losses = objective._concept_losses(embeds[:, :1].expand(3, 4, 16), batch)
    torch.testing.assert_close(losses, torch.zeros(3, 4), rtol=0, atol=1e-5)
    student = torch.randn(3, 4, 16)
    losses = objective._concept_losses(student, batch).sum()
    targets = objective.concept_logits(batch["teacher"]).softmax(-1).detach()
    log_p = objective.concept_logits(student).log_softmax(-1)
    by_hand = F.kl_div(log_p, targets[:, None].expand_as(log_p), reduction="sum")
    gradients = [torch.autograd.grad(loss, objective.concept_weights)[0] for loss in (losses, by_hand)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_learnt_concepts_keep_their_lengths(tiny: Any) -> None:
    objective, concepts = make(tiny, learn=True), tiny[2]
    torch.testing.assert_close(objective.concepts(), concepts.weights, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        objective.concept_weights.add_(torch.randn_like(objective.concept_weights))
    torch.testing.assert_close(objective.concepts().norm(dim=0), concepts.weights.norm(dim=0))
    assert not make(tiny, learn=False).concept_weights.requires_grad
    space = ConceptSpace(concepts.names, objective.concepts())
    embeds = torch.randn(5, 16)
    torch.testing.assert_close(objective.concept_logits(embeds), space.logits(embeds), rtol=1e-4, atol=1e-4)


def test_heads_pass_on_between_stages(tiny: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    before, after = make(tiny, **ALL), make(tiny, **ALL)
    keys = before.head_keys()
    assert {key.split(".")[0] for key in keys} == {"colour_head", "cell_name_head", "cell_colour_head"}
    save_file({key: before.state_dict()[key] for key in keys}, tmp_path / HEADS_FILE)
    after.load_heads(None)
    after.load_heads("some/hub-id")
    assert not torch.equal(before.colour_head.weight, after.colour_head.weight)
    after.load_heads(str(tmp_path))
    assert all(torch.equal(before.state_dict()[key], after.state_dict()[key]) for key in keys)
    assert before.colour_head.out_features == len(COLOUR_WORDS)


@pytest.mark.parametrize(
    ("prompts", "loss", "message"),
    [
        ({}, {"mask": 0.0}, "loss.cell_name"),
        ({}, {"mask": 0.0, "cell_colour": 1.0}, "loss.cell_name"),
        ({"stages": 0}, {}, "prompts.stages"),
    ],
)
def test_nothing_to_learn(tiny: Any, prompts: dict[str, int], loss: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tiny, prompts=prompts, **loss)
