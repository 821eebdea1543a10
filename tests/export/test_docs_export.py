"""The example of docs/export.md runs without torch, and says what the pipeline says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported import exported

from tap_llm.pipelines import RegionPipeline

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
EXAMPLE, SAID = re.findall(r"```python\n(.*?)```.*?```\n(.*?)```", PAGE, re.S)[0]
REGIONS = [{"box": [62, 347, 202, 480]}, {"points": [[436, 187]]}]


def test_the_example_is_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tap-onnx").symlink_to(exported().folder)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(EXAMPLE, "docs/export.md", "exec"), scope)
    expected = RegionPipeline.from_pretrained("tap-tiny", device="cpu")("examples/scene.jpg", regions=REGIONS)
    assert scope["captions"] == [result["caption"] for result in expected]
    assert scope["names"].tolist() == [result["concept"] for result in expected]
    np.testing.assert_allclose(
        scope["scores"][scope["rows"], scope["slots"]], [result["iou"] for result in expected], atol=1e-4
    )
    differing = [int((mask != result["mask"]).sum()) for mask, result in zip(scope["masks"], expected, strict=True)]
    assert max(differing) <= 2  # pixels of 307,200 on the very edge
    assert min(mask.sum() for mask in scope["masks"]) > 10_000


def test_the_example_needs_no_torch(tmp_path: Path) -> None:
    """In a process that cannot import what the page says is not needed; it prints what the page says."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "tap-onnx").symlink_to(exported().folder)
    banned = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'tap_llm', 'tokenizers']))\n"
    done = subprocess.run(
        [sys.executable, "-c", banned + EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == SAID


def test_the_example_is_short() -> None:
    lines = [line for line in EXAMPLE.splitlines() if line.strip() and not line.startswith("#")]
    assert 40 <= len(lines) <= 60
