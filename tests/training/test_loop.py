"""The loop's parts: exact means over uneven batches and processes, checks before the start, signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tap_llm.errors import InputError
from training.config import OptimizerConfig, RunConfig
from training.loop import _Interrupt, check, validate
from training.optimization import set_learning_rates
from training.precision import autocast, check_together, start_accelerator
from training.stepper import Stepper


class Rows(nn.Module):
    """A squared error per row, and an absolute error of the rows that have a name."""

    weights = {"square": 1.0, "named": 0.5}

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.drop = nn.Dropout(0.5)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, float]:
        return {"square": float(len(batch["x"])), "named": float(batch["named"].sum())}

    def forward(self, x: Tensor, named: Tensor) -> Any:
        error = self.layer(x)[:, 0] - x.sum(1)
        sums = {"square": error.square().sum(), "named": (error.abs() * named).sum()}
        return sums, {"small": ((error.abs() < 1)[named].sum(), named.sum())}


class Uneven:
    """Batches of 1, 2, 3, ... rows, the odd ones without names."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        x = torch.randn(number + 1, 2, generator=torch.Generator().manual_seed(number))
        return {"x": x, "named": (torch.arange(number + 1) % 2 == 0) & torch.tensor(number % 2 == 0)}

    def take_problems(self) -> list[str]:
        return []


def together(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_accumulated_gradients_are_those_of_the_mean_over_all_rows() -> None:
    torch.manual_seed(0)
    trainee, batches = Rows(), [Uneven(9)[number] for number in (0, 1, 4)]
    whole = together(batches)
    sums, metrics = trainee(**whole)
    counts = trainee.counts(whole)
    means = {key: value / counts[key] for key, value in sums.items()}
    layer = trainee.layer
    gradients = torch.autograd.grad(means["square"] + 0.5 * means["named"], [layer.weight, layer.bias])
    before = layer.weight.detach().clone()
    run = RunConfig(precision="no", accumulation=3, clip_norm=1e6)
    accelerator = start_accelerator(run)
    optimizer = torch.optim.SGD([{"params": trainee.parameters(), "peak": 1.0}], lr=1.0)
    model, optimizer = accelerator.prepare(trainee, optimizer)
    set_learning_rates([optimizer], 1.0)
    losses, seen = Stepper(accelerator, model, [optimizer], trainee, run).step(batches, 0)
    start_accelerator(RunConfig(accumulation=1))  # Accelerate remembers it for all
    torch.testing.assert_close(before - layer.weight, gradients[0], rtol=1e-5, atol=1e-6)
    for key in means:
        torch.testing.assert_close(losses[key], means[key].detach(), rtol=1e-5, atol=1e-6)
    assert [int(value) for value in seen["small"]] == [int(value) for value in metrics["small"]]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(seen["gradient_norm"][0], norm)


def step_once(trainee: Any, scale: float = 0.0) -> dict[str, Any]:
    """Metrics of a step; with a scale, float16's gradient scaler is at work, which Accelerate makes on GPUs only."""
    run = RunConfig(precision="no")
    accelerator = start_accelerator(run)
    optimizer = torch.optim.SGD([{"params": trainee.parameters(), "peak": 1.0}], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        if scale:
            patch.setattr(type(accelerator), "mixed_precision", "fp16")
            patch.setattr(accelerator, "native_amp", True)
            patch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=scale))
        model, optimizer = accelerator.prepare(trainee, optimizer)
        return Stepper(accelerator, model, [optimizer], trainee, run).step([Uneven(3)[2]], 6)[1]


