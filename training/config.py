"""Configurations: one YAML file = one dataclass. Unknown keys and wrong types are errors, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tap_llm.errors import InputError

T = TypeVar("T")


@dataclass
class RunConfig:
    """What every recipe shares: length, precision, seeds, checkpoints, logging."""

    output_dir: str = "runs/tap"
    """Checkpoints, logs, and the finished model (`final/`)."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    batch_size: int = 8
    """Images per process and micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    precision: str = "bf16"
    """`no`, `bf16` or `fp16`: autocast of the forward pass; weights stay float32."""
    seed: int = 0
    workers: int = 1
    """Data processes per training process; 0 prepares data in the training process."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    evaluate_every: int = 500
    """Steps between validations; 0 never validates."""
    log_every: int = 20
    tensorboard: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile image encoder and mask decoder (needs a C++ compiler on CPUs; one to two minutes at the start)."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and saved; 0 is off."""
    clip_norm: float = 1.0
    resume: bool = False
    """Go on from the last checkpoint of `output_dir`."""


@dataclass
class OptimizerConfig:
    """AdamW as in TAP, or Muon for the matrices of attention and MLPs beside it (not with FSDP or DeepSpeed)."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 3e-3
    """Of Muon."""
    min_factor: float = 0.0
    """Last learning rate, as a share of the peak."""
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    layer_decay: float = 1.0
    """Learning rate factor per encoder layer below the last; 1 from scratch, 0.8 to 0.9 from pre-trained weights."""
    factors: dict[str, float] = field(default_factory=dict)
    """Learning rate factors of the parameters whose name contains the key."""
    warmup: int = 1000
    warmup_start: float = 0.0
    schedule: str = "cosine"
    """`cosine`, `linear` (both down to `min_factor`) or `constant`."""


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a configuration.

    Args:
        cls: the dataclass.
        path: YAML file; None for the defaults.
        overrides: `key=value` texts, nested keys with dots (`optimizer.learning_rate=3e-4`); values are YAML.

    Raises:
        InputError: a missing or broken file, an unknown key, or a value of the wrong type; the message names it.
    """
    content = _read_yaml(path) if path is not None else {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"settings are given as key=value, got {text!r}")
        _insert(content, key.strip(), _parse(value, f"the value of {key.strip()}"))
    return from_dict(cls, content, str(path or "settings"))


def from_dict(cls: type[T], content: Mapping[str, Any], where: str = "settings") -> T:
    """Nested mappings to nested dataclasses; raises InputError for unknown keys and wrong types."""
    hints = typing.get_type_hints(cls)
    unknown = [key for key in content if key not in hints]
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The whole configuration as plain values, to be stored beside a run."""
    return dataclasses.asdict(config)


def main_of(description: str | None, cls: type[T], main: Callable[[T], Any]) -> None:
    """Command line of a recipe: `--config FILE [--resume] [key=value …]`; bad input ends in one message, exit 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="win over the file, e.g. run.steps=100")
    args = parser.parse_intermixed_args()
    resume = ["run.resume=true"] if args.resume else []
    settings = [f"run.{text}" if text.startswith("resume=") else text for text in args.settings]
    try:
        main(load_config(cls, args.config, [*settings, *resume]))
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt as interrupt:
        sys.exit(_fail(str(interrupt) or "interrupted", 130))


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no configuration {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the configuration {path} cannot be read: {error}") from None
    content = _parse(text, str(path)) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold keys and values")
    return content


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None


def _insert(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if content.get(parent) is None:  # a group without keys is None in YAML
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise InputError(f"{key}: {parent} is not a group of settings")
    content[last] = value


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a group of settings, got {value!r}")
        return from_dict(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(next(a for a in arguments if a is not types.NoneType), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list, got {value!r}")
        return [_convert(arguments[0], item, where) for item in value]
    if origin is dict or hint is dict or hint is Any:
        return value
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and value is False:  # YAML reads no as false, as in run.precision=no
        return "no"
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
