"""A benchmark without a model: the sine of numbers, some of which are unusable.

As a script, started by `torch.distributed.run`, it takes a folder, runs into an interruption there, and runs whole.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.base import Benchmark, Example, Examples, Prediction, Scores, fingerprint, run
from tap_llm.errors import InputError

MODEL = {"name": "sine", "sha256": "1", "device": "cpu"}
NUMBERS: list[float | None] = [0.1 * number for number in range(23)]
NUMBERS[4] = None  # cannot be read
NUMBERS[9] = -1.0  # has no answer


class Sines(Benchmark):
    """Predicts the sine of each number; at `stop_at` it is interrupted."""

    protocol = "sines-v1"
    unit = "numbers"

    def __init__(self, numbers: list[float | None] = NUMBERS, stop_at: int | None = None) -> None:
        self.numbers, self.stop_at = numbers, stop_at
        self.asked: list[list[str]] = []

    def examples(self) -> Examples:
        return self

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        if self.numbers[index] is None:
            raise InputError(f"number {index} is damaged")
        return Example(str(index), fingerprint(self.numbers[index]))

    def truth(self, example: Any) -> Prediction:
        return {"number": self.numbers[int(example.id)]}

    def predict(self, example: Any) -> Prediction:
        raise NotImplementedError

    def predict_batch(self, examples: list[Any]) -> Iterable[Prediction]:
        self.asked.append([example.id for example in examples])
        numbers = [self.numbers[int(example.id)] for example in examples]
        if self.stop_at is not None and any(int(example.id) >= self.stop_at for example in examples):
            raise KeyboardInterrupt
        if min(number for number in numbers if number is not None) < 0:
            raise InputError("below zero")
        return [{"sine": math.sin(number)} for number in numbers if number is not None]

    def score(self, predictions: list[Prediction]) -> Scores:
        """A sum whose last digits depend on the order."""
        total = 0.0
        for prediction in predictions:
            total = total / 3 + prediction.get("sine", 0.0)
        return Scores({"total": total, "numbers": sum(prediction["number"] for prediction in predictions)})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        run(Sines(stop_at=14), folder / "stopped.json", MODEL, batch_size=2, progress=False)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finished = run(Sines(), folder / "whole.json", MODEL, batch_size=2)
    again = Sines()
    run(again, folder / "begun.json", MODEL, batch_size=2)
    print(json.dumps({"asked": again.asked, "main": finished is not None}), flush=True)
