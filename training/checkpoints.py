"""Checkpoints that appear only when complete, and the moving average of weights."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tap_llm.errors import InputError

_NAME = re.compile(r"step_(\d{8})")
# Settings that may change between the parts of a run without making it another run.
_FREE = ("output_dir", "resume", "workers", "checkpoint_every", "keep_checkpoints", "evaluate_every", "log_every",
         "tensorboard", "compile")  # fmt: skip


class Checkpoints:
    """Checkpoints of one run in `folder/checkpoints`.

    Args:
        accelerator: what saves and loads the state.
        folder: the run's output folder.
        keep: how many checkpoints to keep.
        settings: the whole configuration of the run.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int, settings: dict[str, Any]) -> None:
        self.accelerator, self.folder, self.keep, self.settings = accelerator, folder, keep, settings

    def find_start(self, resume: bool) -> int:
        """Step to start from.

        Raises:
            InputError: not resuming, but the folder holds a run; or resuming, but it holds none, or another one.
        """
        steps = self._steps()
        settings_file = self.folder / "settings.json"
        if not resume:
            if steps:
                raise InputError(
                    f"{self.folder} holds a run that reached step {steps[-1]}: go on with --resume, or choose "
                    "another run.output_dir"
                )
            if self.accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                settings_file.write_text(json.dumps(self.settings, indent=1))
            return 0
        if not settings_file.is_file():
            raise InputError(f"there is no run to resume in {self.folder}")
        self._compare(json.loads(settings_file.read_text()))
        return steps[-1] if steps else 0

    def load(self, step: int) -> float:
        """Load the state of a step (0: nothing); returns the best validation score so far."""
        if step == 0:
            return float("-inf")
        folder = self._path(step)
        self.accelerator.load_state(str(folder))
        return json.loads((folder / "progress.json").read_text())["best"] or float("-inf")

    def save(self, step: int, best: float) -> None:
        """Write the state of a step; a killed run leaves the checkpoint before it."""
        final = self._path(step)
        part = final.with_name(final.name + ".part")
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            known = None if best == float("-inf") else best
            (part / "progress.json").write_text(json.dumps({"step": step, "best": known}))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(self._path(old), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:08d}"

    def _steps(self) -> list[int]:
        names = [path.name for path in (self.folder / "checkpoints").glob("step_*")]
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def _compare(self, stored: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        changed = [key for key, old, new in _differences(stored, now) if key.removeprefix("run.") not in _FREE]
        if changed:
            raise InputError(
                f"the run in {self.folder} was started with another {', '.join(changed)}: resume it as it was, or "
                "choose another run.output_dir"
            )


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield prefix, old, new
        return
    for key in {**old, **new}:
        yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)


class MovingAverage:
    """Exponential moving average of parameters; buffers are taken as they are. Saved with the checkpoints.

    Args:
        model: the prepared model.
        decay: 0 keeps no average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = [p.detach().clone() for p in model.parameters() if p.requires_grad] if decay else []

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average after a step; early on it follows faster."""
        if self.decay:
            decay = min(self.decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(self.average, self._live(model), 1 - decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Put the average in place of the weights for a while."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for average, live in zip(self.average, self._live(model) if self.decay else [], strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    @staticmethod
    def _live(model: nn.Module) -> list[Tensor]:
        return [p.detach() for p in model.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        """The average, numbered."""
        return {str(index): tensor for index, tensor in enumerate(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved average."""
        for index, tensor in enumerate(self.average):
            tensor.copy_(state[str(index)])
