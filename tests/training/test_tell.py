"""Fitting a projector to what words say of regions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tap_llm.errors import InputError
from tap_llm.region_llm.adapters import load_adapter
from tap_llm.region_llm.projectors import box_code
from training import language, tell
from training.config import from_dict
from training.language_objective import LanguageObjective, told_embeddings
from training.stored_scenes import open_stored_scenes
from training.talks import words_of
from training.tell import TellConfig, TellObjective, ToldRegions

RUN = {"workers": 0, "precision": "no", "tensorboard": False, "log_every": 1}
SIZE = {"hidden_size": 32, "layers": 1, "heads": 2, "mlp": 48, "vocabulary": 400}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of its recipe, hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "TOKENIZER_TALKS", 60)
        patch.setattr(language, "VALIDATION_BATCHES", 1)
        run = {**RUN, "output_dir": str(tmp_path_factory.mktemp("llm")), "steps": 2, "batch_size": 2}
        return language.main(from_dict(language.LanguageConfig, {"model": SIZE, "run": run}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store") / "scenes")


def settings(folder: Path, llm: Path | None, store: str, **run: Any) -> TellConfig:
    model = {"llm": str(llm) if llm else None, "projector": "lite", "projector_hidden": 64, "dtype": "float32"}
    data = {"scene_share": 1.0, "shape_share": 1.0, "scene_size": [96, 72], "store": {"folder": store, "scenes": 40}}
    fixed = {**RUN, "output_dir": str(folder), "steps": 60, "batch_size": 64, "evaluate_every": 60}
    optimizer = {"learning_rate": 0.01, "warmup": 5, "weight_decay": 0.0}
    raw = {"model": model, "data": data, "optimizer": optimizer, "run": {**fixed, **run}}
    return from_dict(TellConfig, raw)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, llm: Path, store: str) -> Path:
    return tell.main(settings(tmp_path_factory.mktemp("told"), llm, store))


def test_the_projector_comes_near_to_what_words_say(told: Path) -> None:
    lines = [json.loads(line) for line in (told.parent / "log.jsonl").read_text().splitlines()]
    losses = [line["loss/words"] for line in lines if "loss/words" in line]
    assert losses[0] > 1.5 and losses[-1] < 0.6
    assert next(line["validation/cosine"] for line in lines if "validation/cosine" in line) > 0.6


def test_boxes_have_the_code_of_the_language_model(told: Path, llm: Path) -> None:
    """All in all a region's token is what the language model was trained with, where the words are found exactly."""
    model, processor = load_adapter(told)
    objective = LanguageObjective(model.model.language_model, processor.region_token_id)
    language.load_region_code(objective.position, model.model.language_model.config.initializer_range, str(llm))
    projector, boxes = model.model.projector, torch.rand(6, 4)
    code = projector.semantic.position(boxes) * projector.scale
    assert box_code(boxes).shape == (6, 64)
    torch.testing.assert_close(code, objective.position(boxes) * model.model.language_model.config.initializer_range)
    words = torch.randint(5, 100, (6, 3))
    bags = told_embeddings(model.get_input_embeddings(), words)
    projector.semantic.feature.forward = lambda _: bags / projector.scale  # type: ignore[method-assign]
    expected = objective.embed(torch.full((1, 6), processor.region_token_id), words, boxes)[0]
    found = projector.semantic(torch.zeros(6, 128), boxes) * projector.scale
    torch.testing.assert_close(found, expected)


def test_words_stand_beside_the_features_of_their_regions(told: Path, store: str) -> None:
    _, processor = load_adapter(told)
    stored = open_stored_scenes(store, None)
    held = ToldRegions(stored, processor.tokenizer, 8, 0, validation=True)[0]
    count = len(stored.scenes[0].things)
    assert torch.equal(held["features"][:count], stored.tokens[0].semantic_tokens.float())
    said = [processor.tokenizer.decode(row[row >= 0]) for row in held["words"][:count]]
    assert said == [words_of(stored.scenes[0], place) for place in range(count)]
    assert len(held["words"]) == count + len(stored.scenes[20].things)
    batches = ToldRegions(stored, processor.tokenizer, 8, 0)
    assert torch.equal(batches[3]["words"], batches[3]["words"]) and len(batches[3]["words"]) == 8


def test_the_code_and_the_language_model_stay_as_they_are(told: Path) -> None:
    model, _ = load_adapter(told, trainable=True)
    assert TellObjective(model).counts({"features": torch.zeros(5, 128)}) == {"words": 5.0}
    config = json.loads((told.parent / "settings.json").read_text())
    assert config["model"]["projector_hidden"] == 64 == model.config.projector_hidden_size


def test_what_is_missing_is_named(tmp_path: Path, llm: Path, store: str) -> None:
    with pytest.raises(InputError, match="name the language model, model.llm"):
        tell.main(settings(tmp_path, None, store))
    with pytest.raises(InputError, match="and a folder for the scenes"):
        tell.main(settings(tmp_path, llm, ""))
