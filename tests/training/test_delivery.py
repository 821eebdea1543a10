"""Batches from worker processes: in order, with messages, with errors that people can read."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import pytest
import torch

from tap_llm.errors import InputError, MissingFileError
from training.delivery import deliver


class Numbers:
    """Batch n holds n; every fourth meets a broken sample, and one cannot be made at all."""

    def __init__(self, impossible: int = -1) -> None:
        self.impossible = impossible
        self.problems: list[str] = []

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == self.impossible:
            raise MissingFileError(f"there is no picture {number}")
        if number % 4 == 0:
            self.problems.append(f"sample {number} is broken")
        return {"number": torch.tensor(number), "text": "as it is", "array": [1, 2]}

    def take_problems(self) -> list[str]:
        problems, self.problems = self.problems, []
        return problems


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_in_order_with_messages(workers: int) -> None:
    told: list[str] = []
    torch.manual_seed(5)
    got = list(deliver(Numbers(), range(3, 21, 3), workers, told.extend))
    assert [int(batch["number"]) for batch in got] == [3, 6, 9, 12, 15, 18]
    assert got[0]["text"] == "as it is" and got[0]["array"] == [1, 2]
    assert told == ["sample 12 is broken"]
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))  # nothing was drawn


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_keep_their_own_words(workers: int) -> None:
    batches = deliver(Numbers(impossible=4), range(10), workers, lambda _: None)
    assert [int(next(batches)["number"]) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(MissingFileError) as error:
        next(batches)
    assert str(error.value) == "there is no picture 4" and isinstance(error.value, InputError)


def test_signals_to_all_processes_leave_the_workers_at_work() -> None:
    """Schedulers send them to every process; the training process decides when to stop, and then the workers end."""
    batches = deliver(Numbers(), range(60), 1, lambda _: None)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(int(worker.pid or 0), number)
    assert [int(batch["number"]) for batch in batches] == list(range(1, 60))
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_workers_end_when_the_batches_are_no_longer_wanted() -> None:
    batches = deliver(Numbers(), range(60), 1, lambda _: None)
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()
    worker.join(timeout=10)
    assert not worker.is_alive()
