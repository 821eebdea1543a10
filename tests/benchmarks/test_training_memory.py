"""The script that measures a training step measures what it says."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training_memory.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("training_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(script: Any, **changes: Any) -> dict[str, float]:
    AcceleratorState._reset_state(True)
    case = {"recipe": "pretrain", "variant": "tiny", "batch": 1, "regions": 2, "precision": "no"}
    return script.measure({**case, "checkpointing": False, "steps": 0, "threads": 1, **changes})


@pytest.mark.parametrize("recipe", ["pretrain", "caption"])
def test_a_step(script: Any, recipe: str) -> None:
    result = measured(script, recipe=recipe, steps=1, precision="bf16")
    assert result["seconds"] > 0
    assert result["peak"] > result["kept"] > 0
    assert result["gpu"] == pytest.approx(
        (16e6 * result["trainable"] + 4e6 * result["frozen"]) / 2**30 + result["kept"] + 1, rel=1e-6
    )
    assert (result["frozen"] > result["trainable"]) == (recipe == "caption")


def test_what_is_kept(script: Any) -> None:
    """Activations grow with pictures, shrink with checkpointing and bf16; without a step there is no time."""
    plain, two = measured(script), measured(script, batch=2)
    assert two["kept"] == pytest.approx(2 * plain["kept"], rel=0.1)
    assert two["forward"] == pytest.approx(2 * plain["forward"], rel=0.1)
    assert measured(script, checkpointing=True)["kept"] < 0.7 * plain["kept"]
    assert measured(script, precision="bf16")["kept"] < plain["kept"]
    assert math.isnan(plain["seconds"])
