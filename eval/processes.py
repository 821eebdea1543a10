"""The processes of a run: one by default, more under `accelerate launch`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

PATIENCE = timedelta(days=30)  # processes that are done wait so long for the others


def join(device: str | None = None) -> PartialState:
    """This process among those of the run.

    Args:
        device: where models are to be; only "cpu" matters, which needs no GPU for talking either. The first call
            decides.
    """
    cpu = device == "cpu" or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def own_device(device: str | None) -> str | None:
    """The device to load a model on: as asked for, else a GPU of its own for each of several processes."""
    state = join(device)
    return str(state.device) if device is None and state.num_processes > 1 else device


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order; waits for all."""
    return gather_object([value])
