"""The bundled model: small, documented, and right about the example picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tap_llm import RegionPipeline, TapConfig, TapForConditionalGeneration
from tap_llm.hub import ASSETS
from tap_llm.images import load_image

ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "examples" / "scene.jpg"
PHOTOS = ROOT.parent / "shared" / "data" / "demo_photos" / "images"
REGIONS = {
    "pineapple": {"box": [435, 343, 544, 480]},
    "panda": {"points": [[436, 187]]},
    "top hat": {"box": [317, 325, 437, 438]},
}


@pytest.fixture(scope="module")
def pipe() -> RegionPipeline:
    return RegionPipeline.from_pretrained(device="cpu")


def test_it_is_small_and_has_a_card() -> None:
    folder = ASSETS / "tap-tiny"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    assert "Measured quality" in (folder / "README.md").read_text(encoding="utf-8")


def test_it_has_the_size_that_from_variant_names(pipe: RegionPipeline) -> None:
    with torch.device("meta"):
        same = TapForConditionalGeneration(TapConfig.from_variant("tiny"))
    assert {k: v.shape for k, v in same.state_dict().items()} == {
        k: v.shape for k, v in pipe.model.state_dict().items()
    }


def test_it_names_the_objects_of_the_example_picture(pipe: RegionPipeline) -> None:
    results = pipe(SCENE, regions=list(REGIONS.values()))
    assert [result["concept"] for result in results] == list(REGIONS)
    assert "pineapple" in results[0]["caption"]
    assert "top hat" in results[2]["caption"]


def test_clicking_never_encodes_the_picture_again(pipe: RegionPipeline) -> None:
    calls: list[int] = []
    handle = pipe.model.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    encoded = pipe.encode(SCENE)
    for x in range(20):
        pipe(encoded, regions=[{"points": [[100 + x, 260]]}], captions=False)
    handle.remove()
    assert len(calls) == 1


def test_half_precision_gives_nearly_the_same_masks(pipe: RegionPipeline) -> None:
    half = RegionPipeline.from_pretrained(device="cpu", dtype="bfloat16")
    ious = []
    for path in [SCENE, *(sorted(PHOTOS.glob("*.jpg")) if PHOTOS.is_dir() else [])]:
        width, height = load_image(path).size
        boxes = [[0.2, 0.2, 0.8, 0.8], [0.1, 0.3, 0.5, 0.9]]
        regions = [{"box": list(np.array(box) * [width, height, width, height])} for box in boxes]
        for a, b in zip(*(p(path, regions=regions, captions=False) for p in (pipe, half)), strict=True):
            ious.append((a["mask"] & b["mask"]).sum() / max(1, (a["mask"] | b["mask"]).sum()))
    assert np.mean(ious) >= 0.97
