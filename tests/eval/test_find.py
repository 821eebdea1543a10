"""Finding by text on scenes: what is asked, scores by hand, every switch and ablation on random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled import run_quietly
from random_clip import random_clip

from eval.find import ABLATIONS, Find, main
from eval.find_scenes import FindScenes, masks_by_name
from eval.find_scores import class_miou, find_metrics
from tap_llm.clip_as_rnn import CarConfig, CarPipeline
from tap_llm.data.scenes import SceneComposer
from tap_llm.errors import InputError

SIZE = (64, 48)


@pytest.fixture(scope="module")
def scenes() -> FindScenes:
    return FindScenes(SceneComposer(), 3, 10**9, SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "clip"
    random_clip().save_pretrained(path)
    return path


# What is asked


def test_half_of_the_queries_are_absent(scenes: FindScenes) -> None:
    for index in range(3):
        scene = scenes[index]
        truth = scenes.composer.scene(10**9 + index, SIZE)
        present = [query for query, mask in zip(scene.queries, scene.masks, strict=True) if mask.any()]
        absent = [query for query, mask in zip(scene.queries, scene.masks, strict=True) if not mask.any()]
        assert set(present) == set(truth.names) and len(absent) == len(present)
        assert {word for name in absent for word in name.split()}.isdisjoint(
            word for name in present for word in name.split()
        )
        assert len(set(scene.queries)) == len(scene.queries)
        assert np.array_equal(scene.masks.any(axis=0), truth.masks.any(axis=0))
    assert scenes[1].fingerprint == scenes[1].fingerprint != scenes[0].fingerprint
    assert len(FindScenes(SceneComposer(), 1, 10**9, SIZE, distractors=0)[0].queries) == len(set(truth_names(0))) + 1
    with pytest.raises(IndexError):
        scenes[3]


def truth_names(index: int) -> list[str]:
    return SceneComposer().scene(10**9 + index, SIZE).names


def test_objects_of_one_name_are_one_mask() -> None:
    scene = SceneComposer(objects=(9, 9)).scene(7, (200, 150))
    repeated = next(name for name in scene.names if scene.names.count(name) > 1)
    (mask,) = masks_by_name(scene, [repeated])
    assert mask.sum() == sum(own.sum() for own, name in zip(scene.masks, scene.names, strict=True) if name == repeated)


# Scores


def answer(found: int, shared: int) -> dict[str, Any]:
    return {"score": 0.5, "found": found, "shared": shared, "mask": None}


def test_scores_by_hand() -> None:
    predictions = [
        {
            "queries": ["kite", "dog", "star", "key"], "pixels": [10, 20, 0, 0],
            "found": {"v": {"steps": 2, "queries": [answer(20, 10), answer(0, 0), answer(0, 0), answer(4, 0)]}},
        },
        {
            "queries": ["star", "kite"], "pixels": [8, 0],
            "found": {"v": {"steps": 1, "queries": [answer(8, 8), answer(5, 0)]}},
        },
        {"queries": ["dog", "cup"], "pixels": [10, 0], "fault": "NaN"},
    ]  # fmt: skip
    metrics = find_metrics(predictions, "v")
    assert (metrics["present"], metrics["absent"]) == (4, 4)
    assert metrics["present_miou"] == pytest.approx((0.5 + 0 + 1 + 0) / 4)
    assert metrics["all_miou"] == pytest.approx((0.5 + 0 + 1 + 0 + 1) / 8)
    # kite 10 of 20 and 5 in vain, dog nothing of 30, star all
    assert metrics["class_miou"] == pytest.approx((10 / 25 + 0 + 1) / 3)
    assert metrics["present_kept"] == 2 / 4 and metrics["absent_rejected"] == 1 / 4
    assert metrics["steps"] == 1.5
    assert class_miou([]) is None


# CaR


def test_every_variant_is_what_car_itself_finds(scenes: FindScenes, tmp_path: Path) -> None:
    car = CarPipeline(random_clip(), config=CarConfig(refine="none", keep_threshold=0.05))
    variants = {"all": {}, "first": {"max_steps": 1}, "plain": {"cam": "grad_cam", "prompts": ("circle",)}}
    found = run_quietly(Find(car, scenes, variants), tmp_path / "r.json")
    scene, prediction = scenes[0], found.predictions[0]
    for name, options in variants.items():
        direct = car(scene.image, scene.queries, **options)
        rows = prediction["found"][name]["queries"]
        assert [row["found"] for row in rows] == direct.masks.sum(axis=(1, 2)).tolist()
        assert [row["shared"] for row in rows] == (direct.masks & scene.masks).sum(axis=(1, 2)).tolist()
        assert prediction["found"][name]["steps"] == direct.steps
    assert found.results["metrics"]["first"]["steps"] == 1
    assert found.results["queries"] == 3 * sum(len(one["queries"]) for one in found.predictions)
    (group,) = json.loads((tmp_path / "r.cases.json").read_text())  # of the first variant
    assert group["cases"] == 3 and "there): " in group["best"][0]["text"]


def test_ablations_of_the_paper(
    folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model", str(folder), "--tap", str(model_folder), "--ablations", "--count", "1", "--size", "64", "48",
        "--out", str(tmp_path / "r.json"), "--device", "cpu",
    ]  # fmt: skip
    found = main(arguments)
    metrics = found.results["metrics"]
    assert list(metrics) == list(ABLATIONS)
    assert {"CRF and TAP", "CRF", "no refinement", "CRF, no recurrence", "CRF, plain Grad-CAM", "CRF, blur alone"} < {
        *metrics
    }
    assert metrics["CRF, no recurrence"]["steps"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("CRF") for line in lines) == len(ABLATIONS) - 1
    assert any("absent_rejected" in line for line in lines)


def test_switches(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder), "--count", "1", "--size", "64", "48", "--refine", "none", "--device", "cpu"]
    switches = ["--no-recurrence", "--plain-cam", "--prompts", "circle", "blur"]
    found = main([*arguments, *switches, "--out", str(tmp_path / "r.json")]).results
    assert found["settings"]["variants"] == {"find": {"max_steps": 1, "cam": "grad_cam", "prompts": ("circle", "blur")}}
    assert list(found["metrics"]) == ["find"]
    with pytest.raises(InputError, match="--ablations tries all switches"):
        main([*arguments, "--ablations", "--plain-cam"])
    with pytest.raises(InputError, match="--hold-out splits"):
        main([*arguments, "--hold-out", "0.1"])
    with pytest.raises(InputError, match="use --refine"):
        main([*arguments, "--set", "refine=crf"])
