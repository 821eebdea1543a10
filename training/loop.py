"""The loop that every recipe shares: steps, precision, checkpoints, validation, logs.

All randomness is a function of the step: batch n is made from its number alone, and dropout is reseeded with it. A
resumed run therefore sees the data, the prompts and the dropout masks of the uninterrupted one.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn

from tap_llm.errors import InputError

from .checkpoints import Checkpoints, MovingAverage, check_output
from .config import OptimizerConfig, RunConfig
from .delivery import Batch, Batches, deliver
from .distributed import synchronize_batch_norm
from .files import complete_folder
from .journal import Journal
from .optimization import build_optimizers, check_optimizer, schedule_factor, set_learning_rates
from .precision import autocast, check_together, configure_deepspeed, is_sharded, start_accelerator
from .recipe import Recipe
from .stepper import Stepper, any_process, not_finite


def check(run: RunConfig, optimizer: OptimizerConfig) -> None:
    """See that a run can begin, before anything is loaded.

    Raises:
        InputError: settings that cannot be; or the output folder holds another run, or nothing to resume.
    """
    least = {"workers": 0, "evaluate_every": 0, "seed": 0}
    ones = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints")
    for name, smallest in {**dict.fromkeys(ones, 1), **least}.items():
        if getattr(run, name) < smallest:
            raise InputError(f"run.{name} must be at least {smallest}, got {getattr(run, name)}")
    if run.precision not in ("no", "bf16", "fp16"):
        raise InputError(f"run.precision must be no, bf16 or fp16, got {run.precision!r}")
    if not 0 <= run.ema_decay < 1:
        raise InputError(f"run.ema_decay must be at least 0 and below 1, got {run.ema_decay}")
    if run.clip_norm <= 0:
        raise InputError(f"run.clip_norm must be above 0 (a large number clips nothing), got {run.clip_norm}")
    check_optimizer(optimizer)
    check_output(Path(run.output_dir), run.resume)


def fit(recipe: Recipe, run: RunConfig, optimizer: OptimizerConfig, settings: dict[str, Any]) -> Path:
    """Train.

    Args:
        recipe: what to train, on what.
        run: length, precision, places.
        optimizer: optimiser settings.
        settings: the whole configuration, stored beside the run and compared when it is resumed.

    Returns:
        The folder of the finished model.

    Raises:
        InputError: the output folder holds another run, or there is nothing to resume; data that cannot be used; or
            a loss or the gradients are not finite, after which nothing is saved.
        KeyboardInterrupt: interrupted; a checkpoint was written before.
    """
    check(run, optimizer)
    accelerator = start_accelerator(run)
    check_together(accelerator, run, optimizer)
    set_seed(run.seed)
    return _Fit(accelerator, recipe, run, optimizer, settings).train()


class _Fit:
    """A run under way; see [`fit`]."""

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        run: RunConfig,
        optimizer: OptimizerConfig,
        settings: dict[str, Any],
    ) -> None:
        self.accelerator, self.recipe, self.run, self.optimizer = accelerator, recipe, run, optimizer
        self.checkpoints = Checkpoints(accelerator, Path(run.output_dir), run.keep_checkpoints, settings)
        self.start = self.checkpoints.find_start(run.resume)
        self.model, self.optimizers = _prepare(accelerator, recipe.trainee, run, optimizer)
        self.average = MovingAverage(self.model, run.ema_decay)
        accelerator.register_for_checkpointing(self.average)
        self.best = self.checkpoints.load(self.start)
        self.model.train()  # tells the trainee, which may keep frozen parts in eval mode
        self.stepper = Stepper(accelerator, self.model, self.optimizers, recipe.trainee, run)
        self.journal = Journal(accelerator, self.checkpoints.folder, self.start, run.steps, run.tensorboard)

    def train(self) -> Path:
        """All steps that are left; returns the folder of the finished model."""
        run, numbers = self.run, _numbers(self.accelerator, self.run, self.start)
        delivery = deliver(self.recipe.batches, numbers, run.workers, self.journal.tell)
        with closing(self.journal), _Interrupt() as interrupt, closing(delivery) as batches:
            for step in range(self.start, run.steps):
                self._step(step, batches)
                done = step + 1
                stop = any_process(self.accelerator, interrupt.requested)
                if _due(done, run.evaluate_every, run.steps):
                    self._evaluate(done)
                if _due(done, run.checkpoint_every, run.steps) or stop:
                    self.checkpoints.save(done, self.best)
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {done}; go on with --resume")
        with self.average.swapped_in(self.model):
            return self._save("final")

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        """One step."""
        run, began = self.run, time.perf_counter()
        window = [next(batches) for _ in range(run.accumulation)]
        waited = time.perf_counter() - began
        factor = schedule_factor(step, run.steps, self.optimizer)
        set_learning_rates(self.optimizers, factor)
        losses, metrics = self.stepper.step(window, step)
        self.average.update(self.model, step)
        done = step + 1
        self.journal.step(done, losses, metrics, factor, waited, log=_due(done, run.log_every, run.steps))

    def _evaluate(self, done: int) -> None:
        """Validate, and keep the model if it is the best so far."""
        recipe, accelerator = self.recipe, self.accelerator
        with self.average.swapped_in(self.model):
            scores = validate(accelerator, self.model, recipe.validation, self.run)
            self.journal.tell(recipe.validation.take_problems())
            if broken := [f"validation/{name}" for name, score in scores.items() if not math.isfinite(score)]:
                raise not_finite(done, broken)  # before a checkpoint is made of it
            self.journal.validation(done, scores, self._pictures())
            if scores[recipe.better] > self.best:
                self.best = scores[recipe.better]
                self._save("best")

    def _pictures(self) -> dict[str, Any]:
        """Pictures of predictions; sharded weights cannot be used by one process alone."""
        if self.recipe.pictures is None or is_sharded(self.accelerator) or not self.accelerator.is_main_process:
            return {}
        return self.recipe.pictures(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _save(self, name: str) -> Path:
        """Write the model in the form that `from_pretrained` reads; sharded weights are gathered first."""
        folder = self.checkpoints.folder / name
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            with complete_folder(folder) as part:
                self.recipe.save(state, part)
        self.accelerator.wait_for_everyone()
        return folder


def _prepare(
    accelerator: Accelerator, trainee: nn.Module, run: RunConfig, optimizer: OptimizerConfig
) -> tuple[Any, list[Any]]:
    """The trainee and its optimisers, ready for all processes."""
    if accelerator.num_processes > 1:
        trainee = synchronize_batch_norm(trainee.to(accelerator.device))
    configure_deepspeed(accelerator, run)
    model, *optimizers = accelerator.prepare(trainee, *build_optimizers(trainee, optimizer, is_sharded(accelerator)))
    return model, optimizers


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, batches: Batches, run: RunConfig) -> dict[str, float]:
    """Means of all losses and metrics over the validation batches, over all processes."""
    model.eval()
    trainee = accelerator.unwrap_model(model, keep_torch_compile=False)
    sums: dict[str, Tensor] = {}
    rank, world, last = accelerator.process_index, accelerator.num_processes, len(batches) - 1
    for first in range(0, last + 1, world):
        number = min(first + rank, last)  # all take part in every forward pass; what is double does not count
        batch = send_to_device(batches[number], accelerator.device)
        torch.manual_seed(number)
        with autocast(accelerator, run.precision):
            losses, metrics = model(**batch)
        counts = trainee.counts(batch)
        pairs = {f"loss/{name}": (value, counts[name]) for name, value in losses.items()} | metrics
        for name, (value, count) in pairs.items():
            pair = torch.tensor([float(value), float(count)], dtype=torch.float64) * (first + rank <= last)
            sums[name] = sums.get(name, torch.zeros_like(pair)) + pair
    model.train()
    where = accelerator.device if world > 1 else "cpu"
    totals = {name: accelerator.reduce(pair.to(where), reduction="sum") for name, pair in sorted(sums.items())}
    return {name: float(value / count.clamp(min=1)) for name, (value, count) in totals.items()}


class _Interrupt:
    """Turns an interrupt or termination signal into a request to stop after the step; a later one stops at once."""

    PATIENCE = 3.0  # seconds: launchers send the same signal again

    requested = False
    since = 0.0

    def __enter__(self) -> _Interrupt:
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, *_: Any) -> None:
        if self.requested and time.monotonic() - self.since > self.PATIENCE:
            raise KeyboardInterrupt("stopped at once; go on from the last checkpoint with --resume")
        if not self.requested:
            os.write(2, b"\nstopping after this step; interrupt again to stop at once\n")  # print is not for handlers
            self.requested, self.since = True, time.monotonic()

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _numbers(accelerator: Accelerator, run: RunConfig, start: int) -> range:
    """Numbers of the micro-batches of this process: it takes every `num_processes`-th."""
    world = accelerator.num_processes
    return range(
        start * run.accumulation * world + accelerator.process_index, run.steps * run.accumulation * world, world
    )


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)
