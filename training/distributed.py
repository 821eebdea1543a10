"""Several processes: how they meet, and BatchNorm with the statistics of all, on CPUs as well as GPUs."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; the gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def process_state() -> PartialState:
    """This process among those of the run; without accelerators they meet on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on any device.

    The counterpart of [`torch.nn.SyncBatchNorm`], which refuses CPU tensors; the same arguments and state-dict keys.
    Batches may differ in size. Every process must take part in every forward and backward pass of training. With one
    process, and in evaluation, it is a plain BatchNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not (self.training and _several_processes()):
            return super().forward(input)
        self._check_input_dim(input)
        values = input.float()
        mean, variance, count = self._statistics(values)
        self._update_running(mean.detach(), variance.detach(), count)
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            shift = shift * self.weight + self.bias
            scale = scale * self.weight
        return (values * scale[:, None, None] + shift[:, None, None]).to(input.dtype)

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,) and biased variance (C,) over all processes, and the number of values per channel, scalar.

        In two steps, because the mean of squares minus the square of the mean loses digits.
        """
        local_count = values.new_tensor([values.numel() // values.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([values.sum(dim=(0, 2, 3)), local_count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        squares = _SumOverProcesses.apply((values - mean[:, None, None]).square().sum(dim=(0, 2, 3)))
        return mean, squares / count, count

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, if they are tracked; they hold the unbiased variance, as in torch."""
        running_mean, running_var, seen = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None or seen is None:
            return
        seen.add_(1)
        momentum = 1 / float(seen) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def synchronize_batch_norm(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Make every BatchNorm2d of a model see the batches of all processes.

    Call it once the process group exists and before the model is wrapped. Parameters and buffers stay the same
    objects, and the state-dict keys stay the same. A model whose BatchNorm was folded has none to replace, and a
    single process keeps plain BatchNorm.

    Args:
        model: changed in place.
        device: where the model will train; that of its parameters by default.

    Returns:
        the model; a new module only if the model itself is a BatchNorm.
    """
    if not _several_processes():
        return model
    kind = torch.device(device).type if device is not None else next(model.parameters()).device.type
    if kind == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _swap(model)


def _swap(module: nn.Module) -> nn.Module:
    """The module with [`SynchronizedBatchNorm2d`] in place of every plain BatchNorm2d inside."""
    if type(module) is nn.BatchNorm2d:
        return _synchronized(module)
    for name, child in module.named_children():
        setattr(module, name, _swap(child))
    return module


def _synchronized(norm: nn.BatchNorm2d) -> SynchronizedBatchNorm2d:
    """The same norm, with the same parameter and buffer objects."""
    twin = SynchronizedBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    for name, parameter in norm.named_parameters():
        setattr(twin, name, parameter)
    for name, buffer in norm.named_buffers():
        setattr(twin, name, buffer)
    return twin.train(norm.training)
