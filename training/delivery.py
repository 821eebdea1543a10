"""Batches on their way from the processes that make them, with what there is to tell about them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from tap_llm.errors import InputError

Batch = dict[str, Any]
Parcel = tuple[Batch | InputError, list[str]]

PREFETCH = 4  # batches that a worker makes ahead


class Batches(Protocol):
    """Micro-batch n of a run, a function of n alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...

    def take_problems(self) -> list[str]:
        """Messages about broken samples that were met since the last call."""


def deliver(
    batches: Batches, numbers: Sequence[int], workers: int, tell: Callable[[list[str]], None]
) -> Generator[Batch, None, None]:
    """Batches in order.

    Args:
        batches: what makes them.
        numbers: which.
        workers: processes that make them; 0 for this one.
        tell: gets messages about broken samples.

    Raises:
        InputError: raised while a batch was made, with its own message.
    """
    loader: DataLoader[Parcel] = DataLoader(
        _Parcels(batches), batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_as_it_is,
        generator=torch.Generator(),  # its own: the loader must not draw from the one of dropout
        prefetch_factor=PREFETCH if workers else None, worker_init_fn=_prepare_worker,
    )  # fmt: skip
    for batch, problems in loader:
        tell(problems)
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _Parcels(Dataset[Parcel]):
    """Batches with messages. Errors travel as values: the loader would wrap them in a traceback."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Parcel:
        try:
            batch: Batch | InputError = self.batches[number]
        except InputError as error:
            batch = error
        return batch, self.batches.take_problems()


def _as_it_is(parcel: Any) -> Any:
    return parcel


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the training process decides when to stop
        signal.signal(number, signal.SIG_IGN)
