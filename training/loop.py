"""The loop that every recipe shares: steps, precision, checkpoints, validation, logs.

All randomness is a function of the step: batch n is made from its number alone, and dropout is reseeded with it. A
resumed run therefore sees the data, the prompts and the dropout masks of the uninterrupted one.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tap_llm.errors import InputError

from .checkpoints import Checkpoints, MovingAverage
from .config import OptimizerConfig, RunConfig
from .distributed import synchronize_batch_norm
from .journal import Journal
from .optimization import build_optimizers, schedule_factor, set_learning_rates

Batch = dict[str, Any]
Sums = dict[str, Tensor]


class Trainee(Protocol):
    """What a recipe trains: a module whose forward gives sums over rows, so that means are exact over processes."""

    def __call__(self, **batch: Any) -> tuple[Sums, dict[str, tuple[Tensor, Tensor]]]:
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
        save: writes the finished model into a folder, given the unwrapped trainee and its whole state dict.
        better: name of the validation metric that says which model is the best (higher is better).
        pictures: predictions to look at in TensorBoard, {title: (H, W, 3) uint8}, given the unwrapped trainee.
    """

    trainee: nn.Module
    batches: Dataset[Batch]
    validation: Dataset[Batch]
    save: Callable[[nn.Module, dict[str, Tensor], Path], None]
    better: str
    pictures: Callable[[nn.Module], dict[str, Any]] | None = None


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
    _check(run)
    accelerator = Accelerator(
        mixed_precision=run.precision,
        gradient_accumulation_steps=run.accumulation,
        cpu=not torch.accelerator.is_available(),  # said plainly, or several CPU processes would not find each other
    )
    set_seed(run.seed)
    checkpoints = Checkpoints(accelerator, Path(run.output_dir), run.keep_checkpoints, settings)
    start = checkpoints.find_start(run.resume)
    trainee: Any = recipe.trainee
    if accelerator.num_processes > 1:
        trainee = synchronize_batch_norm(trainee.to(accelerator.device))
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it asks for the batch size, having no loader
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = run.batch_size
    prepared = accelerator.prepare(trainee, *build_optimizers(trainee, optimizer, sharded))
    model, optimizers = prepared[0], list(prepared[1:])
    average = MovingAverage(model, run.ema_decay)
    accelerator.register_for_checkpointing(average)
    best = checkpoints.load(start)
    journal = Journal(accelerator, Path(run.output_dir), start, run.steps, run.tensorboard)
    stepper = _Stepper(accelerator, model, optimizers, recipe.trainee, run)

    with _Interrupt() as interrupt:
        batches = _loader(recipe.batches, _numbers(accelerator, run, start), run.workers)
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
                    journal.validation(done, scores, _pictures(recipe, accelerator, model, sharded))
                    if scores[recipe.better] > best:
                        best = scores[recipe.better]
                        _save(accelerator, recipe, model, checkpoints.folder / "best")
            if _due(done, run.checkpoint_every, run.steps) or stop:
                checkpoints.save(done, best)
            if stop:
                journal.close()
                raise KeyboardInterrupt(f"stopped after step {done}; go on with --resume")
    final = checkpoints.folder / "final"
    with average.swapped_in(model):
        _save(accelerator, recipe, model, final)
    journal.close()
    return final


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, batches: Dataset[Batch], run: RunConfig) -> dict[str, float]:
    """Means of all losses and metrics over the validation batches, over all processes."""
    model.eval()
    sums: dict[str, Tensor] = {}
    rank, world = accelerator.process_index, accelerator.num_processes
    total = len(batches) // world * world  # type: ignore[arg-type]
    for number in range(rank, total, world):
        batch = send_to_device(batches[number], accelerator.device)
        torch.manual_seed(number)
        with accelerator.autocast():
            losses, metrics = model(**batch)
        counts = accelerator.unwrap_model(model, keep_torch_compile=False).counts(batch)
        pairs = {f"loss/{name}": (value, counts[name]) for name, value in losses.items()} | metrics
        for name, (value, count) in pairs.items():
            pair = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(accelerator.device) for x in (value, count)])
            sums[name] = sums.get(name, torch.zeros_like(pair)) + pair
    model.train()
    totals = {name: accelerator.reduce(pair, reduction="sum") for name, pair in sorted(sums.items())}
    return {name: float(value / count.clamp(min=1)) for name, (value, count) in totals.items()}


