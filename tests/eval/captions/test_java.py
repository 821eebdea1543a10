"""What happens where Java is missing, hangs or crashes. A script stands in for Java."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from eval.caption_metrics import score_captions
from eval.captions import java

CAPTIONS, REFERENCES = {"1": "a dog", "2": ""}, {"1": ["A dog."], "2": ["a cat"]}
ALL_BUT_METEOR = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"}
TOKENIZES = 'for last; do :; done; tr -d . < "$last" | tr A-Z a-z'


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes the script."""
    pytest.importorskip("pycocoevalcap")

    def write(*lines):
        script = tmp_path / "java"
        script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return write


def unofficial(found):
    assert found.metrics["all"].keys() == {f"unofficial_{name}" for name in ALL_BUT_METEOR}
    assert found.not_measured.keys() == {*ALL_BUT_METEOR, "meteor"}
    assert found.metrics["all"]["unofficial_cider_d"] == pytest.approx(2.5)  # 1 of 2 right, in 2 of 4 lengths
    assert "not the official number" in found.not_measured["cider_d"]
    return found.not_measured["cider_d"]


def ends(process):
    """Whether a process that was told to end does so."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(200):
        try:
            if state.read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_no_java(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    assert unofficial(score_captions(CAPTIONS, REFERENCES)).startswith("there is no Java on this machine; ")


def test_no_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap", None)
    assert "pip install 'tap-llm[eval-java]'" in unofficial(score_captions(CAPTIONS, REFERENCES))


def test_java_that_hangs_is_ended(stand_in, monkeypatch, tmp_path):
    stand_in(f"echo $$ > {tmp_path}/pid", 'for last; do :; done; rm -f "$last"', "exec sleep 600")
    monkeypatch.setattr(java, "SECONDS", 3)
    monkeypatch.setattr(java, "SECONDS_PER_TEXT", 0)
    reason = unofficial(score_captions(CAPTIONS, REFERENCES))
    assert reason.startswith("tokenize: Java gave no answer within 3 seconds")
    if (tmp_path / "pid").is_file():  # the worker came so far
        assert ends(int((tmp_path / "pid").read_text()))


def test_java_that_crashes(stand_in):
    stand_in("echo 'no such jar' >&2", "exit 1")
    reason = unofficial(score_captions(CAPTIONS, REFERENCES))
    assert reason.startswith("tokenize failed: no such jar; RuntimeError: 1 lines came back for 4; ")


def test_failing_meteor_costs_only_meteor(stand_in):
    stand_in('case "$*" in', "  *meteor*) echo 'Could not reserve enough space' >&2; exit 1;;", "esac", TOKENIZES)
    found = score_captions(CAPTIONS, REFERENCES)
    assert found.metrics["all"].keys() == ALL_BUT_METEOR
    assert found.metrics["all"]["cider_d"] == pytest.approx(2.5)
    assert found.not_measured == {"meteor": "meteor failed: RuntimeError: Could not reserve enough space"}


def test_hanging_meteor_costs_only_meteor(stand_in, monkeypatch):
    stand_in('case "$*" in *meteor*) exec sleep 600;; esac', TOKENIZES)
    assert java.tokenize(["A dog.", "", "x\ny"]) == ["a dog", "", "x y"]
    monkeypatch.setattr(java, "SECONDS", 2)
    monkeypatch.setattr(java, "SECONDS_PER_TEXT", 0)
    with pytest.raises(RuntimeError, match="meteor: Java gave no answer within 2 seconds"):
        java.meteor([({"1": ["a"]}, {"1": ["a"]})])
