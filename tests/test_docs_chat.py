"""The code of docs/region_chat.md runs, in order, with a random LLM in place of the one from the hub."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import launched, train
from region_chat import write_llm

from tap_llm import cli
from tap_llm.region_llm import BUNDLED_TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "region_chat.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- test: (.*?) -->\n)?```(\w+)\n(.*?)```", re.S)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the picture and an LLM that has a chat template."""
    for name in ("examples", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    torch.manual_seed(0)
    write_llm(tmp_path / "llm")
    (tmp_path / "llm" / "chat_template.jinja").write_text(BUNDLED_TEMPLATES["chatml"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(text: str, settings: str) -> None:
    """A block of shell commands: a file written from here, our own commands, and short training runs."""
    for name, content in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", text, re.M | re.S):
        Path(name).write_text(content)
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("tap-llm "):
            assert cli.main(shlex.split(line)[1:]) == 0, line
        if line.startswith("accelerate launch "):
            module, arguments = launched(shlex.split(line))
            train(module, [*arguments, *shlex.split(settings)])


def test_the_page_runs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.replace("Qwen/Qwen2.5-0.5B-Instruct", str(clone / "llm")).replace("$LLM", str(clone / "llm"))
    scope: dict[str, Any] = {}
    for marker, language, text in BLOCK.findall(page):
        if marker == "not run":
            continue
        if language == "python":
            exec(compile(text, "docs/region_chat.md", "exec"), scope)
        else:
            run_shell(text, marker)
    assert "['default', 'again']" in capsys.readouterr().out
    assert scope["prompts"][0]["prompt_embeds"].shape[1] == scope["model"].config.text_config.hidden_size
    made = {"talk.json", "tokens", "runs", "my_adapter", "my_model", "my_whole_model", "my_llm"}
    assert made <= {path.name for path in clone.iterdir()}


def test_the_table_of_presets_is_true() -> None:
    from transformers import LlamaConfig

    from tap_llm import TapConfig, TapLlmConfig
    from tap_llm.region_llm import PROJECTORS

    for preset, weights in re.findall(r"^\| `(lite|base|full)` \|.*\| ([\d., M]+) \|$", PAGE, re.M):
        for width, millions in zip((896, 2048), weights.split(", "), strict=True):
            llm = LlamaConfig(hidden_size=width, num_attention_heads=16)
            config = TapLlmConfig(tap_config=TapConfig(), text_config=llm, projector=preset)
            with torch.device("meta"):
                count = sum(value.numel() for value in PROJECTORS[preset](config).parameters())
            assert f"{count / 1e6:.1f} M" == millions
            assert f"| {config.tokens_per_region}, {config.tokens_per_image} | {weights}" in PAGE
