"""Optimisers: which parameter decays, learns how fast, and by which rule; the schedule against hand numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tap_llm.errors import InputError
from training.config import OptimizerConfig
from training.objective import LossConfig, PromptConfig, RegionObjective
from training.optimization import (
    build_optimizers,
    check_optimizer,
    encoder_depth,
    layer_factor,
    schedule_factor,
    set_learning_rates,
)

ALL = LossConfig(colour=0.5, cell_name=0.5, cell_colour=0.5)


def objective(tiny: Any, freeze_encoder: bool = False) -> RegionObjective:
    tap, _, concepts = tiny
    return RegionObjective(tap.model, concepts, True, PromptConfig(), ALL, freeze_encoder)


def settings_of(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float, float]]:
    """Optimiser, weight decay and peak of every parameter, by name; each occurs once."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, tuple[str, float, float]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                assert name not in found
                found[name] = type(optimizer).__name__, group["weight_decay"], group["peak"]
    return found


def test_all_but_norms_decay(tiny: Any) -> None:
    module = objective(tiny)
    found = settings_of(module, build_optimizers(module, OptimizerConfig(learning_rate=0.002)))
    assert found.keys() == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {(kind, peak) for kind, _, peak in found.values()} == {("AdamW", 0.002)}
    spared = {name for name, (_, decay, _) in found.items() if decay == 0}
    assert all(".norm" in name or "layer_norm" in name for name in spared)
    assert {decay for name, (_, decay, _) in found.items() if name not in spared} == {0.1}
    for name in (
        "model.vision_encoder.position_embeddings", "model.vision_encoder.layers.0.attention.qkv.bias",
        "model.vision_encoder.layers.0.attention.rel_pos_bias", "model.mask_decoder.mask_tokens", "concept_weights",
    ):  # fmt: skip
        assert name not in spared
    norms = {type(layer).__name__ for layer in module.modules() if "Norm" in type(layer).__name__}
    assert norms == {"LayerNorm", "BatchNorm2d"}
    assert len(spared) == sum(2 for layer in module.modules() if type(layer).__name__ in norms)


def test_frozen_parts_are_left_out(tiny: Any) -> None:
    module = objective(tiny, freeze_encoder=True)
    found = settings_of(module, build_optimizers(module, OptimizerConfig()))
    assert found and not any("vision_encoder" in name for name in found)
    with pytest.raises(InputError, match="nothing is left to train"):
        build_optimizers(module.requires_grad_(False), OptimizerConfig())


def test_layers_below_learn_more_slowly(tiny: Any) -> None:
    module = objective(tiny)
    assert encoder_depth(module) == 4 and encoder_depth(nn.Linear(2, 2)) == 0
    found = settings_of(module, build_optimizers(module, OptimizerConfig(learning_rate=1.0, layer_decay=0.5)))
    encoder = "model.vision_encoder."
    for name, peak in (
        (f"{encoder}layers.3.mlp.fc1.weight", 1.0), (f"{encoder}layers.2.mlp.fc1.weight", 0.5),
        (f"{encoder}layers.0.layer_norm1.bias", 0.125), (f"{encoder}patch_embeddings.projection.weight", 0.0625),
        (f"{encoder}position_embeddings", 0.0625), (f"{encoder}neck.conv1.weight", 1.0),
        (f"{encoder}bottlenecks.0.conv1.weight", 1.0), ("model.mask_decoder.iou_token", 1.0),
    ):  # fmt: skip
        assert found[name][2] == peak, name
    assert layer_factor(f"{encoder}layers.11.mlp.fc1.bias", 24, 0.9) == pytest.approx(0.9**12)


def test_muon_takes_the_matrices_of_attention_and_mlps(tiny: Any) -> None:
    module = tiny[0]
    config = OptimizerConfig(name="muon", learning_rate=0.001, matrix_learning_rate=0.004, layer_decay=0.5)
    found = settings_of(module, build_optimizers(module, config))
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
    muon = {name for name, (kind, _, _) in found.items() if kind == "Muon"}
    assert found.keys() == shapes.keys()
    assert all(shapes[name] == 2 for name in muon)
    expected = {"qkv", "proj", "fc1", "fc2", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[-2] for name in muon} == expected
    others = {name for name in found.keys() - muon if name.split(".")[-1] == "weight" and shapes[name] == 2}
    heads = ("head", "embed_tokens", "point_embed", "semantic_projection")
    assert others and all(any(head in name for head in heads) for name in others), others
    assert found["model.vision_encoder.layers.2.mlp.fc1.weight"] == ("Muon", 0.1, 0.002)
    assert found["model.mask_decoder.layers.0.mlp.fc1.weight"] == ("Muon", 0.1, 0.004)
    assert found["caption_decoder.lm_head.weight"] == ("AdamW", 0.1, 0.001)


def test_schedules_against_hand_numbers() -> None:
    """TAP's formula: warm-up a + (1 - a) (s + 1) / W, then min + (1 - min) 0.5 (1 + cos(pi (s - W) / (T - W)))."""
    shape = {"warmup": 4, "warmup_start": 0.1, "min_factor": 0.2}

    def factors(schedule: str) -> list[float]:
        config = OptimizerConfig(schedule=schedule, **shape)  # type: ignore[arg-type]
        return [schedule_factor(step, 12, config) for step in range(12)]

    cosine, linear, constant = factors("cosine"), factors("linear"), factors("constant")
    for values in (cosine, linear, constant):
        assert values[:4] == pytest.approx([0.325, 0.55, 0.775, 1.0])
    assert cosine[4] == 1.0 and cosine[8] == pytest.approx(0.6)
    assert cosine[6] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert cosine[11] == pytest.approx(0.2 + 0.8 * 0.03806, abs=1e-5)
    assert linear[4:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert constant[4:] == [1.0] * 8
    assert schedule_factor(0, 10, OptimizerConfig(warmup=0)) == 1.0
    assert schedule_factor(2, 3, OptimizerConfig(warmup=1000)) == 1.0  # a short run warms up all the time


def test_groups_keep_their_ratio() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "peak": peak} for p, peak in zip(parameters, (0.1, 0.02), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rates([optimizer], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "adamw or muon, got 'sgd'"),
        ({"schedule": "step"}, "cosine, linear, constant, got 'step'"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_optimizer(OptimizerConfig(**changes))


def test_muon_needs_whole_matrices(tiny: Any) -> None:
    with pytest.raises(InputError, match="FSDP"):
        build_optimizers(tiny[0], OptimizerConfig(name="muon"), sharded=True)
