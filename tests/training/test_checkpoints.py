"""Checkpoints: complete or not there, rotated, refused where they belong to another run; the moving average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tap_llm.errors import InputError
from training.checkpoints import Checkpoints, MovingAverage, check_output
from training.files import complete_folder, write_text

SETTINGS = {"model": {"size": 3}, "run": {"steps": 9, "workers": 1, "output_dir": "a"}}


class Run:
    """A model with its optimiser and checkpoints."""

    def __init__(self, folder: Path, keep: int = 2, settings: dict[str, Any] = SETTINGS) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.module = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.average = MovingAverage(self.model, 0.9)
        self.accelerator.register_for_checkpointing(self.average)
        self.checkpoints = Checkpoints(self.accelerator, folder, keep, settings)

    def step(self, number: int) -> None:
        self.model(torch.full((1, 2), 1.0 + number)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model, number)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = Run(tmp_path)
    assert run.checkpoints.find_start(resume=False) == 0 and run.checkpoints.load(0) == float("-inf")
    for number in range(4):
        run.step(number)
        if number == 1:
            run.checkpoints.save(2, 0.25)
    again = Run(tmp_path)
    assert again.checkpoints.find_start(resume=True) == 2
    assert again.checkpoints.load(2) == 0.25
    for number in (2, 3):
        again.step(number)
    assert torch.equal(run.module.weight, again.module.weight)
    assert all(map(torch.equal, run.average.average, again.average.average))


@pytest.mark.parametrize("best", [float("-inf"), 0.0, -1.5, 0.75])
def test_best_score_comes_back(tmp_path: Path, best: float) -> None:
    run = Run(tmp_path)
    run.checkpoints.find_start(resume=False)
    run.checkpoints.save(1, best)
    assert run.checkpoints.load(1) == best


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    run.checkpoints.find_start(resume=False)
    for step in (3, 6, 9, 12):
        run.checkpoints.save(step, 0.0)
    assert names(tmp_path) == ["step_00000009", "step_00000012"]
    assert run.checkpoints.find_start(resume=True) == 12


def test_what_a_kill_leaves_is_not_taken_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.checkpoints.find_start(resume=False)
    run.checkpoints.save(3, 0.5)

    def killed(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("training.checkpoints.finish_folder", killed)
        run.checkpoints.save(6, 0.5)
    assert names(tmp_path) == ["step_00000003", "step_00000006.part"]
    assert run.checkpoints.find_start(resume=True) == 3
    (tmp_path / "checkpoints" / "step_00000006.part" / "leftover").touch()
    run.checkpoints.save(6, 0.5)
    assert names(tmp_path) == ["step_00000003", "step_00000006"]
    assert not (tmp_path / "checkpoints" / "step_00000006" / "leftover").exists()


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.find_start(resume=False)
    run.checkpoints.find_start(resume=False)  # killed before its first checkpoint: begin again
    run.checkpoints.save(3, 0.5)
    with pytest.raises(InputError, match=r"holds a run that reached step 3: go on with --resume"):
        run.checkpoints.find_start(resume=False)
    (tmp_path / "other" / "final").mkdir(parents=True)
    with pytest.raises(InputError, match=r"the model of a run \(final/\)"):
        check_output(tmp_path / "other", resume=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"):
        check_output(tmp_path / "file", resume=False)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        check_output(tmp_path / "absent", resume=True)
    run = Run(tmp_path)
    run.checkpoints.find_start(resume=False)
    assert run.checkpoints.find_start(resume=True) == 0  # killed before its first checkpoint
    (tmp_path / "settings.json").write_text('{"run": ')
    with pytest.raises(InputError, match="settings.json cannot be read"):
        run.checkpoints.find_start(resume=True)


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    Run(tmp_path).checkpoints.find_start(resume=False)
    changed = {"model": {"size": 4, "depth": 2}, "run": {"steps": 9, "workers": 8, "output_dir": "b"}}
    with pytest.raises(InputError, match=r"another model\.size \(3, now 4\), model\.depth \(None, now 2\): resume"):
        Run(tmp_path, settings=changed).checkpoints.find_start(resume=True)
    free = {"model": {"size": 3}, "run": {"steps": 9, "workers": 8, "output_dir": "b"}}
    assert Run(tmp_path, settings=free).checkpoints.find_start(resume=True) == 0


def test_as_many_processes_as_before(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.find_start(resume=False)
    run.checkpoints.save(3, 0.5)
    progress = tmp_path / "checkpoints" / "step_00000003" / "progress.json"
    content = json.loads(progress.read_text())
    progress.write_text(json.dumps({**content, "processes": 4}))
    with pytest.raises(InputError, match="4 processes, not 1"):
        run.checkpoints.load(3)
    del content["processes"]  # of an earlier version
    progress.write_text(json.dumps(content))
    assert run.checkpoints.load(3) == 0.5


# The moving average


def test_average_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    weight_now = model.weight.detach()
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, 0.5)
    values = [1.0]
    for step, weight in enumerate((3.0, 5.0, 7.0, 9.0, 2.0, 4.0, 8.0, 6.0, 1.0, 3.0)):
        model.weight.data.fill_(weight)
        average.update(model, step)
        decay = min(0.5, (step + 1) / (step + 10))
        values.append(decay * values[-1] + (1 - decay) * weight)
    assert float(average.average[0]) == pytest.approx(values[-1])
    with average.swapped_in(model):
        assert float(weight_now) == pytest.approx(values[-1])
        assert float(average.average[0]) == 3.0
    assert float(weight_now) == 3.0 and float(average.average[0]) == pytest.approx(values[-1])
    with pytest.raises(RuntimeError, match="inside"), average.swapped_in(model):
        raise RuntimeError("inside")
    assert float(weight_now) == 3.0


def test_average_leaves_out_what_is_frozen_and_may_be_off() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert len(MovingAverage(model, 0.9).average) == 2
    off = MovingAverage(model, 0.0)
    off.update(model, 3)
    with off.swapped_in(model):
        pass
    assert off.state_dict() == {}
    off.load_state_dict({})


# Files and folders


def test_folders_appear_only_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    with complete_folder(folder) as part:
        (part / "weights").write_text("1")
        assert not folder.exists()
    with pytest.raises(RuntimeError, match="killed"), complete_folder(folder) as part:
        (part / "weights").write_text("2")
        raise RuntimeError("killed")
    assert (folder / "weights").read_text() == "1"
    with complete_folder(folder) as part:
        assert not list(part.iterdir())
        (part / "other").write_text("3")
    assert [path.name for path in folder.iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_files_are_replaced_at_once(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "1")
    write_text(tmp_path / "a.json", "é")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "é" and len(list(tmp_path.iterdir())) == 1


def test_frozen_weights_are_not_stored(tmp_path: Path) -> None:
    """They may be those of a large language model; they stay as they were loaded."""
    accelerator = Accelerator(cpu=True)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    model = accelerator.prepare(module)
    checkpoints = Checkpoints(accelerator, tmp_path, 1, SETTINGS)
    checkpoints.find_start(resume=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    checkpoints.save(3, 0.5)
    stored = load_file(tmp_path / "checkpoints" / "step_00000003" / "model.safetensors")
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert stored.keys() == {"2.weight", "2.bias"} | buffers
    with torch.no_grad():
        module[0].weight.zero_()
        module[2].weight.zero_()
    assert checkpoints.load(3) == 0.5
    assert torch.equal(module[2].weight, before["2.weight"]) and not module[0].weight.any()
    assert model is not None
