"""The two implementations that are timed find the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tap_llm.clip_as_rnn import ClipAsRnn, get_preset

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "find.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_find", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_and_cached_agree(script: Any) -> None:
    config = get_preset("default").updated(templates=("a {}", "a photo of a {}."), keep_threshold=0.25)
    car = ClipAsRnn(script.random_clip(0, 64, 2), script.random_clip(1, 64, 2), config)
    queries = ["dog", "kite", "cup"]
    plain = script.plain_find(car, script.random_image(), queries)
    cached = script.cached_find(car, script.random_image(), queries, "none")
    assert len(plain) == cached.steps
    for one, other in zip(plain, cached.trace, strict=True):
        assert one.queries == other.queries and one.kept == other.kept
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_times(script: Any) -> None:
    car = ClipAsRnn(script.random_clip(0, 64, 2), config=get_preset("default").updated(templates=("a {}",)))
    best = script.compare(car, 2, 1, "none", True)
    assert 0 < best["cached"] < float("inf") and 0 < best["plain"] < float("inf")
