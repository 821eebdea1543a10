"""Every command and every Python block of the README runs, letter by letter."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]
SCRIPTS = re.findall(r"```python\n(.*?)```", README, re.S)
NOT_HERE = ("pip install", "python -m pytest")  # .ci/run runs these


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's example pictures, without a network and without a cache."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TAP_LLM_HOME", str(tmp_path / "cache"))
    return tmp_path


def run(command: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell would run it, with this interpreter's `tap-llm`."""
    program, *arguments = shlex.split(command)
    assert program == "tap-llm"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "tap_llm.cli", *arguments], capture_output=True, text=True, env=environment
    )


def test_there_are_commands_and_scripts() -> None:
    assert len(SCRIPTS) == 2
    assert sum(command.startswith("tap-llm") for command in COMMANDS) == 6
    assert all(command.startswith(("tap-llm", *NOT_HERE)) for command in COMMANDS)


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("tap-llm") and ".pkl" not in c])
def test_commands(clone: Path, command: str) -> None:
    done = run(command)
    assert "Traceback" not in done.stderr
    if "--model tap_vit" in command:  # needs a download: without a network it says what to do
        assert done.returncode == 2
        assert "tap_vit_b_v1_1.pkl" in done.stderr or "tokenizer.model" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    picture = clone / next(word for word in shlex.split(command) if word.endswith(".png"))
    assert picture.stat().st_size > 10_000
    assert any(word in done.stdout for word in ("house", "mask", "panda"))


def test_convert_command(clone: Path) -> None:
    """The files are the user's: without them the command names the one that is missing."""
    done = run(next(command for command in COMMANDS if "convert" in command))
    assert done.returncode == 2
    assert "tap_vit_b_v1_1.pkl" in done.stderr
    assert not (clone / "tap-base").exists()


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_scripts(clone: Path, number: int) -> None:
    scope: dict[str, object] = {}
    exec(compile(SCRIPTS[number], f"README.md, block {number}", "exec"), scope)
    assert scope.get("results") or scope.get("captions") or scope.get("pipe")
