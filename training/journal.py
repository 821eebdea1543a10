"""What a run tells: a line per logged step in `log.jsonl`, TensorBoard, and a progress bar with the time left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from tap_llm.errors import MissingFileError

from .files import write_text

_TOLD = 20  # broken samples that a process names; the rest is counted


class Journal:
    """Logs of the main process; the others log nothing.

    Args:
        accelerator: reduces metrics over the processes.
        folder: output folder; gets `log.jsonl` and `tensorboard/`.
        start: first step; whatever the logs hold after it is dropped, since it will be repeated.
        steps: steps of the whole run.
        tensorboard: write TensorBoard files.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, start: int, steps: int, tensorboard: bool) -> None:
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.path, self.steps = folder / "log.jsonl", steps
        self.began = time.perf_counter()
        self.waited = 0.0
        self.writer: Any = None
        self.problems: set[str] = set()
        if not self.main:
            return
        self._drop_after(start)
        if tensorboard:
            self.writer = _summary_writer(folder / "tensorboard", start)
        quiet = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=quiet, dynamic_ncols=True)

    def step(
        self,
        step: int,
        losses: dict[str, Tensor],
        metrics: dict[str, tuple[Tensor, Tensor]],
        factor: float,
        waited: float,
        log: bool,
    ) -> None:
        """Note a finished step.

        Args:
            step: number of finished steps.
            losses: this process's share of each loss.
            metrics: (sum, count) of this process.
            factor: factor on the peak learning rates.
            waited: seconds spent waiting for data.
            log: write the values (the processes then wait for each other).
        """
        self.waited += waited
        if log:
            values = self._reduced(losses, metrics)
            values["learning_rate_factor"] = factor
            spent = time.perf_counter() - self.began
            values["data_wait_share"] = self.waited / spent
            if self.main:
                self._write(step, values)
                shown = {name: f"{value:.3f}" for name, value in values.items() if name.startswith("loss/")}
                self.bar.set_postfix(shown, refresh=False)
        if self.main:
            self.bar.update(1)

    def validation(self, step: int, scores: dict[str, float], pictures: dict[str, np.ndarray]) -> None:
        """Note the scores and pictures of a validation."""
        if not self.main:
            return
        self._write(step, {f"validation/{name}": value for name, value in scores.items()})
        for title, picture in pictures.items() if self.writer else ():
            self.writer.add_image(title, picture, step, dataformats="HWC")
        shown = " ".join(f"{name} {value:.4f}" for name, value in scores.items())
        tqdm.write(f"step {step}: {shown}", file=sys.stderr)

    def tell(self, problems: list[str]) -> None:
        """Name broken samples that were skipped; each once, although every worker meets them anew."""
        for problem in problems:
            if problem not in self.problems and len(self.problems) < _TOLD:
                tqdm.write(f"skipped a broken sample: {problem}", file=sys.stderr)
            self.problems.add(problem)

    def close(self) -> None:
        """Finish the bar and the TensorBoard file; say how many samples were broken."""
        if self.problems:
            tqdm.write(f"broken samples that were skipped: {len(self.problems)}", file=sys.stderr)
        if self.main:
            self.bar.close()
        if self.writer:
            self.writer.close()

    def _reduced(self, losses: dict[str, Tensor], metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Losses summed and metrics averaged over the processes."""
        reduce = self.accelerator.reduce
        values = {
            f"loss/{name}": float(reduce(value.detach().float(), "sum")) for name, value in sorted(losses.items())
        }
        for name, (total, count) in sorted(metrics.items()):
            total, count = reduce(total.detach().float(), "sum"), reduce(count.float(), "sum")
            if count > 0:
                values[name] = float(total / count)
        return values

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **values, "seconds": round(time.perf_counter() - self.began, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def _drop_after(self, start: int) -> None:
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= start]
        write_text(self.path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """Step of a log line; a line cut off by a kill belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def _summary_writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingFileError(
            "TensorBoard is not installed: pip install 'tap-llm[train]', or set run.tensorboard=false"
        ) from None
    return SummaryWriter(str(folder), purge_step=start + 1)
