"""Logs: one line per step that is told once, whatever was cut off; broken samples by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from training.journal import Journal


def journal(folder: Path, start: int = 0, tensorboard: bool = False) -> Journal:
    return Journal(Accelerator(cpu=True), folder, start, 10, tensorboard)


def note(log: Journal, step: int, loss: float = 1.0) -> None:
    metrics = {"iou": (torch.tensor(3.0), torch.tensor(4)), "name": (torch.tensor(0), torch.tensor(0))}
    log.step(step, {"mask": torch.tensor(loss)}, metrics, 0.5, 0.0, log=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_lines_of_steps_and_validations(tmp_path: Path) -> None:
    log = journal(tmp_path)
    note(log, 1, 2.0)
    log.step(2, {"mask": torch.tensor(1.0)}, {}, 0.5, 0.0, log=False)
    log.validation(2, {"iou": 0.25}, {})
    log.close()
    first, second = lines(tmp_path)
    assert {key: first[key] for key in ("step", "loss/mask", "iou", "learning_rate_factor")} == {
        "step": 1, "loss/mask": 2.0, "iou": 0.75, "learning_rate_factor": 0.5,
    }  # fmt: skip
    assert "name" not in first  # nothing had a name
    assert (second["step"], second["validation/iou"]) == (2, 0.25) and first["seconds"] >= 0


def test_share_of_time_spent_waiting(tmp_path: Path) -> None:
    log = journal(tmp_path)
    log.began -= 9.0
    log.step(1, {}, {}, 1.0, 2.0, log=False)
    log.step(2, {}, {}, 1.0, 2.5, log=True)
    assert lines(tmp_path)[0]["data_wait_share"] == pytest.approx(0.5, abs=0.02)


def test_steps_that_will_be_repeated_are_dropped(tmp_path: Path) -> None:
    log = journal(tmp_path)
    for step in range(1, 6):
        note(log, step, float(step))
        if step % 2 == 0:
            log.validation(step, {"iou": step / 10}, {})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/ma')  # cut off by a kill
    log = journal(tmp_path, start=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3, 4, 4]
    note(log, 5, 50.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3, 4, 4, 5]
    assert lines(tmp_path)[-1]["loss/mask"] == 50.0
    journal(tmp_path, start=0)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("tail", ["{", '{"step"', '{"step": 3', "{}", "", "\x00\x00"])
def test_any_broken_line_is_dropped(tmp_path: Path, tail: str) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + tail)
    journal(tmp_path, start=9)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_broken_samples_are_named_once_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = journal(tmp_path)
    log.tell(["a.json, line 3: no picture", "a.json, line 5: no mask"])
    log.tell(["a.json, line 3: no picture"])  # met by another worker
    log.tell([f"b.json, line {number}: bad" for number in range(40)])
    log.close()
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "broken" in line]
    assert told[:2] == [f"skipped a broken sample: a.json, line {text}" for text in ("3: no picture", "5: no mask")]
    assert len(told) == 21 and told[-1] == "broken samples that were skipped: 42"


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = journal(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        note(log, step, float(step))
    log.validation(3, {"iou": 0.5}, {"regions": np.zeros((8, 8, 3), np.uint8)})
    log.close()
    log = journal(tmp_path, start=1, tensorboard=True)  # steps 2 and 3 are repeated
    note(log, 2, 20.0)
    log.close()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss/mask")] == [(1, 1.0), (2, 20.0)]
    assert "validation/iou" in found.Tags()["scalars"] and found.Tags()["images"] == ["regions"]
