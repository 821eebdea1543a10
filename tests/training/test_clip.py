"""The recipe of the small CLIP from start to end: it learns, resumes exactly, and leaves a plain CLIP."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from tap_llm.errors import InputError
from training import clip, loop
from training.clip import ClipSize, ClipTrainConfig, make_clip
from training.clip_batches import ClipDataConfig, ClipPictures
from training.config import from_dict, load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tap_tiny_clip" / "1_clip.yaml"
SIZE = ClipSize(
    image_size=64, hidden_size=32, layers=2, heads=2, mlp=48, text_hidden_size=16, text_layers=1, text_heads=2,
    text_mlp=24, projection=16, vocabulary=400,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "TOKENIZER_ROUNDS", 1)
    monkeypatch.setattr(clip, "VALIDATION_BATCHES", 2)


def settings(folder: Path, half: bool = False, **run: Any) -> ClipTrainConfig:
    fixed = {
        "output_dir": str(folder), "steps": 4, "batch_size": 3, "workers": 0, "precision": "no", "tensorboard": False,
        "log_every": 1, "evaluate_every": 4, "checkpoint_every": 2,
    }  # fmt: skip
    data = {"scene_side": [64, 80], "mosaic_grid": [2, 2], "distractors": 6, "background_words": 4}
    raw = {"model": {**asdict(SIZE), "half": half}, "data": data, "run": {**fixed, **run}}
    return from_dict(ClipTrainConfig, {**raw, "optimizer": {"learning_rate": 3e-3, "warmup": 1}})


def losses(folder: Path) -> list[dict[str, float]]:
    """Logged steps without times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "data_wait_share")} for line in lines]


def test_finished_run_is_a_plain_clip(tmp_path: Path) -> None:
    final = clip.main(settings(tmp_path / "run", half=True))
    lines = losses(tmp_path / "run")
    validated = {key.removeprefix("validation/") for key in lines[-1] if key.startswith("validation/")}
    assert {"top1/patch", "top1/view", "top1/caption", "top1/background", "iou/cam"} <= validated
    model, tokenizer = CLIPModel.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    processor = AutoImageProcessor.from_pretrained(final, backend="pil")
    assert model.dtype == torch.float32 and model.text_model.eos_token_id == tokenizer.eos_token_id == 3
    stored = load_file(final / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.ndim > 1} == {torch.float16}
    assert sum(value.nbytes for value in stored.values()) < 2.2 * sum(weight.numel() for weight in model.parameters())
    photo = np.full((50, 70, 3), 90, dtype=np.uint8)
    inputs = dict(processor([photo], return_tensors="pt"))
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    texts = tokenizer(["a red square", "a clean origami circle."], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, **texts)
        alone = model(**inputs, **tokenizer(["a red square"], return_tensors="pt"))
    assert output.logits_per_image.shape == (1, 2) and output.text_embeds.isfinite().all()
    torch.testing.assert_close(output.text_embeds[:1], alone.text_embeds, atol=1e-5, rtol=1e-4)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    clip.main(settings(tmp_path / "whole", ema_decay=0.9))
    original = loop.Journal.step

    def die(self: Any, done: int, *rest: Any, **more: Any) -> None:
        original(self, done, *rest, **more)
        if done == 3:
            raise RuntimeError("stopped by the test")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped by the test"):
        patch.setattr(loop.Journal, "step", die)
        clip.main(settings(tmp_path / "parts", ema_decay=0.9))
    clip.main(settings(tmp_path / "parts", ema_decay=0.9, resume=True))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("parts", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_goes_on_from_a_finished_model(tmp_path: Path) -> None:
    """With its sizes, tokenizer and colours, whatever the sizes of the configuration say."""
    first = clip.main(settings(tmp_path / "first"))
    colours = json.loads((first / "preprocessor_config.json").read_text()) | {"image_mean": [0.4, 0.5, 0.6]}
    (first / "preprocessor_config.json").write_text(json.dumps(colours))
    config = settings(tmp_path / "second", steps=1)
    config.model = ClipSize(start=str(first))
    config.optimizer.learning_rate = 0.0
    second = clip.main(config)
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (second / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    assert json.loads((second / "preprocessor_config.json").read_text())["image_mean"] == [0.4, 0.5, 0.6]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (first / name).unlink()
    with pytest.raises(InputError, match="has no tokenizer, without which it cannot go on"):
        clip.main(replace(config, run=replace(config.run, output_dir=str(tmp_path / "third"))))


def test_it_learns(tmp_path: Path) -> None:
    clip.main(settings(tmp_path / "run", steps=25, checkpoint_every=25, evaluate_every=0))
    lines = losses(tmp_path / "run")
    for name in ("patch", "view"):
        first, last = (np.mean([line[f"loss/{name}"] for line in part]) for part in (lines[:4], lines[-4:]))
        assert last < first - 0.2, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "model.layers must be at least 1"),
        ({"image_size": 60}, "model.image_size 60 must be a multiple of model.patch_size 16"),
        ({"text_hidden_size": 17}, "model.text_hidden_size 17 must be a multiple of model.text_heads 2"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClipSize(**{**asdict(SIZE), **change}).check()


def test_tap_tiny_clip_is_small() -> None:
    """Below 8 MB in half precision."""
    config = load_config(ClipTrainConfig, CONFIG)
    config.model.check()
    config.data.check()
    words: Any = type("Words", (), {"__len__": lambda self: config.model.vocabulary, "bos_token_id": 1,
                                    "eos_token_id": 3, "pad_token_id": 0})()  # fmt: skip
    with torch.device("meta"):
        count = sum(weight.numel() for weight in make_clip(config.model, words).parameters())
    assert config.model.half and 2 * count < 8e6


def test_pictures_have_the_side_of_the_model() -> None:
    assert ClipPictures(ClipDataConfig(scene_side=[64, 64]), SIZE.image_size, SIZE.patch_size)[0].image.shape[0] == 64
