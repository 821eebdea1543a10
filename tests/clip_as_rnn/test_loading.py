"""From names to models: presets, folders, hub names, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_clip import random_car, random_clip
from safetensors.torch import load_file, save_file

from tap_llm import InputError
from tap_llm.clip_as_rnn import CarConfig, Clip, ClipAsRnn, modeling
from tap_llm.clip_as_rnn.loading import find_config, load_clip
from tap_llm.data.crops import CropSettings

BASE, LARGE = "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14"
NAMES = ["cat", "dog", "bus"]


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one CLIP model."""
    path = tmp_path_factory.mktemp("clip")
    random_clip().save_pretrained(path)
    return path


def test_pair_survives_saving(tmp_path: Path) -> None:
    car = random_car(keep_threshold=0.1, prompts=("circle",))
    car.save_pretrained(tmp_path)
    again = ClipAsRnn.from_pretrained(tmp_path, device="cpu")
    assert again.config.updated(f=BASE, g=LARGE) == car.config
    expected, found = car(picture(), NAMES), again(picture(), NAMES)
    assert found.trace == expected.trace and np.array_equal(found.masks, expected.masks)
    assert again.f.logit_scale is not again.g.logit_scale


def test_shared_model_is_saved_and_loaded_once(tmp_path: Path) -> None:
    settings = CropSettings(32, (0.5, 0.5, 0.5), (0.2, 0.3, 0.4))
    clip = random_clip()
    ClipAsRnn(Clip(clip.model, clip.tokenizer, settings)).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["car_config.json", "f"]
    again = ClipAsRnn.from_pretrained(tmp_path, device="cpu")
    assert again.f.logit_scale is again.g.logit_scale
    assert again._source_g.settings == settings


def test_saved_folders_can_move(tmp_path: Path) -> None:
    random_car().save_pretrained(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert ClipAsRnn.from_pretrained(tmp_path / "there", device="cpu")(picture(), NAMES).steps > 0


def test_folder_of_one_clip_is_f_and_g(folder: Path) -> None:
    car = ClipAsRnn.from_pretrained(folder, device="cpu", refine="none", keep_threshold=0.2)
    assert car.config.keep_threshold == 0.2 and car.f.logit_scale is car.g.logit_scale
    assert car.f.config._attn_implementation == "eager" and car.g.config._attn_implementation != "eager"
    assert car(picture(), NAMES).steps > 0


def test_half_precision_weights_run_in_float32_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    clip = random_clip()
    clip.model.half()
    clip.save_pretrained(tmp_path)
    assert ClipAsRnn.from_pretrained(tmp_path, device="cpu").g.dtype == torch.float32
    car = ClipAsRnn.from_pretrained(tmp_path, device="cpu", dtype="bfloat16", refine="none")
    assert car.g.dtype == torch.bfloat16 and car.f.dtype == torch.float32
    assert np.isfinite(car(picture(), NAMES).scores).all()


def test_loading_in_inference_mode(folder: Path) -> None:
    with torch.inference_mode():
        car = ClipAsRnn.from_pretrained(folder, device="cpu", refine="none")
    assert car(picture(), NAMES).steps > 0


@pytest.mark.parametrize(
    ("name", "pair"),
    [("default", (BASE, LARGE)), ("voc", (BASE, LARGE)), ("refcoco", (BASE, BASE)), (LARGE, (LARGE, LARGE))],
)
def test_hub_names(name: str, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are passed on as they are; nothing is downloaded here."""
    asked: list[str] = []

    def load(name: str, dtype: Any) -> Clip:
        asked.append(name)
        return random_clip()

    monkeypatch.setattr(modeling, "load_clip", load)
    car = ClipAsRnn.from_pretrained(name, device="cpu")
    assert (car.config.f, car.config.g) == pair and set(asked) == set(pair)
    assert len(asked) == len(set(pair))


def test_names_of_f_and_g_can_be_given(folder: Path) -> None:
    config = find_config("voc", f=str(folder), g=str(folder))
    assert config.f == config.g == str(folder) and config.keep_threshold == 0.6


@pytest.mark.parametrize("name", ["tap_vit_b_v1_1", "tap-tiny"])
def test_other_models_are_named(name: str) -> None:
    with pytest.raises(InputError, match="CLIP"):
        load_clip(name)


def test_unknown_names_list_the_presets() -> None:
    with pytest.raises(InputError, match=r"known presets: .*voc"):
        ClipAsRnn.from_pretrained("nowhere")
    with pytest.raises(InputError, match="did you mean keep_threshold"):
        ClipAsRnn.from_pretrained("voc", keep_treshold=1)


def test_damaged_folders_are_named(folder: Path, tmp_path: Path) -> None:
    random_clip().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    removed = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != removed}, weights, {"format": "pt"})
    with pytest.raises(InputError, match="1 tensors are missing"):
        load_clip(tmp_path)
    weights.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_clip(tmp_path)


def test_damaged_settings_are_named(folder: Path, tmp_path: Path) -> None:
    values = {"f": str(folder), "g": str(folder), "mode": "panoptic"}
    (tmp_path / "car_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="mode must be one of"):
        ClipAsRnn.from_pretrained(tmp_path)


def test_models_without_tokenizer_take_embeddings_only(tmp_path: Path) -> None:
    ClipAsRnn(Clip(random_clip().model), config=CarConfig()).save_pretrained(tmp_path)
    car = ClipAsRnn.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(InputError, match="text_embeddings"):
        car(picture(), NAMES)
