"""Predicting: batches are dealt out to processes, nothing on disk is repeated, what fails is named.

A batch is the same whichever process gets it, so that results do not depend on how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tap_llm.errors import InputError

from .cache import PredictionFile, StoredPredictions

if TYPE_CHECKING:
    from .base import Benchmark, Example


@dataclass
class Outcome:
    """What became of an example.

    Attributes:
        index: its place among all.
        id: its name; None where it cannot be read.
        fingerprint: of what was read.
        fault: why there is no prediction; "" where there is one.
        truth: of an example whose prediction failed.
    """

    index: int
    id: str | None = None
    fingerprint: str = ""
    fault: str = ""
    truth: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """As predictions are stored."""
        return str(self.id), self.fingerprint

    def describe(self) -> str:
        """The fault, with the example's name in front."""
        named = self.id is None or self.fault.startswith(self.id)
        return self.fault if named else f"{self.id}: {self.fault}"


@dataclass
class Share:
    """What one process did.

    Attributes:
        outcomes: of its examples.
        examples: predicted now, not read from disk.
        units: likewise.
        seconds: that took.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    examples: int = 0
    units: int = 0
    seconds: float = 0.0


class Worker:
    """One process at work.

    Args:
        benchmark: says what to predict, and how.
        stored: what need not be predicted.
        file: takes new predictions.
    """

    def __init__(self, benchmark: Benchmark, stored: StoredPredictions, file: PredictionFile) -> None:
        self.benchmark, self.stored, self.file = benchmark, stored, file
        self.examples = benchmark.examples()
        self.share = Share()

    def run(self, rank: int, processes: int, batch_size: int, limit: int | None, progress: bool) -> Share:
        """Go through every so many-th batch of the first `limit` examples."""
        numbers = range(len(self.examples))[:limit]
        batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
        ours = batches[rank::processes]
        with tqdm(total=sum(map(len, ours)), unit="example", disable=not progress, smoothing=0.1) as bar:
            for batch in ours:
                self._take(batch)
                if self.share.examples:
                    speed = self.share.units / self.share.seconds
                    bar.set_postfix_str(f"{speed:.1f} {self.benchmark.unit}/s", refresh=False)
                bar.update(len(batch))
        return self.share

    def _take(self, batch: Sequence[int]) -> None:
        started = time.perf_counter()
        read = [self._read(index) for index in batch]
        wanted = [pair for pair in read if pair is not None and pair[0].key not in self.stored]
        if wanted:
            self._predict(wanted)
            self.share.seconds += time.perf_counter() - started

    def _read(self, index: int) -> tuple[Outcome, Example] | None:
        outcome = Outcome(index)
        self.share.outcomes.append(outcome)
        try:
            example = self.examples[index]
        except InputError as error:
            outcome.fault = str(error) or f"example {index} cannot be read"
            return None
        outcome.id, outcome.fingerprint = example.id, example.fingerprint
        return outcome, example

    def _predict(self, wanted: Sequence[tuple[Outcome, Example]]) -> None:
        """All at once; where that fails, what is left one by one, to find whose fault it is."""
        before = self.share.examples
        try:
            self._answer([example for _, example in wanted])
        except InputError as error:
            rest = wanted[self.share.examples - before :]
            if len(rest) > 1:
                for pair in rest:
                    self._predict([pair])
            for outcome, example in rest if len(rest) == 1 else ():
                outcome.fault = str(error) or "the prediction failed"
                outcome.truth = self.benchmark.truth(example)

    def _answer(self, examples: list[Example]) -> None:
        for example, answer in zip(examples, self.benchmark.predict_batch(examples), strict=True):
            prediction = self.benchmark.truth(example) | answer
            self.file.add(example.id, example.fingerprint, prediction)
            self.share.examples += 1
            self.share.units += self.benchmark.count(prediction)


@dataclass
class Merged:
    """What all processes did, in the order of the examples.

    Attributes:
        outcomes: of all examples.
        predictions: what is to be scored.
        faults: one line for each example without a prediction of its own.
        unusable: how many of these cannot be scored either.
    """

    outcomes: list[Outcome]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unusable: int = 0


def merge(shares: Sequence[Share], stored: StoredPredictions, benchmark: Benchmark) -> Merged:
    """Put together what processes did; the second example of one id counts as wrong."""
    merged = Merged(sorted((one for share in shares for one in share.outcomes), key=lambda one: one.index))
    seen: set[str] = set()
    for outcome in merged.outcomes:
        name = outcome.id
        if name in seen:
            outcome.fault = f"this id is used twice; example {outcome.index} counts as wrong"
            outcome.truth = benchmark.truth(benchmark.examples()[outcome.index])
            name = f"{name} (example {outcome.index})"
        if outcome.fault:
            merged.faults.append(outcome.describe())
        if name is None:
            merged.unusable += 1
            continue
        seen.add(name)
        answer = {**outcome.truth, "fault": outcome.fault} if outcome.fault else stored[outcome.key]
        merged.predictions.append({**answer, "id": name})
    return merged


def speed(shares: Sequence[Share], unit: str) -> dict[str, Any]:
    """Per second, in all and of each process, over what was predicted in this run and not read from disk."""
    longest = max(share.seconds for share in shares)
    busy = sum(share.seconds for share in shares)
    counts = {"examples": sum(share.examples for share in shares), unit: sum(share.units for share in shares)}
    return {
        **{f"{name}_per_second": round(count / longest, 2) if count else None for name, count in counts.items()},
        "per_process": {
            f"{name}_per_second": round(count / busy, 2) if count else None for name, count in counts.items()
        },
    }
