"""One optimiser step: exact means over micro-batches and processes, and a stop where they are no numbers."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tap_llm.errors import InputError

from .config import RunConfig
from .delivery import Batch
from .precision import autocast
from .recipe import Metrics, Sums


class Stepper:
    """Steps over windows of micro-batches.

    Args:
        accelerator: what the model was prepared with.
        model: the prepared trainee.
        optimizers: prepared too.
        trainee: the trainee itself, see [`Trainee`].
        run: precision, accumulation, seed and clipping.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizers: list, trainee: Any, run: RunConfig):
        self.accelerator, self.model, self.optimizers = accelerator, model, optimizers
        self.trainee, self.run = trainee, run

    def step(self, window: list[Batch], step: int) -> tuple[Sums, Metrics]:
        """Take a step.

        Args:
            window: the micro-batches of this process.
            step: number of steps before this one.

        Returns:
            Losses (means over the rows of all processes, as this process sees its share), and metrics.

        Raises:
            InputError: in all processes, if a loss or the norm of the gradients is not finite.
        """
        totals = self._global_counts(window)
        seen: Sums = {}
        metrics: Metrics = {}
        norm: Any = None
        for position, batch in enumerate(window):
            number = (step * self.run.accumulation + position) * self.accelerator.num_processes
            torch.manual_seed(self.run.seed * 1_000_003 + number + self.accelerator.process_index)
            with self.accelerator.accumulate(self.model):
                means, pairs, norm = self._micro_step(batch, totals)
            for name, mean in means.items():
                seen[name] = seen.get(name, 0.0) + mean.detach()
            for name, (value, count) in pairs.items():
                before = metrics.get(name, (0, 0))
                metrics[name] = before[0] + value.detach(), before[1] + count
        norms = {"gradient_norm": self._whole(norm)} if norm is not None else {}
        if self._is_finite(seen, norms, step + 1):
            metrics |= {name: (value, torch.ones_like(value)) for name, value in norms.items()}
        return seen, metrics

    def _micro_step(self, batch: Batch, totals: dict[str, Tensor]) -> tuple[Sums, Metrics, Any]:
        """Add the gradients of a micro-batch; with the last one of the window, step. Losses, metrics, gradient norm."""
        accelerator, norm = self.accelerator, None
        with autocast(accelerator, self.run.precision):
            sums, pairs = self.model(**send_to_device(batch, accelerator.device))
        means = {name: value / totals[name] for name, value in sums.items()}
        loss = torch.stack([self.trainee.weights[name] * mean for name, mean in means.items()]).sum()
        # The mean over processes and micro-batches that DDP and Accelerate take is undone: see the counts.
        accelerator.backward(loss * (accelerator.num_processes * self.run.accumulation))
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(self.model.parameters(), self.run.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return means, pairs, norm

    def _is_finite(self, losses: Sums, norms: dict[str, Tensor], step: int) -> bool:
        """Whether all are finite; raises InputError if not, but for overflows that the gradient scaler deals with."""
        values = {f"loss/{name}": value for name, value in losses.items()} | norms
        finite = torch.stack([value.float() for value in values.values()]).isfinite().tolist()
        broken = [name for name, good in zip(values, finite, strict=True) if not good]
        skipped = broken == list(norms) and self._scaler_may_sink()
        if any_process(self.accelerator, bool(broken) and not skipped):
            raise not_finite(step, broken or ["values of another process"])
        return not broken

    def _scaler_may_sink(self) -> bool:
        """Whether float16's gradient scaler, which skips steps that overflow, has room for a smaller scale."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

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


def not_finite(step: int, names: list[str]) -> InputError:
    """The error that stops a run because of what came out at a step."""
    return InputError(
        f"stopped at step {step}: not finite: {', '.join(names)}. Nothing was saved from then on: the last checkpoint "
        "and best/ are good, made while all was finite. A resumed run would come to the same; start another one with a "
        "lower optimizer.learning_rate, a longer optimizer.warmup, a smaller run.clip_norm or run.precision=no"
    )


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it is so in any process; all must ask."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)
