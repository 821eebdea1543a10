"""Two real processes: the same results to the last digit, and runs that go on with another number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_up_benchmark
import pytest
from made_up_benchmark import MODEL, Sines

from eval.base import Run, predictions_path, run
from eval.cache import part_path, part_paths

ROOT = Path(__file__).resolve().parents[2]


def alone(out: Path, benchmark: Sines | None = None, **options: Any) -> Run:
    finished = run(benchmark or Sines(), out, MODEL, report=lambda line: None, progress=False, **options)
    assert finished is not None
    return finished


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Equal but for what says how the run went."""
    changing = {"speed": 0, "processes": 0}
    return {**ours, **changing} == {**theirs, **changing}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process began begun.json; two processes were interrupted in stopped.json, and ran whole.json and the rest."""
    path = tmp_path_factory.mktemp("runs")
    with pytest.raises(KeyboardInterrupt):
        alone(path / "begun.json", Sines(stop_at=7))
    script = str(Path(made_up_benchmark.__file__))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, *launch], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path / "stdout.txt").write_text(done.stdout)
    return path


def test_two_processes_find_the_same(folder: Path, tmp_path: Path) -> None:
    whole, ours = json.loads((folder / "whole.json").read_text()), alone(tmp_path / "whole.json").results
    assert same(whole, ours)
    assert (whole["processes"], ours["processes"]) == (2, 1)
    assert whole["examples"] == 22 and len(whole["faults"]) == 2
    speed = whole["speed"]
    assert speed["numbers_per_second"] > speed["per_process"]["numbers_per_second"] > 0
    ours_stored, theirs = (predictions_path(path / "whole.json").read_bytes() for path in (tmp_path, folder))
    assert ours_stored == theirs  # one file, in the order of the examples
    assert part_paths(predictions_path(folder / "whole.json")) == [predictions_path(folder / "whole.json")]


def test_each_batch_is_asked_once(folder: Path) -> None:
    """Of what one process began, two ask the rest: batches of two, dealt out in turn."""
    lines = (folder / "stdout.txt").read_text().splitlines()
    reports = [json.loads(line) for line in lines if line.startswith("{")]
    batches = sorted((batch for report in reports for batch in report["asked"]), key=lambda batch: int(batch[0]))
    assert batches == [["7"], ["8", "9"], ["8"], ["9"], *[[str(n), str(n + 1)] for n in range(10, 22, 2)], ["22"]]
    assert sorted(report["main"] for report in reports) == [False, True]
    assert len({tuple(batch) for report in reports for batch in report["asked"]}) == len(batches)
    assert same(*(json.loads((folder / name).read_text()) for name in ("begun.json", "whole.json")))


def test_one_process_goes_on_where_two_stopped(folder: Path) -> None:
    stored = predictions_path(folder / "stopped.json")
    assert (folder / "stdout.txt").read_text().count("interrupted") == 2
    assert part_paths(stored) == [part_path(stored, 1), stored]
    assert not (folder / "stopped.json").exists()
    rest = Sines()
    finished = alone(folder / "stopped.json", rest)
    assert rest.asked == [["9"], *[[str(number)] for number in range(14, 23)]]
    assert part_paths(stored) == [stored]
    assert same(finished.results, json.loads((folder / "whole.json").read_text()))
    assert stored.read_bytes() == predictions_path(folder / "whole.json").read_bytes()


def test_parts_of_another_model_are_removed(tmp_path: Path) -> None:
    stored = predictions_path(tmp_path / "r.json")
    part_path(stored, 3).write_text('{"protocol": "other"}\n')
    (tmp_path / "r.predictions.jsonl.bak").touch()
    alone(tmp_path / "r.json")
    assert part_paths(stored) == [stored]
    assert (tmp_path / "r.predictions.jsonl.bak").exists()
