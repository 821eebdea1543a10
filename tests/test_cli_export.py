"""`tap-llm export`: what it writes, what it says, how it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from exported import exported
from transformers.utils import logging

from tap_llm import cli


@pytest.fixture(autouse=True)
def _loud() -> object:
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def test_it_says_what_it_does() -> None:
    done = exported()
    assert done.status == 0
    wrote, difference = done.printed.splitlines()
    assert wrote == f"wrote {done.folder}: image_encoder.onnx, region_decoder.onnx, caption_step.onnx"
    assert re.fullmatch(r"largest difference from torch: \de-0[56]", difference)
    files = ["image_encoder.onnx", "region_decoder.onnx", "caption_step.onnx"]
    steps = [f"writing {file}" for file in files] + [f"checking {file} against torch" for file in files]
    assert done.noted.splitlines() == [f"tap-llm: {step}" for step in steps]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full"], "full exists and is not an empty folder; choose another output"),
        (["file"], "file exists and is not an empty folder; choose another output"),
        (["file", "--overwrite"], "file exists and is not an empty folder; choose another output"),
        (["full", "--overwrite"], "overwrite replaces earlier exports only, and full also holds notes.txt; choose"),
        (["new", "--model", "tap-tny"], "unknown model 'tap-tny'; did you mean tap-tiny?"),
        (["new", "--concepts", "nowhere.pkl"], "there are no concepts at nowhere.pkl"),
        (["new", "--tokenizer", "nowhere.model"], "nowhere.model"),
        ([], "Missing argument 'out'"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert cli.main(["export", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "notes.txt"]