class InfiniteGradient(torch.autograd.Function):
    """Zero, and infinitely steep."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros(())

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full((1,), torch.inf)


class Steep(Rows):
    """Finite losses whose gradients are not."""

    def forward(self, x: Tensor, named: Tensor) -> Any:
        sums, metrics = super().forward(x, named)
        return {**sums, "square": sums["square"] + InfiniteGradient.apply(self.layer.bias)}, metrics


@pytest.mark.parametrize("scale", [0.0, 65536.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_that_are_not_finite_stop_the_run(value: float, scale: float) -> None:
    """A smaller scale of the gradients would not help."""
    trainee = Rows()
    trainee.layer.bias.data[:] = value
    with pytest.raises(InputError, match=r"at step 7: not finite: loss/square, loss/named, gradient_norm\. .*are good"):
        step_once(trainee, scale)


def test_gradients_that_are_not_finite_stop_the_run_unless_the_scaler_skips_them() -> None:
    assert step_once(Rows())["gradient_norm"][0] > 0 and step_once(Rows(), 1024.0)["gradient_norm"][0] > 0
    with pytest.raises(InputError, match=r"at step 7: not finite: gradient_norm\. "):
        step_once(Steep())
    trainee = Steep()
    before = trainee.layer.bias.clone()
    assert "gradient_norm" not in step_once(trainee, 1024.0)
    assert torch.equal(trainee.layer.bias, before)
    with pytest.raises(InputError, match=r"not finite: gradient_norm\. "):  # it has come down all the way in vain
        step_once(Steep(), 1.0)


class Rank:
    """What `validate` asks of an accelerator, for one of several processes; sums are handed over as they are."""

    device = torch.device("cpu")
    distributed_type = "MULTI_CPU"

    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes = rank, world
        self.reduced: list[Tensor] = []

    def unwrap_model(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def reduce(self, pair: Tensor, reduction: str) -> Tensor:
        self.reduced.append(pair)
        return pair


def validation_sums(trainee: nn.Module, rank: int, world: int, length: int) -> tuple[Tensor, int]:
    """What a process adds to the sums, and how often it ran the model."""
    calls: list[None] = []
    hook = trainee.register_forward_hook(lambda *_: calls.append(None))
    accelerator: Any = Rank(rank, world)
    validate(accelerator, trainee, Uneven(length), RunConfig(precision="no"))
    hook.remove()
    return torch.stack(accelerator.reduced), len(calls)


@pytest.mark.parametrize(("world", "length"), [(2, 6), (2, 5), (3, 7), (8, 3)])
def test_validation_is_the_same_over_any_number_of_processes(world: int, length: int) -> None:
    torch.manual_seed(0)
    trainee = Rows()
    alone, _ = validation_sums(trainee, 0, 1, length)
    parts = [validation_sums(trainee, rank, world, length) for rank in range(world)]
    torch.testing.assert_close(sum(part for part, _ in parts), alone)
    assert len({calls for _, calls in parts}) == 1  # or some would wait for the others for ever


def test_validation_gives_means_and_leaves_the_model_in_training() -> None:
    torch.manual_seed(0)
    trainee = Rows().train()
    accelerator = start_accelerator(RunConfig(precision="no"))
    scores = validate(accelerator, trainee, Uneven(4), RunConfig(precision="no"))
    assert trainee.training and trainee.drop.training
    whole = together([Uneven(4)[number] for number in range(4)])
    with torch.no_grad():
        sums, _ = trainee.eval()(**whole)
    assert scores["loss/square"] == pytest.approx(float(sums["square"]) / 10, rel=1e-5)
    assert scores["loss/named"] == pytest.approx(float(sums["named"]) / int(whole["named"].sum()), rel=1e-5)


# Before the start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "run.steps must be at least 1"),
        ({"accumulation": 0}, "run.accumulation"),
        ({"workers": -1}, "run.workers must be at least 0"),
        ({"seed": -3}, "run.seed"),
        ({"precision": "half"}, "run.precision must be no, bf16 or fp16, got 'half'"),
        ({"ema_decay": 1.0}, "run.ema_decay"),
        ({"clip_norm": 0.0}, "run.clip_norm"),
        ({"resume": True}, "no run to resume"),
    ],
)
def test_runs_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(RunConfig(output_dir=str(tmp_path / "run"), **changes), OptimizerConfig())
    assert not (tmp_path / "run").exists()


def test_schedules_are_checked_before_the_warm_up_is_over(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="schedule"):
        check(RunConfig(output_dir=str(tmp_path)), OptimizerConfig(schedule="cosin"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_float16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="fp16"):
        start_accelerator(RunConfig(precision="fp16"))


def test_precision_of_the_forward_pass() -> None:
    accelerator = start_accelerator(RunConfig(precision="bf16"))
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with autocast(accelerator, "bf16"):
        assert layer(x).dtype == torch.bfloat16
    with autocast(accelerator, "no"):
        assert layer(x).dtype == torch.float32
    check_together(accelerator, RunConfig(ema_decay=0.9), OptimizerConfig(name="muon"))
    with pytest.raises(InputError, match="one optimizer"):  # the scaler would scale the second one's gradients twice
        check_together(accelerator, RunConfig(precision="fp16"), OptimizerConfig(name="muon"))


# Signals


def test_an_interrupt_asks_for_a_stop_and_a_later_one_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with _Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once: launchers repeat what the terminal sent
        assert interrupt.requested
        monkeypatch.setattr(_Interrupt, "PATIENCE", -1.0)
        with pytest.raises(KeyboardInterrupt, match="last checkpoint"):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
