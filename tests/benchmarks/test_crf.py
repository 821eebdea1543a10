"""The benchmark of the CRF compares like with like."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "crf.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_crf", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row(script: Any) -> None:
    pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")
    *_, gap, labels = script.compare(60, 40, 3, 1).strip("| ").split(" | ")
    assert float(gap) < 0.01 and labels == "100.00%"


def test_without_the_other_one(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["crf.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "pip install pydensecrf2" in capsys.readouterr().err
