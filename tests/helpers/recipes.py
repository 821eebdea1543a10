"""Training commands as documents state them, run in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState


def train(module: str, arguments: list[str]) -> None:
    """A recipe as `python -m` would run it, in this process, which has imported everything already."""
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)  # runpy warns of modules that are there already
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def launched(command: list[str]) -> tuple[str, list[str]]:
    """Module and arguments of an `accelerate launch`, read by Accelerate's own parser."""
    assert command[:2] == ["accelerate", "launch"]
    read = launch_command_parser().parse_args(command[2:])
    assert read.module
    assert read.config_file is None or Path(read.config_file).is_file()
    return read.training_script, read.training_script_args
