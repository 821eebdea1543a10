"""What all benchmarks share: predictions that survive an interruption, several processes, and a results file.

class Mine(Benchmark):
    protocol = "mine-v1"
    def examples(self): ...             # a sequence; nothing is read before it is asked for
    def truth(self, example): ...       # what `score` needs to know of it
    def predict(self, example): ...     # or `predict_batch`; -> what JSON can hold
    def score(self, predictions): ...   # -> Scores; what has a "fault" is wrong

finished = run(Mine(...), Path("results.json"), describe_model(pipe, "tap-tiny"))

Commands use `eval.command`, which does the rest. An example that cannot be read is named and counted as unusable; the
second of two with one id is named and counts as wrong. Pictures are best read in `predict`: where one is missing, the
example still counts.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import tap_llm
from tap_llm.errors import InputError

from .cache import PredictionFile, StoredPredictions, as_json, part_path
from .cases import Case, extremes
from .processes import gather, join
from .provenance import describe_model, describe_modules, fingerprint, hash_texts, versions
from .running import Share, Worker, merge, speed

Prediction = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Example:
    """One thing to predict; benchmarks add what they need.

    Attributes:
        id: unique within the benchmark, and the same in every run.
        fingerprint: hash of all that is known about it. Stored predictions count for the same fingerprint only.
    """

    id: str
    fingerprint: str


class Examples(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass
class Scores:
    """Metrics, and why others are missing.

    Attributes:
        metrics: nested dicts of numbers; None where there was nothing to measure on.
        not_measured: reason by metric.
        cases: for `eval.report` to draw the worst and the best of; optional.
        faults: what is wrong beside whole examples: with single regions, answers, or the data; one line each.
    """

    metrics: dict[str, Any]
    not_measured: dict[str, str] = field(default_factory=dict)
    cases: Iterable[Case] = ()
    faults: Sequence[str] = ()


class Benchmark(ABC):
    """A named protocol: which examples, what is asked of the model, how answers are judged.

    Attributes:
        protocol: name with version; results of different names are not to be compared.
        unit: what an example holds several of, for the speed that is printed.
    """

    protocol: ClassVar[str]
    unit: ClassVar[str] = "examples"

    @abstractmethod
    def examples(self) -> Examples:
        """All examples, in order. Access raises [`InputError`] for one that cannot be read."""

    @abstractmethod
    def predict(self, example: Any) -> Prediction:
        """The model's answer to one example, as JSON values."""

    def predict_batch(self, examples: list[Any]) -> Iterable[Prediction]:
        """Answers to several examples, in order; to be overridden where one call for all is faster.

        The answers must not depend on which examples come together.
        """
        return map(self.predict, examples)

    def truth(self, example: Any) -> Prediction:
        """What `score` needs to know of an example, as JSON values; it is added to every prediction, failed or not."""
        return {}

    @abstractmethod
    def score(self, predictions: list[Prediction]) -> Scores:
        """Metrics of all predictions, in the order of the examples; reads no pictures.

        A prediction is `truth`, the answer of `predict`, and "id". Where there is no answer, because `predict` raised
        [`InputError`], it has "fault", the reason, in place of it, and must count as wrong.
        """

    def settings(self) -> dict[str, Any]:
        """What decides the predictions, beside model and examples."""
        return {}

    def count(self, prediction: Prediction) -> int:
        """How many units a prediction covers."""
        return 1


@dataclass
class Run:
    """A finished run.

    Attributes:
        results: what the results file holds.
        predictions: one per readable example, in order, as `score` got them.
    """

    results: dict[str, Any]
    predictions: list[Prediction]


def run(
    benchmark: Benchmark,
    out: Path,
    model: dict[str, Any],
    fresh: bool = False,
    report: Callable[[str], None] = print,
    progress: bool = True,
    command: Sequence[str] = (),
    batch_size: int = 1,
    limit: int | None = None,
) -> Run | None:
    """Predict what is not on disk yet, score, and write the results.

    Predictions are appended to `<out>.predictions.jsonl` one by one, by further processes to
    `<out>.predictions.<rank>.jsonl`; the first process unites them at the end. The same call goes on from there, with
    any number of processes. Predictions of another model, protocol or setting are discarded, as are those of examples
    that have changed; predictions that failed are tried again.

    Args:
        benchmark: what to run.
        out: results file; it appears when complete.
        model: of `describe_model` or `describe_modules`.
        fresh: discard all stored predictions.
        report: takes lines of text.
        progress: show a bar.
        command: what the user typed, to be kept with the results.
        batch_size: examples given to `predict_batch` at once.
        limit: run the first so many examples only.

    Returns:
        What was found; None in all processes but the first, which alone scores and writes.

    Raises:
        InputError: no example can be evaluated, or the files cannot be written.
    """
    weights = {name: value for name, value in model.items() if name not in ("name", "device")}
    about = {"protocol": benchmark.protocol, "model": weights, "settings": benchmark.settings()}
    path, key = predictions_path(out), {**about, "version": tap_llm.__version__}
    shares = _predict(benchmark, StoredPredictions(path, key, fresh), report, progress, batch_size, limit)
    if not join().is_main_process:
        return None
    stored = StoredPredictions(path, key)
    done = merge(shares, stored, benchmark)
    stored.unite([outcome.key for outcome in done.outcomes])
    answered = [prediction for prediction in done.predictions if "fault" not in prediction]
    if not answered:
        raise InputError("; ".join(done.faults[:3]) or "there is nothing to evaluate: no examples")
    scores = benchmark.score(done.predictions)
    results = {
        "protocol": benchmark.protocol,
        "command": list(command),
        "metrics": scores.metrics,
        "not_measured": scores.not_measured,
        benchmark.unit: sum(map(benchmark.count, answered)),
        "examples": len(done.predictions),
        "examples_unusable": done.unusable,
        "faults": [*done.faults, *scores.faults],
        "model": model,
        "data": {"sha256": hash_texts(*(outcome.fingerprint for outcome in done.outcomes if outcome.fingerprint))},
        "settings": about["settings"],
        "limit": limit,
        "processes": len(shares),
        "speed": speed(shares, benchmark.unit),
        "versions": versions(),
    }
    _write(cases_path(out), as_json(extremes(scores.cases)) + "\n")
    _write(out, json.dumps(results, indent=1) + "\n")
    return Run(results, done.predictions)


def predictions_path(out: Path) -> Path:
    """Where the predictions of a results file are kept."""
    return out.with_name(f"{out.stem}.predictions.jsonl")


def cases_path(out: Path) -> Path:
    """Where the worst and the best cases of a results file are kept."""
    return out.with_name(f"{out.stem}.cases.json")


def _predict(
    benchmark: Benchmark,
    stored: StoredPredictions,
    report: Callable[[str], None],
    progress: bool,
    batch_size: int,
    limit: int | None,
) -> list[Share]:
    """Predict what is not stored, as one of the processes; returns what each did."""
    state = join()
    state.wait_for_everyone()  # all have looked before anything changes
    rank, processes, main = state.process_index, state.num_processes, state.is_main_process
    if main:
        stored.discard_others(processes)
        report(stored.note)
    own = part_path(stored.path, rank)
    with PredictionFile(own, stored.key, stored.kept.get(own, 0)) as file:
        share = Worker(benchmark, stored, file).run(rank, processes, batch_size, limit, progress and main)
    return gather(share)


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


__all__ = [
    "Benchmark", "Case", "Example", "Examples", "Prediction", "Run", "Scores", "cases_path", "describe_model",
    "describe_modules", "fingerprint", "predictions_path", "run",
]  # fmt: skip
