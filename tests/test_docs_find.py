"""The commands and the code of docs/find.md run, in order; models that would be downloaded are random ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from random_clip import random_clip
from whole_chat import write_chat_model

from tap_llm import cli
from tap_llm.clip_as_rnn import PRESETS, CarConfig
from tap_llm.clip_as_rnn.configuration_car import PROMPTS
from tap_llm.clip_as_rnn.crf import MAX_SIDE
from tap_llm.clip_as_rnn.presets import BASE_16, BUNDLED_CLIP, LARGE_14
from tap_llm.clip_as_rnn.tap_refine import MIN_IOU
from tap_llm.hub import bundled_models
from tap_llm.region_llm.chat_loading import DEFAULT_CHAT_MODEL

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "find.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.S)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the picture, small; what is not in the package or would be downloaded is a random model."""
    (tmp_path / "examples").mkdir()
    with Image.open(ROOT / "examples" / "scene.jpg") as picture:
        small = picture.resize((240, 180))
    for name in ("examples/scene.jpg", "photo.jpg"):
        small.save(tmp_path / name)
    clip = str(tmp_path / "clip")
    random_clip(patch_size=16).save_pretrained(clip)
    for name, config in PRESETS.items():
        if not {config.f, config.g} <= set(bundled_models()):
            monkeypatch.setitem(PRESETS, name, config.updated(f=clip, g=clip))
    if DEFAULT_CHAT_MODEL not in bundled_models():
        write_chat_model(tmp_path / "chat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One command; what it prints goes into the file that it names."""
    command, _, file = line.partition(" > ")
    program, *arguments = shlex.split(command)
    assert program == "tap-llm"
    if arguments[0] == "chat" and Path("chat").is_dir():
        arguments += ["--model", "chat"]
    capsys.readouterr()
    assert cli.main(arguments) == 0, line
    if file:
        Path(file).write_text(capsys.readouterr().out)


def test_the_page_runs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    for language, text in BLOCK.findall(PAGE):
        if language == "python":
            exec(compile(text, "docs/find.md", "exec"), scope)
        else:
            for line in text.splitlines():
                run_line(line, capsys)
    assert json.loads((clone / "found.json").read_text())["regions"]
    assert (clone / "examples" / "scene.find.png").stat().st_size > 10_000
    assert len(scope["captions"]) == len(scope["found"].found)
    assert scope["masks"].shape == (1, 180, 240)


def share(text: str) -> float:
    return float(text.replace(".", "0.", 1) if text.startswith(".") else text)


def test_the_table_of_presets_is_true() -> None:
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", PAGE, re.M)
    towers = {"the bundled one": BUNDLED_CLIP, "ViT-L/14": LARGE_14, "ViT-B/16": BASE_16}
    named = set()
    for names, g, mask, keep, box, prompts in rows:
        for name in re.findall(r"`(.*?)`", names):
            named.add(name)
            config = PRESETS[name]
            assert config.g == towers[g] and config.f == (BUNDLED_CLIP if name == "tiny" else BASE_16)
            numbers = (config.mask_threshold, config.keep_threshold, config.box_threshold)
            assert numbers == (share(mask), share(keep), share(box)), name
            things, _, stuff = prompts.partition("; of stuff: ")
            assert set(things.split(", ")) == set(config.prompts)
            assert set(stuff.split(", ")) - {""} == set(config.stuff_prompts)
    assert named | {"context_paper", "refcoco_paper"} == set(PRESETS)


def test_what_the_page_says_of_settings_is_true() -> None:
    table = PAGE[PAGE.index("| setting | |") : PAGE.index("`CarConfig` lists them all")]
    names = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert len(names) > 5 and all(hasattr(CarConfig(), name) for name in names)
    assert all(f"`{prompt}`" in table for prompt in PROMPTS)
    assert f"{len(CarConfig().background)} by default" in PAGE
    assert f"longer than {MAX_SIDE:,} pixels" in PAGE and f"IoU above {MIN_IOU}" in PAGE
    tiny = PRESETS["tiny"]
    named = f"`tap_choice={tiny.tap_choice}`, `tap_min_iou={tiny.tap_min_iou}`, `tap_sharpen=true`"
    assert tiny.tap_sharpen and named in PAGE and CarConfig().tap_min_iou == MIN_IOU
