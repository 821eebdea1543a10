"""The two stages of region chat: what they train, what they leave, and that cached tokens change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from region_chat import write_dialogues, write_llm

from tap_llm.data.readers import open_samples
from tap_llm.errors import InputError
from tap_llm.loading import load_tap
from tap_llm.region_llm.adapters import load_adapter
from tap_llm.region_llm.left_out import LeftOutTap
from tap_llm.region_llm.lora import attach_lora, freeze_for_alignment, lora_config
from tap_llm.region_llm.token_builder import build_token_cache
from tap_llm.region_llm.token_cache import TokenCache
from training import align, chat
from training.chat_objective import ChatObjective
from training.config import from_dict
from training.dialogues import DialogueBatches, Dialogues
from training.llms import build_llm, open_tokens
from training.optimization import build_optimizers

RUN = {"steps": 3, "batch_size": 3, "workers": 0, "precision": "no", "tensorboard": False, "log_every": 1,
       "evaluate_every": 3}  # fmt: skip
OPTIMIZER = {"learning_rate": 0.01, "warmup": 1, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an LLM, dialogues, and the region tokens of their pictures in float32."""
    path = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    write_llm(path / "llm")
    samples = open_samples(write_dialogues(path / "talk.jsonl", 8))
    tap, processor, _ = load_tap("tap-tiny", dtype="float32")
    build_token_cache(samples, tap, processor, path / "tokens", dtype="float32", shard_size=3)
    return path


def settings(folder: Path, name: str, model: dict[str, Any], cached: bool = False, **run: Any) -> dict[str, Any]:
    data = {"samples": [str(folder / "talk.jsonl")], "group": 2}
    data |= {"tokens": [str(folder / "tokens")]} if cached else {}
    model = {"dtype": "float32", **model}
    return {
        "model": model, "data": data, "optimizer": OPTIMIZER,
        "run": {**RUN, "output_dir": str(folder / name), **run},
    }  # fmt: skip


def run_align(folder: Path, name: str, cached: bool = False) -> Path:
    model = {"llm": str(folder / "llm"), "chat_template": "plain"}
    return align.main(from_dict(align.AlignConfig, settings(folder, name, model, cached)))


