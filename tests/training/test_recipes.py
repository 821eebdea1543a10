"""Both recipes from start to end: they learn, resume exactly, survive kills, and agree over processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tap_llm import RegionPipeline
from tap_llm.errors import InputError
from training import caption, pretrain
from training.caption import CaptionConfig
from training.config import from_dict
from training.pretrain import PretrainConfig
from training.recipe import VALIDATION_BATCHES, Recipe

ROOT = Path(__file__).resolve().parents[2]


def run(settings: dict[str, Any], **changes: Any) -> Path:
    """A pre-training run with changed `run` settings; its output folder."""
    merged = {**settings, "run": {**settings["run"], **changes}}
    pretrain.main(from_dict(PretrainConfig, merged))
    return Path(merged["run"]["output_dir"])


def losses(folder: Path) -> list[dict[str, float]]:
    """Logged steps without times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "data_wait_share")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "final" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_finished_run_is_a_model_that_the_pipeline_takes(settings: dict[str, Any]) -> None:
    folder = run(settings)
    pipe = RegionPipeline.from_pretrained(folder / "final")
    found = pipe("examples/scene.jpg" if Path("examples").is_dir() else ROOT / "examples/scene.jpg",
                 regions=[{"box": [88, 160, 299, 361]}], captions=False)  # fmt: skip
    assert found[0]["mask"].shape == (480, 640)
    assert found[0]["concept"] in pipe.concepts.names
    assert not (folder / "final" / "checkpoints").exists()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


def test_resumed_run_equals_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """With all that could spoil it: moving average, accumulation, a worker, dropout, drop path."""
    settings["run"] |= {"ema_decay": 0.9, "accumulation": 2, "workers": 1}
    overrides = {part: dict(fields) for part, fields in settings["model"]["overrides"].items()}
    overrides["vision_config"]["drop_path_rate"] = 0.2
    overrides["mask_decoder_config"]["dropout"] = 0.1
    settings["model"] = {**settings["model"], "overrides": overrides}
    whole = run(settings, output_dir=str(tmp_path / "whole"))
    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "fit", stop_after(3))
        with pytest.raises(RuntimeError, match="stopped by the test"):
            run(settings, output_dir=str(parts))
    assert [line["step"] for line in losses(parts)] == [1, 2, 3]
    run(settings, output_dir=str(parts), resume=True)
    assert losses(parts) == losses(whole)
    assert same(weights(parts), weights(whole))


@pytest.mark.parametrize("step", [1, 3])
def test_resumed_captions_equal_the_uninterrupted_ones(settings: dict[str, Any], tmp_path: Path, step: int) -> None:
    """A fresh decoder with dropout and a tokenizer of its own; step 1 comes before the first checkpoint."""
    settings = {key: value for key, value in settings.items() if key != "loss"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption, "TOKENIZER_PICTURES", 20)
        for name in "whole", "parts":
            changed = {**settings, "run": {**settings["run"], "output_dir": str(tmp_path / name)}}
            if name == "parts":
                with pytest.MonkeyPatch.context() as kill, pytest.raises(RuntimeError, match="stopped by the test"):
                    kill.setattr(caption, "fit", stop_after(step))
                    caption.main(from_dict(CaptionConfig, changed))
                changed["run"]["resume"] = True
            caption.main(from_dict(CaptionConfig, changed))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def stop_after(step: int) -> Any:
    """`fit` that dies without warning after a step, as a killed process does."""
    from training import loop

    original = loop.Journal.step

    def fit(*args: Any, **kwargs: Any) -> Path:
        def die(self: Any, done: int, *rest: Any, **more: Any) -> None:
            original(self, done, *rest, **more)
            if done == step:
                raise RuntimeError("stopped by the test")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Journal, "step", die)
            return loop.fit(*args, **kwargs)

    return fit


