"""CIDEr-D and METEOR by the original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import reference_metrics
from eval.reference_metrics import ReferenceMetrics, missing_reason

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "caption_golden"


def test_missing_java_is_named(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(reference_metrics.shutil, "which", lambda name: None)
    assert missing_reason() == "there is no Java on this machine"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap", None)
    assert "tap-llm[eval-java]" in missing_reason()


@pytest.mark.slow
def test_known_scores():
    """The scores that came with the captions of a published demo, and empty captions beside them."""
    if missing_reason():
        pytest.skip(missing_reason())
    if not GOLDEN.is_dir():
        pytest.skip("the captions with known scores are not here")
    references: dict[str, list[str]] = {}
    for record in json.loads((GOLDEN / "model_references.json").read_text())["annotations"]:
        references.setdefault(str(record["image_id"]), []).append(record["caption"])
    results = json.loads((GOLDEN / "model_results.json").read_text())
    captions = {str(record["image_id"]): record["caption"] for record in results}
    metrics = ReferenceMetrics({"empty": "", **captions, "last": " "}, references | {"empty": ["a"], "last": ["a"]})
    scores = metrics.score(list(captions))
    assert scores == {"cider_d": pytest.approx(0.6379, abs=1e-4), "meteor": pytest.approx(0.2093, abs=1e-4)}
    assert metrics.score(["empty", "last"])["meteor"] == 0