def run_chat(folder: Path, name: str, start: Path, cached: bool = False) -> Path:
    config = {**settings(folder, name, {"start": str(start)}, cached), "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    return chat.main(from_dict(chat.ChatConfig, config))


@pytest.fixture(scope="module")
def aligned(folder: Path) -> Path:
    return run_align(folder, "align")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss/text"] for line in lines if "loss/text" in line]


def logits(adapter: Path, sample: Any) -> torch.Tensor:
    model, processor = load_adapter(adapter)
    inputs = processor([sample.conversations], images=[[sample.load_image()]], regions=[sample.prompts()],
                       return_labels=True, allow_unused_regions=True)  # fmt: skip
    with torch.no_grad():
        return model(**inputs).logits


def test_stages_leave_adapters_that_load(folder: Path, aligned: Path) -> None:
    tuned = run_chat(folder, "chat", aligned)
    names = {path.name for path in aligned.iterdir()}
    assert {"tap_llm_adapter.json", "projector.safetensors", "processor_config.json"} <= names
    assert "adapter_model.safetensors" not in names and (tuned / "adapter_model.safetensors").is_file()
    assert not (tuned / "model.safetensors").exists()  # nothing of TAP and the LLM
    sample = open_samples(folder / "talk.jsonl")[1]
    before, after = logits(aligned, sample), logits(tuned, sample)
    assert before.isfinite().all() and after.isfinite().all() and (before - after).abs().max() > 1e-3
    again = run_chat(folder, "more", tuned)  # goes on with the LoRA that is there
    assert (logits(again, sample) - after).abs().max() > 1e-3


@pytest.mark.parametrize("stage", ["align", "chat"])
def test_cached_tokens_give_the_losses_of_images(stage: str, folder: Path, aligned: Path) -> None:
    if stage == "align":
        run_align(folder, "align_cached", cached=True)
        pair = folder / "align", folder / "align_cached"
    else:
        run_chat(folder, "chat_images", aligned)
        run_chat(folder, "chat_cached", aligned, cached=True)
        pair = folder / "chat_images", folder / "chat_cached"
    assert losses(pair[0]) == pytest.approx(losses(pair[1]), abs=1e-4) and len(losses(pair[0])) == 3


def test_with_cached_tokens_no_image_encoder_is_in_memory(folder: Path) -> None:
    config = from_dict(
        align.AlignConfig, settings(folder, "x", {"llm": str(folder / "llm"), "chat_template": "plain"}, True)
    )
    model, processor = build_llm(config.model)
    open_tokens(config.data, model, processor)
    assert isinstance(model.model.tap, LeftOutTap) and not list(model.model.tap.parameters())
    with pytest.raises(InputError, match="give region_features in place of images"):
        model.extract_features(pixel_values=torch.zeros(1, 3, 256, 256))


def test_what_gets_gradients(folder: Path, aligned: Path) -> None:
    config = from_dict(align.AlignConfig, settings(folder, "x", {"start": str(aligned)}))
    model, _ = build_llm(config.model)
    freeze_for_alignment(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("model.projector.") for name in trained)
    attach_lora(model, lora_config(model, r=2))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    lora = {name for name in trained if ".lora_" in name}
    assert len(lora) == 2 * 7 * 2  # A and B of 7 layers in 2 blocks
    assert all(name.startswith("model.projector.") for name in trained - lora) and trained - lora
    config.optimizer.factors = {"projector": 0.25}
    peaks = {
        group["peak"] for optimizer in build_optimizers(model, config.optimizer) for group in optimizer.param_groups
    }
    assert peaks == {0.01, 0.0025}


def test_batches_that_name_no_region_have_gradients_too(folder: Path, aligned: Path) -> None:
    """Or alignment stops at them, and several processes wait for one another."""
    config = from_dict(align.AlignConfig, settings(folder, "x", {"start": str(aligned)}))
    model, processor = build_llm(config.model)
    freeze_for_alignment(model)
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    losses, _ = ChatObjective(model)(**processor([talk], return_labels=True))
    losses["text"].backward()
    gradients = [value.grad for value in model.model.projector.parameters()]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)


def test_no_llm_is_named(folder: Path) -> None:
    config = from_dict(align.AlignConfig, settings(folder, "x", {}))
    with pytest.raises(InputError, match="model.llm: name a causal language model"):
        align.main(config)


def test_tokens_of_another_tap_or_other_data(folder: Path, tmp_path: Path) -> None:
    other = write_dialogues(tmp_path / "talk.jsonl", 5)
    raw = settings(folder, "x", {"llm": str(folder / "llm"), "chat_template": "plain"}, cached=True)
    raw["data"]["samples"] = [str(other)]
    with pytest.raises(InputError, match="other data"):
        align.main(from_dict(align.AlignConfig, raw))


def test_sorting_by_length_reads_no_tokens(folder: Path, aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_dict(align.AlignConfig, settings(folder, "x", {"start": str(aligned)}, cached=True))
    model, processor = build_llm(config.model)
    caches, _ = open_tokens(config.data, model, processor)
    read: list[int] = []
    original = TokenCache.__getitem__
    monkeypatch.setattr(TokenCache, "__getitem__", lambda cache, index: read.append(index) or original(cache, index))
    batch = DialogueBatches(Dialogues(config.data, caches=caches), processor, 3)[0]
    assert len(read) == len(batch["labels"]) == 3


@pytest.mark.parametrize("name", ["projector", "chat_template", "region_token"])
def test_an_adapter_brings_its_own(name: str, folder: Path, aligned: Path) -> None:
    config = from_dict(align.AlignConfig, settings(folder, "x", {"start": str(aligned), name: "plain"}))
    with pytest.raises(InputError, match=f"model.{name} is for new models"):
        build_llm(config.model)
