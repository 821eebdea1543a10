"""Accelerate, set up so that all ways of distributing a run compute the same."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from tap_llm.errors import InputError

from .config import OptimizerConfig, RunConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def start_accelerator(run: RunConfig) -> Accelerator:
    """The accelerator of a run.

    Weights, buffers and inputs stay float32, and [`autocast`] lowers what may be lowered. The mixed precision of FSDP
    and DeepSpeed, which Accelerate would turn on, also rounds the coordinates of prompts to three digits.

    Raises:
        InputError: float16 without a GPU, or a configuration that Accelerate does not take.
    """
    try:
        return Accelerator(
            mixed_precision="fp16" if run.precision == "fp16" else "no",  # float16 needs Accelerate's gradient scaler
            gradient_accumulation_steps=run.accumulation,
            cpu=not torch.accelerator.is_available(),  # or several CPU processes would not find each other
        )
    except ValueError as error:
        raise InputError(f"Accelerate cannot start with these settings: {error}") from None


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights, gradients or optimiser states are split among processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_together(accelerator: Accelerator, run: RunConfig, optimizer: OptimizerConfig) -> None:
    """Raise InputError for settings that do not go together."""
    if run.precision == "fp16" and (is_sharded(accelerator) or optimizer.name == "muon"):
        raise InputError("run.precision=fp16 goes with one optimizer on whole weights: use bf16")
    if run.ema_decay and is_sharded(accelerator):
        raise InputError("run.ema_decay averages whole weights: set it to 0 with FSDP and DeepSpeed")


def configure_deepspeed(accelerator: Accelerator, run: RunConfig) -> None:
    """Tell DeepSpeed the settings of the run that it handles itself."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": run.batch_size,
            "gradient_accumulation_steps": run.accumulation,
            "gradient_clipping": run.clip_norm,
            "torch_autocast": {"enabled": run.precision == "bf16", "dtype": "bfloat16"},
        }


def autocast(accelerator: Accelerator, precision: str) -> AbstractContextManager[Any]:
    """Context of the forward pass; DeepSpeed brings its own."""
    if precision not in _DTYPES or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return nullcontext()
    return torch.autocast(accelerator.device.type, _DTYPES[precision])
