"""Settings: the paper's numbers, round trips, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tap_llm import InputError, MissingFileError
from tap_llm.clip_as_rnn import PRESETS, CarConfig, Compat, get_preset, vocabulary
from tap_llm.clip_as_rnn.configuration_car import CONFIG_FILE

BASE, LARGE = "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14"
PUBLISHED: dict[str, tuple[str, float, float, float, set[str], int, str]] = {
    "voc": (LARGE, 0.4, 0.6, 0.4, {"circle", "blur"}, 15, "semantic"),
    "coco_object": (LARGE, 0.5, 0.3, 0.5, {"blur", "gray"}, 15, "semantic"),
    "context": (LARGE, 0.6, 0.25, 0.4, {"blur", "circle"}, 15, "semantic"),
    "context_paper": (LARGE, 0.6, 0.2, 0.4, {"blur", "circle"}, 15, "semantic"),
    "ade150": (LARGE, 0.6, 0.25, 0.7, {"gray", "blur"}, 15, "semantic"),
    "ade847": (LARGE, 0.6, 0.25, 0.7, {"gray", "blur"}, 15, "semantic"),
    "context459": (LARGE, 0.4, 0.25, 0.7, {"gray", "blur"}, 15, "semantic"),
    "refcoco": (BASE, 0.5, 0.3, 0.5, {"circle"}, 0, "referring"),
    "refcoco_paper": (BASE, 0.5, 0.3, 0.5, {"circle", "blur"}, 0, "referring"),
    "refcoco+": (BASE, 0.2, 0.1, 0.5, {"circle", "blur"}, 0, "referring"),
    "refcocog": (BASE, 0.5, 0.1, 0.6, {"circle", "blur"}, 0, "referring"),
    "gres": (LARGE, 0.5, 0.0, 0.3, {"circle"}, 0, "referring"),
    "default": (LARGE, 0.6, 0.3, 0.6, {"gray", "blur"}, 15, "semantic"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    config = get_preset(name)
    found = (
        config.g, config.mask_threshold, config.keep_threshold, config.box_threshold, set(config.prompts),
        len(config.templates), config.mode,
    )  # fmt: skip
    assert found == PUBLISHED[name]
    assert config.f == BASE and config.background == vocabulary.BACKGROUND and config.compat == Compat()


def test_context_has_stuff_of_its_own() -> None:
    config = get_preset("context")
    assert len(config.stuff) == 21 and set(config.stuff_prompts) == {"blur", "gray"} and not config.mutual_background
    assert get_preset("context_paper").mutual_background


def test_word_lists() -> None:
    lists = {
        "TEMPLATES": 15, "BACKGROUND": 23, "BACKGROUND_TERRESTRIAL": 32, "BACKGROUND_AQUATIC": 44,
        "BACKGROUND_MAN_MADE": 36, "BACKGROUND_LARGE": 112, "VOC_QUERIES": 20, "COCO_QUERIES": 80, "CONTEXT_STUFF": 21,
    }  # fmt: skip
    for name, count in lists.items():
        words = getattr(vocabulary, name)
        assert len(words) == len(set(words)) == count, name
    assert "helmet" in vocabulary.BACKGROUND and "helmet" not in vocabulary.BACKGROUND_LARGE
    assert set(vocabulary.BACKGROUND) - {"helmet"} <= set(vocabulary.BACKGROUND_LARGE)
    assert vocabulary.TEMPLATES[6:9] == tuple(f"a photo of a {size} {{}}." for size in ("small", "medium", "large"))


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name: str, tmp_path: Path) -> None:
    config = get_preset(name).updated(compat=Compat(box_clip=True), max_steps=3, min_similarity=0.2)
    config.save(tmp_path)
    assert CarConfig.load(tmp_path) == config


def test_lists_are_taken_as_tuples() -> None:
    assert CarConfig(prompts=["circle"]).prompts == ("circle",)  # type: ignore[arg-type]
    assert CarConfig(compat={"box_clip": True}).compat.box_clip  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "panoptic"}, "mode must be one of semantic, referring"),
        ({"refine": "sam"}, "refine must be one of none, crf, tap"),
        ({"prompts": ["halo"]}, "unknown visual prompt 'halo'"),
        ({"prompts": "circle"}, "prompts must be a list of texts"),
        ({"background": "sky"}, "background must be a list of texts"),
        ({"templates": ["a photo"]}, "must have {} in the place of the query"),
        ({"f_templates": []}, "at least one text"),
        ({"mask_threshold": 1.2}, "mask_threshold must lie between 0 and 1"),
        ({"box_threshold": float("nan")}, "box_threshold must lie between 0 and 1"),
        ({"keep_threshold": -0.1}, "keep_threshold must be a number of at least 0"),
        ({"keep_threshold": "high"}, "keep_threshold must be a number"),
        ({"g_batch": 0}, "g_batch must be a whole number of at least 1"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"min_similarity": "low"}, "min_similarity must be a number or None"),
        ({"keep_treshold": 0.3}, "did you mean keep_threshold"),
        ({"compat": {"box": True}}, "compat: unknown name 'box'"),
        ({"compat": {"box_clip": 1}}, "box_clip must be true or false"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CarConfig().updated(**options)


def test_unknown_presets_are_named() -> None:
    with pytest.raises(InputError, match="did you mean refcoco"):
        get_preset("RefCOCOo")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=CONFIG_FILE):
        CarConfig.load(tmp_path)
    for content in ("{", "[]", json.dumps({"theta": 1})):
        (tmp_path / CONFIG_FILE).write_text(content)
        with pytest.raises(InputError, match=CONFIG_FILE):
            CarConfig.load(tmp_path)
