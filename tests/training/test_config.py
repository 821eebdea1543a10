"""Configurations: typed, complete, and with messages that name the place."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tap_llm.errors import InputError
from training.config import OptimizerConfig, RunConfig, from_dict, load_config, main_of, to_dict


@dataclass
class Inner:
    size: int = 3
    name: str | None = None


@dataclass
class Outer:
    rate: float = 0.5
    flag: bool = False
    sides: list[int] = field(default_factory=lambda: [1, 2])
    free: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    run: RunConfig = field(default_factory=RunConfig)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_a_file_and_settings_that_win_over_it(tmp_path: Path) -> None:
    path = written(tmp_path, "rate: 1e-3\nsides: [4]\ninner:\nfree: {a: {b: 1}}\nrun: {steps: 7}\n")
    config = load_config(Outer, path, ["inner.size=9", "run.steps=8", "free.a.c=[x, 2]", "inner.name=null", "rate=2"])
    expected = Outer(2.0, False, [4], {"a": {"b": 1, "c": ["x", 2]}}, Inner(9, None), RunConfig(steps=8))
    assert config == expected and isinstance(config.rate, float)
    assert load_config(Outer, path).rate == 0.001  # which YAML reads as text
    assert load_config(Outer, None) == Outer()
    assert from_dict(Outer, to_dict(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {sise: 3}", r"config\.yaml: inner: unknown key 'sise'; known are size, name"),
        ("speed: 3", "unknown key 'speed'"),
        ("rate: fast", "rate must be float, got 'fast'"),
        ("rate: true", "rate must be float, got True"),
        ("inner: {size: true}", "inner: size must be int, got True"),
        ("inner: {size: 2.5}", r"size must be int, got 2\.5"),
        ("inner: {name: 5}", "name must be str, got 5"),
        ("sides: 4", "sides must be a list, got 4"),
        ("sides: [4, x]", "sides must be int, got 'x'"),
        ("inner: 3", "inner must be a group of settings, got 3"),
        ("flag: 1", "flag must be bool, got 1"),
        ("- 3", "must hold keys and values"),
        ("rate: [", "is not valid YAML"),
    ],
)
def test_messages_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(Outer, written(tmp_path, text))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rate", "key=value, got 'rate'"),
        ("rate=[", "the value of rate is not valid YAML"),
        ("rate.x=1", "rate is not a group"),
        ("inner.sise=1", "unknown key 'sise'"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(Outer, written(tmp_path, "rate: 1.0"), [setting])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no configuration"):
        load_config(Outer, tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(Outer, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"inner: {name: \xe9}")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(Outer, tmp_path / "latin.yaml")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Outer]:
    """Configurations that a recipe gets from a command line."""
    got: list[Outer] = []
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    main_of("A recipe.", Outer, got.append)
    return got


def test_command_line_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(written(tmp_path, "rate: 1.0"))
    for arguments in (
        ["rate=3", "--config", path, "--resume", "inner.size=4"],
        ["--config", path, "--resume", "rate=3", "inner.size=4"],
        ["--resume", "rate=3", "inner.size=4", "--config", path],
        ["--config", path, "rate=3", "resume=true", "inner.size=4"],
    ):
        assert command(monkeypatch, *arguments) == [Outer(3.0, inner=Inner(4), run=RunConfig(resume=True))]


def test_command_line_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--config", "absent.yaml")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "there is no configuration absent.yaml\n"

    def interrupted(_: Outer) -> None:
        raise KeyboardInterrupt("stopped after step 3")

    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit) as stop:
        main_of("A recipe.", Outer, interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped after step 3\n"


def test_defaults_are_those_of_the_paper() -> None:
    """AdamW, betas 0.9 and 0.999, peak 1e-3, cosine to 0, decay 0.1."""
    config = OptimizerConfig()
    assert (config.name, config.betas, config.learning_rate) == ("adamw", [0.9, 0.999], 1e-3)
    assert (config.schedule, config.min_factor, config.weight_decay, config.layer_decay) == ("cosine", 0.0, 0.1, 1.0)


def test_no_is_a_word_where_text_is_expected() -> None:
    """YAML takes it for false."""
    assert load_config(RunConfig, None, ["precision=no"]).precision == "no"
    with pytest.raises(InputError, match="precision must be str, got True"):
        load_config(RunConfig, None, ["precision=yes"])
