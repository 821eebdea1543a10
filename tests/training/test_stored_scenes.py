"""Scenes that TAP reads once: the same features as from their pictures, and ever new conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from region_chat import write_llm

from tap_llm.errors import InputError
from tap_llm.loading import load_tap
from tap_llm.region_llm.features import extract_features
from tap_llm.tap.processing_tap import TapProcessor
from training import align
from training.config import from_dict
from training.dialogues import DialogueConfig, Dialogues, scene_composer
from training.stored_scenes import ScenePictures, StoreConfig, StoredScenes, open_stored_scenes, store_scenes

SIZE = (96, 72)


def scenes(folder: Path, **settings: Any) -> DialogueConfig:
    store = StoreConfig(str(folder), **{"scenes": 40, "dtype": "float32", "click_share": 0.5, **settings})
    return DialogueConfig(scene_share=1.0, shape_share=1.0, scene_size=list(SIZE), store=store)


def pictures(config: DialogueConfig) -> ScenePictures:
    return ScenePictures(scene_composer(config), config.store, SIZE)


@pytest.fixture(scope="module")
def tap() -> tuple[Any, TapProcessor]:
    model, processor, _ = load_tap("tap-tiny", dtype="float32")
    return model, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tap: tuple[Any, TapProcessor]) -> Path:
    path = tmp_path_factory.mktemp("store")
    store_scenes(pictures(scenes(path)), *tap, 2, 0, {"seed": 0})
    return path


@pytest.fixture(scope="module")
def stored(folder: Path) -> StoredScenes:
    return open_stored_scenes(str(folder), None)


def test_features_are_those_of_the_pictures(folder: Path, stored: StoredScenes, tap: tuple[Any, TapProcessor]) -> None:
    sample = pictures(scenes(folder))[7]
    inputs = tap[1]([sample.load_image()], [sample.prompts()])
    del inputs["original_sizes"]
    with torch.no_grad():
        fresh = extract_features(tap[0].model, **inputs, roi_grid=2)
    kept = stored.tokens[7]
    assert torch.allclose(kept.semantic_tokens, fresh.semantic_tokens, atol=1e-4)
    assert torch.allclose(kept.roi, fresh.roi, atol=1e-4) and torch.allclose(kept.boxes, fresh.boxes, atol=1e-4)


def test_about_half_of_the_regions_are_clicked(folder: Path) -> None:
    samples = [pictures(scenes(folder))[index] for index in range(40)]
    clicked = [["points" in region for region in sample.prompts()] for sample in samples]
    assert 0.35 < np.mean(np.concatenate(clicked)) < 0.65


def test_scenes_keep_their_words(folder: Path, stored: StoredScenes) -> None:
    drawn, kept = pictures(scenes(folder)).scene(3), stored.scenes[3]
    assert kept.things == drawn.things and kept.captions == drawn.captions
    assert kept.attributes == drawn.attributes and kept.visible == drawn.visible and kept.kinds == drawn.kinds


def test_conversations_are_new_and_validation_has_scenes_of_its_own(folder: Path, stored: StoredScenes) -> None:
    train, held = (Dialogues(scenes(folder), 1, validation, stored=stored) for validation in (False, True))
    talks = [train[number] for number in range(60)]
    assert {talk.record % 20 for talk in talks}.isdisjoint({0})
    assert {held[number].record for number in range(20)} == {0, 20}
    assert len({json.dumps(talk.messages) for talk in talks}) > 55
    assert train[5] == Dialogues(scenes(folder), 1, stored=stored)[5]
    assert len(talks[0].features()) == len(stored.scenes[talks[0].record].things)


def test_a_stage_trains_on_them(tmp_path: Path) -> None:
    write_llm(tmp_path / "llm")
    run = {"steps": 2, "batch_size": 3, "workers": 0, "precision": "no", "tensorboard": False, "log_every": 1,
           "evaluate_every": 2, "output_dir": str(tmp_path / "run")}  # fmt: skip
    store = {"folder": str(tmp_path / "store"), "scenes": 20}
    data = {"scene_share": 1.0, "shape_share": 1.0, "scene_size": list(SIZE), "store": store}
    config = {"model": {"llm": str(tmp_path / "llm"), "chat_template": "plain", "dtype": "float32"},
              "data": data, "run": run}  # fmt: skip
    assert (align.main(from_dict(align.AlignConfig, config)) / "projector.safetensors").is_file()
    changed = config | {"data": data | {"scene_size": [100, 80]}, "run": run | {"output_dir": str(tmp_path / "b")}}
    with pytest.raises(InputError, match=r"store holds scenes of other settings .*name another data.store.folder"):
        align.main(from_dict(align.AlignConfig, changed))


def test_damage_is_told(folder: Path, stored: StoredScenes) -> None:
    text = (folder / "scenes.jsonl").read_text()
    for damaged, message in ((text[:-30], "is damaged"), ("", "0 scenes in scenes.jsonl, tokens of 40")):
        (folder / "scenes.jsonl").write_text(damaged)
        with pytest.raises(InputError, match=message):
            open_stored_scenes(str(folder), None)
    (folder / "scenes.jsonl").write_text(text)
