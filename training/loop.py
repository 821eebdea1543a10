"""The loop that every recipe shares: steps, precision, checkpoints, validation, logs.

All randomness is a function of the step: batch n is made from its number alone, and dropout is reseeded with it. A
resumed run therefore sees the data, the prompts and the dropout masks of the uninterrupted one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tap_llm.errors import InputError

from .checkpoints import Checkpoints, MovingAverage, check_output
from .config import OptimizerConfig, RunConfig
from .delivery import Batch, Batches, deliver
from .distributed import synchronize_batch_norm
from .files import complete_folder
from .journal import Journal
from .optimization import build_optimizers, check_optimizer, schedule_factor, set_learning_rates
from .precision import autocast, check_together, configure_deepspeed, is_sharded, start_accelerator

Sums = dict[str, Tensor]
Metrics = dict[str, tuple[Tensor, Tensor]]


class Trainee(Protocol):
    """What a recipe trains: a module whose forward gives sums over rows, so that means are exact over processes."""

    def __call__(self, **batch: Any) -> tuple[Sums, Metrics]:
        """Sum of each loss over the rows of the batch, and metrics as (sum, count)."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows that each loss is a mean over."""

    weights: dict[str, float]
    """Factor on each loss."""


@dataclass
class Recipe:
    """A recipe's parts, handed to [`fit`].

    Args:
        trainee: see [`Trainee`].
        batches: micro-batch n of the whole run, over all processes.
        validation: batches for validation; the same at every time.
        save: writes the finished model into a folder, given the whole state dict of the trainee. One process does
            it, so it must not touch the trainee's own weights, of which it may have a part only.
        better: name of the validation metric that says which model is the best (higher is better).
        pictures: predictions to look at in TensorBoard, {title: (H, W, 3) uint8}, given the unwrapped trainee.
    """

    trainee: nn.Module
    batches: Batches
    validation: Batches
    save: Callable[[dict[str, Tensor], Path], None]
    better: str
    pictures: Callable[[nn.Module], dict[str, Any]] | None = None


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
        InputError: the output folder holds another run, or there is nothing to resume.
        KeyboardInterrupt: interrupted; a checkpoint was written before.
    """
    check(run, optimizer)
    accelerator = start_accelerator(run)
    check_together(accelerator, run, optimizer)
    set_seed(run.seed)
    checkpoints = Checkpoints(accelerator, Path(run.output_dir), run.keep_checkpoints, settings)
    start = checkpoints.find_start(run.resume)
    model, optimizers = _prepare(accelerator, recipe.trainee, run, optimizer)
    average = MovingAverage(model, run.ema_decay)
    accelerator.register_for_checkpointing(average)
    best = checkpoints.load(start)
    model.train()  # tells the trainee, which may keep frozen parts in eval mode
    journal = Journal(accelerator, checkpoints.folder, start, run.steps, run.tensorboard)
    stepper = _Stepper(accelerator, model, optimizers, recipe.trainee, run)
    delivery = deliver(recipe.batches, _numbers(accelerator, run, start), run.workers, journal.tell)

    with closing(journal), _Interrupt() as interrupt, closing(delivery) as batches:
        for step in range(start, run.steps):
            waited = time.perf_counter()
            window = [next(batches) for _ in range(run.accumulation)]
            waited = time.perf_counter() - waited
            factor = schedule_factor(step, run.steps, optimizer)
            set_learning_rates(optimizers, factor)
            losses, metrics = stepper.step(window, step)
            average.update(model, step)
            done = step + 1
            journal.step(done, losses, metrics, factor, waited, log=done % run.log_every == 0 or done == run.steps)
            stop = _any_process(accelerator, interrupt.requested)
            if _due(done, run.evaluate_every, run.steps):
                with average.swapped_in(model):
                    scores = validate(accelerator, model, recipe.validation, run)
                    journal.tell(recipe.validation.take_problems())
                    journal.validation(done, scores, _pictures(recipe, accelerator, model))
                    if scores[recipe.better] > best:
                        best = scores[recipe.better]
                        _save(accelerator, recipe, model, checkpoints.folder / "best")
            if _due(done, run.checkpoint_every, run.steps) or stop:
                checkpoints.save(done, best)
            if stop:
                raise KeyboardInterrupt(f"stopped after step {done}; go on with --resume")
    final = checkpoints.folder / "final"
    with average.swapped_in(model):
        _save(accelerator, recipe, model, final)
    return final


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


class _Stepper:
    """One optimiser step over a window of micro-batches."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizers: list, trainee: Any, run: RunConfig):
        self.accelerator, self.model, self.optimizers = accelerator, model, optimizers
        self.trainee, self.run = trainee, run

    def step(self, window: list[Batch], step: int) -> tuple[Sums, Metrics]:
        """Losses (means over the rows of all processes, as this process sees its share) and metrics of the step."""
        accelerator, run = self.accelerator, self.run
        totals = self._global_counts(window)
        # The mean over processes and micro-batches that DDP and Accelerate take is undone: see the counts.
        scale = accelerator.num_processes * run.accumulation
        seen: Sums = {}
        metrics: Metrics = {}
        norm: Any = None
        for position, batch in enumerate(window):
            batch = send_to_device(batch, accelerator.device)
            number = (step * run.accumulation + position) * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(run.seed * 1_000_003 + number)
            with accelerator.accumulate(self.model):
                with autocast(accelerator, run.precision):
                    sums, pairs = self.model(**batch)
                means = {name: value / totals[name] for name, value in sums.items()}
                loss = torch.stack([self.trainee.weights[name] * mean for name, mean in means.items()]).sum()
                accelerator.backward(loss * scale)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), run.clip_norm)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            for name, mean in means.items():
                seen[name] = seen.get(name, 0.0) + mean.detach()
            for name, (value, count) in pairs.items():
                before = metrics.get(name, (0, 0))
                metrics[name] = before[0] + value.detach(), before[1] + count
        if norm is not None:
            metrics["gradient_norm"] = self._whole(norm), torch.ones((), device=accelerator.device)
        return seen, metrics

    def _whole(self, norm: Any) -> Tensor:
        """A gradient norm as Accelerate gives it, a number from DeepSpeed and in parts from FSDP, as a plain tensor."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return torch.as_tensor(norm, device=self.accelerator.device).detach()

    def _global_counts(self, window: list[Batch]) -> dict[str, Tensor]:
        """Rows behind each loss in the whole window, over all processes; at least 1."""
        per_batch = [self.trainee.counts(batch) for batch in window]
        names = sorted(per_batch[0])
        local = torch.tensor([sum(counts[name] for counts in per_batch) for name in names], dtype=torch.float32)
        total = self.accelerator.reduce(local.to(self.accelerator.device), reduction="sum").clamp(min=1)
        return dict(zip(names, total, strict=True))


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


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def _pictures(recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """Pictures of predictions; sharded weights cannot be used by one process alone."""
    if recipe.pictures is None or is_sharded(accelerator) or not accelerator.is_main_process:
        return {}
    return recipe.pictures(accelerator.unwrap_model(model, keep_torch_compile=False))


def _save(accelerator: Accelerator, recipe: Recipe, model: nn.Module, folder: Path) -> None:
    """Write the model in the form that `from_pretrained` reads; sharded weights are gathered first."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        with complete_folder(folder) as part:
            recipe.save(state, part)
    accelerator.wait_for_everyone()
