"""Does each part of the recipe earn its place? Short runs that differ in one setting, measured alike.

    python benchmarks/ablations.py [--arms full no_concepts no_error_region] [--seeds 0] [--out runs/ablations]

Each run trains a small TAP on drawn shapes (`configs/ablations/shapes.yaml`, under ten minutes on one core) and is
then measured by `eval.scenes` on unseen scenes. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "ablations" / "shapes.yaml"
ARMS = {
    "full": [],
    "no_concepts": ["loss.concept=0.0"],
    "no_error_region": ["prompts.error_region=false"],
    "one_stage": ["prompts.stages=1"],
    "focal": ["loss.pixel=focal"],
    "adamw": ["optimizer.name=adamw"],
}
SCENES = 100


def train(arm: str, seed: int, folder: Path) -> Path:
    """The finished model of a run."""
    final = folder / f"{arm}_{seed}" / "final"
    if not final.is_dir():
        settings = [*ARMS[arm], f"run.seed={seed}", f"run.output_dir={final.parent}"]
        resume = ["--resume"] if (final.parent / "settings.json").is_file() else []
        run("training.pretrain", "--config", str(CONFIG), *resume, *settings)
    return final


def measure(model: Path) -> dict[str, Any]:
    """Metrics of `eval.scenes` on unseen drawn scenes."""
    out = model.parent / "scenes.json"
    if not out.is_file():
        run("eval.scenes", "--model", str(model), "--compose", "--shapes", "--count", str(SCENES), "--out", str(out))
    return json.loads(out.read_text())["metrics"]


def run(module: str, *arguments: str) -> None:
    """A module of this project in a process of its own."""
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


def main() -> None:
    """Train, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["full", "no_concepts", "no_error_region"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations")
    args = parser.parse_args()
    for seed in args.seeds:
        for arm in args.arms:
            print(f"{arm} seed {seed}: {json.dumps(measure(train(arm, seed, args.out)))}", flush=True)


if __name__ == "__main__":
    main()
