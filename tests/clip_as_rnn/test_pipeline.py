"""CaR with TAP: who is asked what, and when."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_clip import PLAIN, SETTINGS, colour_picture, colour_texts, hand_made_clip

from tap_llm import RegionPipeline
from tap_llm.clip_as_rnn import CarPipeline, Clip, tap_refine
from tap_llm.clip_as_rnn.outputs import CarOutput

QUERIES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def tap() -> RegionPipeline:
    return RegionPipeline.from_pretrained("tap-tiny", device="cpu")


@pytest.fixture
def pipe(tap: RegionPipeline) -> CarPipeline:
    return CarPipeline(Clip(hand_made_clip(), settings=PLAIN), config=SETTINGS.updated(refine="tap"), tap=tap)


def find(pipe: CarPipeline, image: Any, **options: Any) -> CarOutput:
    return pipe(image, QUERIES, text_embeddings=colour_texts(QUERIES), **options)


def test_tap_is_asked_once_about_the_kept_masks(pipe: CarPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def refine_masks(
        tap: Any, image: Any, masks: Any, soft: Any, scores: Any, *, exclusive: bool, **options: Any
    ) -> Any:
        calls.append((tap, image, masks.copy(), soft, scores, exclusive))
        return ~masks

    monkeypatch.setattr(tap_refine, "refine_masks", refine_masks)
    coarse = find(pipe, colour_picture(), refine="crf")
    assert not calls
    found = find(pipe, colour_picture())
    ((tap, image, masks, soft, scores, exclusive),) = calls
    assert tap is pipe.tap and image.original_size == (32, 32)
    assert np.array_equal(masks, coarse.kept_masks) and np.array_equal(found.kept_masks, ~masks)
    assert soft.shape == (2, 32, 32) and scores == pytest.approx(found.scores[:2]) and exclusive
    referring = pipe(colour_picture(), ["red", "red"], mode="referring", text_embeddings=colour_texts(["red", "red"]))
    assert not calls[-1][-1] and referring.merged_mask is not None and referring.merged_mask.any()


def test_tap_sees_a_picture_once(pipe: CarPipeline) -> None:
    runs: list[int] = []
    handle = pipe.tap.model.model.vision_encoder.register_forward_hook(lambda *_: runs.append(1))
    encoded = pipe.encode(colour_picture())
    first, again = find(pipe, encoded), find(pipe, encoded, prompts=("black",))
    assert len(runs) == 1
    assert first.masks.shape == (3, 32, 32) and again.kept == [0, 1]
    # TAP's own encoding serves as well.
    assert np.array_equal(find(pipe, pipe.tap.encode(colour_picture())).masks, first.masks)
    assert len(runs) == 2
    handle.remove()


def test_tap_is_not_asked_where_nothing_was_found(pipe: CarPipeline) -> None:
    plain = np.zeros((32, 32, 3), dtype=np.uint8)
    lazy = CarPipeline(Clip(hand_made_clip(), settings=PLAIN), config=SETTINGS.updated(refine="tap"), tap="nowhere")
    assert find(lazy, plain).found == []


def test_found_regions_can_be_described(pipe: CarPipeline, tap: RegionPipeline) -> None:
    found = find(pipe, colour_picture())
    described = tap(colour_picture(), regions=found.regions())
    assert len(described) == len(found.found) == 2


def test_loading_by_name(tmp_path: Path, tap: RegionPipeline) -> None:
    Clip(hand_made_clip(), settings=PLAIN).save_pretrained(tmp_path)
    pipe = CarPipeline.from_pretrained(tmp_path, device="cpu", tap=tap, keep_threshold=0.4)
    assert pipe.config.refine == "tap" and pipe.config.keep_threshold == 0.4 and pipe.tap is tap
    assert CarPipeline.from_pretrained(tmp_path, device="cpu", refine="crf").config.refine == "crf"
    named = CarPipeline.from_pretrained(tmp_path, device="cpu")
    assert named.tap.model.config.model_type == "tap"


def test_without_refinement_neither_crf_nor_tap_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("crf", "lattice", "tap_refine"):
        monkeypatch.setitem(sys.modules, f"tap_llm.clip_as_rnn.{name}", None)  # importing it fails
    pipe = CarPipeline(Clip(hand_made_clip(), settings=PLAIN), config=SETTINGS, tap="nowhere")
    assert find(pipe, colour_picture(), refine="none").found == [0, 1]
    with pytest.raises(ImportError):
        find(pipe, colour_picture(), refine="crf")
