"""The commands of docs/benchmarks.md: the first section runs, all others are read by the benchmarks' own parsers.

A comment before a block says how: `<!-- test: run --count 1 -->` runs it with more arguments; any other block,
here and on the other pages, is parsed.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes import launched

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- test: (.*?) -->\n)?```bash\n(.*?)```", re.S)


class Parsed(Exception):
    """Raised in place of running a command whose arguments are in order."""


def evaluation(line: str) -> tuple[str, list[str]] | None:
    """Module and arguments of a command that evaluates, or None."""
    words = shlex.split(line, comments=True)
    if " -m eval." not in line or words[0] not in ("python", "accelerate", "torchrun"):
        return None
    if words[0] == "accelerate":
        return launched(words)
    module = words.index("-m") + 1
    return words[module], words[module + 1 :]


def commands(text: str) -> list[tuple[str, str, list[str]]]:
    """(marker, module, arguments) of all commands that evaluate."""
    return [
        (marker, *found)
        for marker, block in BLOCK.findall(text)
        for line in block.replace("\\\n", " ").splitlines()
        if (found := evaluation(line))
    ]


def start(module: str, arguments: list[str]) -> None:
    """As from a command line."""
    importlib.import_module(module).main(arguments)


def case_name(value: Any) -> str:
    """A readable id."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("page", "module", "arguments"),
    [(page.name, *command) for page in PAGES for _, *command in commands(page.read_text(encoding="utf-8"))],
    ids=case_name,
)
def test_commands_are_parsed(page: str, module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        parse(self, *given, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        start(module, arguments)


def test_first_section_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for marker, module, arguments in commands(PAGE):
        if marker.startswith("run"):
            start(module, [*arguments, *shlex.split(marker)[1:]])
    files = {path.name for path in (tmp_path / "runs" / "eval").iterdir()}
    named = set(re.findall(r"^\| `(scenes\.\S+)` \|", PAGE, re.M))
    assert files == named | {"report.html", "report.md"}
    printed = capsys.readouterr().out
    assert "regions/s" in printed and "| tap-tiny | shapes, all |" in printed
    assert (tmp_path / "runs/eval/report.html").read_text(encoding="utf-8").count("data:image/png") > 4


def test_arguments_that_all_know_are_listed() -> None:
    from eval.command import benchmark_parser, common_arguments

    parser = benchmark_parser("any", "")
    common_arguments(parser)
    options = {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}
    table = PAGE[PAGE.index("| argument |") :].split("\n\n")[0]
    assert set(re.findall(r"--\w[\w-]+", table)) == options
