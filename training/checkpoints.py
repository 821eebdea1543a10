"""Checkpoints that appear only when complete, and the moving average of weights."""

from __future__ import annotations

import json
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

from .files import finish_folder, start_folder, write_text
from .precision import is_sharded

_NAME = re.compile(r"step_(\d{8})")
# Settings that may change between the parts of a run without making it another run.
_FREE = ("output_dir", "resume", "workers", "checkpoint_every", "keep_checkpoints", "evaluate_every", "log_every",
         "tensorboard", "compile")  # fmt: skip


def check_output(folder: Path, resume: bool) -> None:
    """See that a run can begin, or go on, in its output folder; before anything is loaded, and nothing is written.

    Raises:
        InputError: not resuming, but the folder holds a run; or resuming, but it holds none.
    """
    if resume and not (folder / "settings.json").is_file():
        raise InputError(f"there is no run to resume in {folder}")
    if resume:
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.output_dir: {folder} is a file")
    steps = _steps(folder)
    found = [f"a run that reached step {steps[-1]}"] if steps else []
    found += [f"the model of a run ({name}/)" for name in ("final", "best") if (folder / name).exists()]
    if found:
        raise InputError(f"{folder} holds {found[0]}: go on with --resume, or choose another run.output_dir")


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
        if not is_sharded(accelerator):
            accelerator.register_save_state_pre_hook(_leave_out_frozen)

    def find_start(self, resume: bool) -> int:
        """Step to start from; a new run's folder is made.

        Raises:
            InputError: see [`check_output`]; or the run that should be resumed is another one, or cannot be read.
        """
        check_output(self.folder, resume)
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes
        settings_file = self.folder / "settings.json"
        if resume:
            self._compare(_read_json(settings_file))
            return max(_steps(self.folder), default=0)
        if self.accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(settings_file, json.dumps(self.settings, indent=1))
            except OSError as error:
                raise InputError(f"run.output_dir: cannot write to {self.folder} ({error.strerror})") from None
        return 0

    def load(self, step: int) -> float:
        """Load the state of a step (0: nothing); returns the best validation score so far.

        Raises:
            InputError: the run had another number of processes, which would see other data.
        """
        if step == 0:
            return float("-inf")
        folder = self._path(step)
        progress = _read_json(folder / "progress.json")
        now = self.accelerator.num_processes
        before = progress.get("processes", now)
        if before != now:
            raise InputError(f"the run in {self.folder} has {before} processes, not {now}: resume it with as many")
        # What is frozen is not in there: it is as it was loaded.
        self.accelerator.load_state(str(folder), **({} if is_sharded(self.accelerator) else {"strict": False}))
        return float("-inf") if progress["best"] is None else progress["best"]

    def save(self, step: int, best: float) -> None:
        """Write the state of a step; a killed run leaves the checkpoint before it."""
        final = self._path(step)
        part = final.with_name(final.name + ".part")
        if self.accelerator.is_main_process:
            start_folder(final)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            known = None if best == float("-inf") else best
            progress = {"step": step, "best": known, "processes": self.accelerator.num_processes}
            (part / "progress.json").write_text(json.dumps(progress))
            finish_folder(part, final)
            for old in _steps(self.folder)[: -self.keep]:
                shutil.rmtree(self._path(old), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:08d}"

    def _compare(self, stored: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        changed = [
            f"{key} ({old!r}, now {new!r})"
            for key, old, new in _differences(stored, now)
            if key.removeprefix("run.") not in _FREE
        ]
        if changed:
            raise InputError(
                f"the run in {self.folder} was started with another {', '.join(changed)}: resume it as it was, or "
                "choose another run.output_dir"
            )


def _leave_out_frozen(models: list[nn.Module], states: list[dict[str, Tensor]], _: str) -> None:
    """Take the frozen parameters out of what Accelerate is about to save: they may be an LLM of many gigabytes."""
    for model, state in zip(models, states, strict=True):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                state.pop(name, None)


def _steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    names = [path.name for path in (folder / "checkpoints").glob("step_*")]
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): the run cannot be resumed from there") from None


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