def write_config(settings: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def command(config: Path, *settings: str) -> list[str]:
    return [sys.executable, "-m", "training.pretrain", "--config", str(config), *settings]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_kill_and_resume_from_the_command_line(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["run"] |= {"steps": 12, "checkpoint_every": 1, "evaluate_every": 0, "output_dir": str(tmp_path / "killed")}
    config = write_config(settings, tmp_path / "config.yaml")
    log = tmp_path / "killed" / "log.jsonl"
    with subprocess.Popen(command(config), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) >= 3)
        process.send_signal(signal.SIGKILL)
    again = subprocess.run(command(config), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "--resume" in again.stderr.splitlines()[-1]
    subprocess.run([*command(config), "--resume"], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    whole = run(settings, output_dir=str(tmp_path / "whole"))
    assert losses(tmp_path / "killed") == losses(whole)
    assert same(weights(tmp_path / "killed"), weights(whole))


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not start"
        time.sleep(0.05)


PLAIN_STEP = """
import sys
from pathlib import Path
import torch
from training import config, loop, pretrain

class Noted(torch.optim.SGD):
    def step(self, closure=None):
        gradients = {str(i): p.grad for i, p in enumerate(self.param_groups[0]["params"]) if p.grad is not None}
        torch.save(gradients, Path(settings.run.output_dir) / "gradients.pt")
        super().step(closure)

settings = config.load_config(pretrain.PretrainConfig, sys.argv[1], sys.argv[2:])
loop.build_optimizers = lambda module, *_: [Noted([{"params": module.parameters(), "peak": 1.0}], lr=1.0)]
pretrain.main(settings)
"""


def test_two_processes_give_the_gradients_of_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """Half the batch on each of two processes, BatchNorm in sync: the same losses and the same plain gradient step."""
    settings["prompts"] = {"stages": 1}  # later prompts are drawn for the batch of a process
    settings["run"] |= {"steps": 1, "batch_size": 4, "evaluate_every": 0, "clip_norm": 1e9, "seed": 3}
    config, script = write_config(settings, tmp_path / "config.yaml"), tmp_path / "plain_step.py"
    script.write_text(PLAIN_STEP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes, batch in (1, 4), (2, 2):
        given = [f"run.batch_size={batch}", f"run.output_dir={tmp_path / str(processes)}"]
        subprocess.run([*launch, str(processes), str(script), str(config), *given], cwd=ROOT, env=ENVIRONMENT,
                       check=True, capture_output=True, timeout=300)  # fmt: skip
    one, two = losses(tmp_path / "1")[0], losses(tmp_path / "2")[0]
    assert one == pytest.approx(two, rel=1e-4)
    assert one["gradient_norm"] > 1
    a, b = (torch.load(tmp_path / count / "gradients.pt") for count in "12")
    assert len(a) == len(b) > 100
    largest = max(gradient.abs().max() for gradient in a.values())
    for key in a:  # biases of keys have no gradient in theory, so what is there is rounding
        assert (a[key] - b[key]).abs().max() <= 1e-4 * a[key].abs().max() + 1e-9 * largest, key


def test_accumulation_gives_the_run_of_a_larger_batch(settings: dict[str, Any], tmp_path: Path) -> None:
    """Without BatchNorm's statistics, which see one micro-batch at a time, only the first step can be compared."""
    settings["prompts"] = {"stages": 1}
    settings["loss"] |= {"mask": 1.0}
    first = losses(run(settings, output_dir=str(tmp_path / "a"), steps=1, batch_size=4))
    second = losses(run(settings, output_dir=str(tmp_path / "b"), steps=1, batch_size=2, accumulation=2))
    assert first[0]["loss/mask"] == pytest.approx(second[0]["loss/mask"], rel=0.05)


def test_run_learns(settings: dict[str, Any]) -> None:
    settings["run"] |= {"steps": 40, "batch_size": 4, "checkpoint_every": 40, "evaluate_every": 0}
    settings["optimizer"] = {"warmup": 5, "learning_rate": 2e-3, "name": "muon"}
    settings["loss"]["pixel"] = "soft"
    logged = losses(run(settings))
    for key, share in ("loss/mask", 0.97), ("loss/concept", 0.9), ("loss/colour", 0.9):
        early, late = (sum(line[key] for line in part) / 8 for part in (logged[:8], logged[-9:-1]))
        assert late < share * early, key


def test_captions_train_on_a_frozen_model(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "TOKENIZER_PICTURES", 100)
    start = run(settings) / "final"
    wanted = {
        "model": {"start": str(start), "attention": "eager"},
        "data": {"regions": 3, "scene_side": [64, 80]},
        "run": {**settings["run"], "output_dir": str(tmp_path / "captions"), "steps": 30, "batch_size": 4},
        "optimizer": {"warmup": 2, "learning_rate": 3e-3},
    }
    with pytest.raises(InputError, match=r"final has no tokenizer.*fresh_decoder=true"):
        caption.main(from_dict(CaptionConfig, {**wanted, "fresh_decoder": False}))
    assert not (tmp_path / "captions").exists()
    caption.main(from_dict(CaptionConfig, wanted))
    logged = losses(tmp_path / "captions")
    assert logged[-2]["loss/caption"] < 0.85 * logged[0]["loss/caption"]
    before, after = weights(start.parent), weights(tmp_path / "captions")
    frozen = [key for key in before if key.startswith("model.")]
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    pipe = RegionPipeline.from_pretrained(tmp_path / "captions" / "final")
    assert isinstance(pipe(ROOT / "examples/scene.jpg", regions=[{"box": [88, 160, 299, 361]}])[0]["caption"], str)


@pytest.mark.parametrize(
    ("evaluate_every", "message", "left"),
    [
        (1, "stopped at step 2: not finite: validation/loss/", ["best", "checkpoints", "log.jsonl", "settings.json"]),
        (0, "stopped at step 3: not finite: loss/", ["checkpoints", "log.jsonl", "settings.json"]),
    ],
)
def test_a_loss_that_runs_away_stops_the_run(
    settings: dict[str, Any], evaluate_every: int, message: str, left: list[str]
) -> None:
    """The first step stands still, the second one throws the weights away; nothing is made of that."""
    settings["run"] |= {"checkpoint_every": evaluate_every or 9, "evaluate_every": evaluate_every, "steps": 4}
    settings["optimizer"] = {"learning_rate": 1e30, "warmup": 2, "warmup_start": -1.0}
    folder = Path(settings["run"]["output_dir"])
    (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        run(settings)
    assert sorted(path.name for path in folder.iterdir()) == left
    found = [path.name for path in (folder / "checkpoints").iterdir()]
    assert found == (["step_00000001"] if evaluate_every else [])


def test_validation_sees_only_what_training_does_not(
    settings: dict[str, Any], samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Recipe] = []
    monkeypatch.setattr(pretrain, "fit", lambda recipe, *_: handed.append(recipe))
    monkeypatch.setattr(caption, "fit", lambda recipe, *_: handed.append(recipe))
    monkeypatch.setattr(caption, "TOKENIZER_PICTURES", 20)
    settings["data"] |= {"samples": [str(samples)], "sample_share": 1.0, "sample_hold_out": 5}
    pretrain.main(from_dict(PretrainConfig, settings))
    caption.main(from_dict(CaptionConfig, {key: value for key, value in settings.items() if key != "loss"}))
    for recipe in handed:
        shown = [{part.pictures[n].names[0] for n in range(40)} for part in (recipe.batches, recipe.validation)]
        assert shown == [{f"square {n}" for n in range(10) if n % 5}, {"square 0", "square 5"}]
        assert len(recipe.validation) == VALIDATION_BATCHES


def test_wrong_settings_name_the_key(settings: dict[str, Any]) -> None:
    settings["run"]["stpes"] = 3
    with pytest.raises(InputError, match=r"run: unknown key 'stpes'"):
        from_dict(PretrainConfig, settings)


def test_another_run_is_not_resumed(settings: dict[str, Any]) -> None:
    run(settings, steps=2)
    with pytest.raises(InputError, match="--resume"):
        run(settings, steps=2)
    settings["optimizer"]["learning_rate"] = 0.5
    with pytest.raises(InputError, match="optimizer.learning_rate"):
        run(settings, steps=2, resume=True)
