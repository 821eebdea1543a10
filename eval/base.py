"""What all benchmarks share: predictions that survive an interruption, progress, and a results file.

class Mine(Benchmark):
    protocol = "mine-v1"
    def examples(self): ...             # a sequence; nothing is read before it is asked for
    def predict(self, example): ...     # -> what JSON can hold
    def score(self, predictions): ...   # -> Scores

results = run(Mine(...), Path("results.json"), describe_model(pipe, "tap-tiny"))
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import tap_llm
from tap_llm.errors import InputError

from .cache import PredictionCache, as_json

Prediction = dict[str, Any]

_MODULES = {"pillow": "PIL"}
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "scipy", "pycocoevalcap")


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
    """

    metrics: dict[str, Any]
    not_measured: dict[str, str] = field(default_factory=dict)


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

    @abstractmethod
    def score(self, predictions: list[Prediction]) -> Scores:
        """Metrics of all predictions, in the order of the examples; reads no pictures."""

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
        predictions: one per readable example, in order; each has its example's "id".
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
) -> Run:
    """Predict what is not on disk yet, score, and write the results.

    Predictions are appended to `<out>.predictions.jsonl` one by one. The same call goes on from there; predictions of
    another model, protocol or setting are discarded, as are those of examples that have changed.

    Args:
        benchmark: what to run.
        out: results file; it appears when complete.
        model: of `describe_model`.
        fresh: discard all stored predictions.
        report: takes lines of text.
        progress: show a bar.
        command: what the user typed, to be kept with the results.

    Raises:
        InputError: no example can be read, or the files cannot be written.
    """
    settings = benchmark.settings()
    weights = {name: value for name, value in model.items() if name not in ("name", "device")}
    key = {"protocol": benchmark.protocol, "model": weights, "settings": settings, "version": tap_llm.__version__}
    cache = PredictionCache(predictions_path(out), key, fresh)
    report(cache.note)
    with cache:
        done = _predict_all(benchmark, cache, progress)
    if not done.predictions:
        raise InputError("; ".join(done.faults[:3]) or "there is nothing to evaluate: no examples")
    scores = benchmark.score(done.predictions)
    results = {
        "protocol": benchmark.protocol,
        "command": list(command),
        "metrics": scores.metrics,
        "not_measured": scores.not_measured,
        "examples": len(done.predictions),
        benchmark.unit: sum(map(benchmark.count, done.predictions)),
        "faults": done.faults,
        "model": model,
        "data": {"sha256": _sha256(*done.fingerprints)},
        "settings": settings,
        "speed": done.speed(benchmark.unit),
        "versions": versions(),
    }
    _write(out, json.dumps(results, indent=1) + "\n")
    return Run(results, done.predictions)


def predictions_path(out: Path) -> Path:
    """Where the predictions of a results file are kept."""
    return out.with_name(f"{out.stem}.predictions.jsonl")


@dataclass
class _Done:
    predictions: list[Prediction] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    examples: int = 0  # predicted in this run
    units: int = 0
    seconds: float = 0.0

    def speed(self, unit: str) -> dict[str, float | None]:
        """Per second, over what was predicted in this run and not read from disk."""
        rates = {"examples": self.examples, unit: self.units}
        return {f"{key}_per_second": round(n / self.seconds, 2) if n else None for key, n in rates.items()}


def _predict_all(benchmark: Benchmark, cache: PredictionCache, progress: bool) -> _Done:
    examples, done = benchmark.examples(), _Done()
    bar = tqdm(range(len(examples)), unit="example", disable=not progress, smoothing=0.1)
    for index in bar:
        started = time.perf_counter()
        try:
            example = examples[index]
        except InputError as error:
            done.faults.append(str(error))
            continue
        prediction = cache.get(example.id, example.fingerprint)
        if prediction is None:
            prediction = cache.add(example.id, example.fingerprint, benchmark.predict(example))
            done.examples += 1
            done.units += benchmark.count(prediction)
            done.seconds += time.perf_counter() - started
            bar.set_postfix_str(f"{done.units / done.seconds:.1f} {benchmark.unit}/s", refresh=False)
        done.predictions.append({**prediction, "id": example.id})
        done.fingerprints.append(example.fingerprint)
    return done


# Where results come from


def describe_model(pipe: Any, name: str) -> dict[str, Any]:
    """What identifies a model in a results file.

    Args:
        pipe: a [`RegionPipeline`].
        name: as the user gave it.

    Returns:
        Name, number of parameters, dtype, device, and hashes of weights and concept space.
    """
    concepts = pipe.concepts
    named = None if concepts is None else hash_tensors({"weights": concepts.weights}, *concepts.names)
    return {
        "name": str(name),
        "parameters": sum(parameter.numel() for parameter in pipe.model.parameters()),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "sha256": hash_tensors(pipe.model.state_dict()),
        "concepts": 0 if concepts is None else len(concepts),
        "concepts_sha256": named,
    }


def hash_tensors(tensors: dict[str, Tensor], *texts: str) -> str:
    """SHA-256 of tensors by name, and of texts; independent of files, order and device."""
    digest = hashlib.sha256(_sha256(*texts).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """SHA-256 of arrays and JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            packed = np.packbits(part) if part.dtype == bool else np.ascontiguousarray(part)
            digest.update(f"{part.dtype} {part.shape}".encode() + packed.tobytes())
        else:
            digest.update(as_json(part).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of this package, of Python, and of those installed packages that can change a number."""
    installed = [package for package in _PACKAGES if importlib.util.find_spec(_MODULES.get(package, package))]
    packages = {package: metadata.version(package) for package in installed}
    return {"tap_llm": tap_llm.__version__, "python": platform.python_version(), **packages}


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