class _Stepper:
    """One optimiser step over a window of micro-batches."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizers: list, trainee: Any, run: RunConfig):
        self.accelerator, self.model, self.optimizers = accelerator, model, optimizers
        self.trainee, self.run = trainee, run

    def step(self, window: list[Batch], step: int) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Losses (means over the rows of all processes, as this process sees its share) and metrics of the step."""
        accelerator, run = self.accelerator, self.run
        totals = self._global_counts(window)
        # The mean over processes and micro-batches that DDP and Accelerate take is undone: see the counts.
        scale = accelerator.num_processes * run.accumulation
        seen: Sums = {}
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        norm: Tensor | None = None
        for position, batch in enumerate(window):
            batch = send_to_device(batch, accelerator.device)
            number = (step * run.accumulation + position) * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(run.seed * 1_000_003 + number)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    sums, metrics = self.model(**batch)
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
        if norm is not None:  # DeepSpeed keeps it to itself
            metrics = {**metrics, "gradient_norm": (norm.detach(), torch.ones_like(norm))}
        return seen, metrics

    def _global_counts(self, window: list[Batch]) -> dict[str, Tensor]:
        """Rows behind each loss in the whole window, over all processes; at least 1."""
        per_batch = [self.trainee.counts(batch) for batch in window]
        names = sorted(per_batch[0])
        local = torch.tensor([sum(counts[name] for counts in per_batch) for name in names], dtype=torch.float32)
        total = self.accelerator.reduce(local.to(self.accelerator.device), reduction="sum").clamp(min=1)
        return dict(zip(names, total, strict=True))


class _Interrupt:
    """Turns the first interrupt or termination signal into a request to stop after the step."""

    requested = False

    def __enter__(self) -> _Interrupt:
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _check(run: RunConfig) -> None:
    for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(run, name) < 1:
            raise InputError(f"run.{name} must be at least 1, got {getattr(run, name)}")
    if run.precision not in ("no", "bf16", "fp16"):
        raise InputError(f"run.precision must be no, bf16 or fp16, got {run.precision!r}")


def _numbers(accelerator: Accelerator, run: RunConfig, start: int) -> range:
    """Numbers of the micro-batches of this process: it takes every `num_processes`-th."""
    world = accelerator.num_processes
    return range(
        start * run.accumulation * world + accelerator.process_index, run.steps * run.accumulation * world, world
    )


def _loader(batches: Dataset[Batch], numbers: range, workers: int) -> Iterator[Batch]:
    generator = torch.Generator()  # its own: the loader must not draw from the one of dropout
    loader = DataLoader(
        batches, batch_size=None, sampler=numbers, num_workers=workers, generator=generator,
        prefetch_factor=4 if workers else None, worker_init_fn=_use_one_thread,
    )  # fmt: skip
    return iter(loader)


def _use_one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def _pictures(recipe: Recipe, accelerator: Accelerator, model: nn.Module, sharded: bool) -> dict[str, Any]:
    """Pictures of predictions; sharded weights cannot be used by one process alone."""
    if recipe.pictures is None or sharded or not accelerator.is_main_process:
        return {}
    return recipe.pictures(accelerator.unwrap_model(model, keep_torch_compile=False))


def _save(accelerator: Accelerator, recipe: Recipe, model: nn.Module, folder: Path) -> None:
    """Write the model in the form that `from_pretrained` reads; sharded weights are gathered first."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        recipe.save(accelerator.unwrap_model(model, keep_torch_compile=False), state, folder)
    accelerator.wait_for_everyone()
