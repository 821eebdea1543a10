"""CaR on random weights: shapes, properties, limits, and what users get wrong."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_clip import random_car, random_clip

from tap_llm import InputError
from tap_llm.clip_as_rnn import CarConfig, CarOutput, Clip, ClipAsRnn, Compat, TextEmbeddings
from tap_llm.clip_as_rnn.sweep import sweep


@pytest.fixture(scope="module")
def car() -> ClipAsRnn:
    return random_car()


def picture(height: int = 37, width: int = 53) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def names(count: int) -> list[str]:
    return [f"thing {index}" for index in range(count)]


def assert_consistent(found: CarOutput, count: int, size: tuple[int, int]) -> None:
    """What holds of every result."""
    assert found.scores.shape == (count,) and found.scores.dtype == np.float32
    assert found.masks.shape == found.soft_masks.shape == (count, *size)
    assert found.masks.dtype == bool and found.soft_masks.dtype == np.float32
    assert found.label_map.shape == size and found.size == size
    for values in (found.scores, found.soft_masks):
        assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
    assert found.kept == sorted(set(found.kept)) and len(found.kept_masks) == len(found.kept)
    dropped = [index for index in range(count) if index not in found.kept]
    assert not found.masks[dropped].any() and not found.soft_masks[dropped].any() and not found.scores[dropped].any()
    assert set(np.unique(found.label_map)) <= {0, *(index + 1 for index in found.kept)}
    assert found.steps <= count + 1
    alive = tuple(range(count))
    for step in found.trace:
        assert step.queries == alive and len(step.scores) == len(alive) and set(step.kept) <= set(alive)
        alive = step.kept


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("threshold", [0.0, 0.04, 0.3])
def test_properties(car: ClipAsRnn, count: int, threshold: float) -> None:
    found = car(picture(), names(count), keep_threshold=threshold)
    assert_consistent(found, count, (37, 53))
    assert found.trace[-1].kept == tuple(found.kept)
    if threshold == 0:
        assert found.steps == 1 and len(found.kept) == count


@pytest.mark.parametrize("size", [(1, 2), (2, 97), (101, 31), (64, 64), (7, 13)])
def test_pictures_of_any_size(car: ClipAsRnn, size: tuple[int, int]) -> None:
    assert_consistent(car(picture(*size), names(3), min_contrast=0), 3, size)


def test_patches_of_fourteen() -> None:
    car = ClipAsRnn(random_clip(patch_size=14), config=CarConfig(refine="none"))
    encoded = car.encode(picture(50, 71))
    assert encoded.features.grid == (4, 6)
    assert_consistent(car(encoded, names(4)), 4, (50, 71))


def test_large_pictures_are_worked_on_smaller_and_answered_in_full(car: ClipAsRnn) -> None:
    found = car(picture(90, 200), names(3), max_side=60, f_max_side=40)
    assert_consistent(found, 3, (90, 200))
    assert car.encode(picture(90, 200), max_side=60, f_max_side=40).pixels.shape == (27, 60, 3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_kind(car: ClipAsRnn, mode: str) -> None:
    assert_consistent(car(Image.fromarray(picture()).convert(mode), names(2)), 2, (37, 53))


@pytest.mark.parametrize("prompts", [("blur",), ("circle", "blur"), ("rectangle", "contour"), ("black",), ()])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_every_prompt(car: ClipAsRnn, prompts: tuple[str, ...], resize: str) -> None:
    assert_consistent(car(picture(), names(3), prompts=prompts, g_resize=resize), 3, (37, 53))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "referring", "templates": ()},
        {"g_background": True},
        {"cam": "grad_cam"},
        {"background": ()},
        {"f_templates": ("{}", "a {}.")},
        {"stuff": ("thing 1", "thing 3")},
        {"compat": Compat(**dict.fromkeys(Compat.__dataclass_fields__, True))},
    ],
)
def test_every_setting(car: ClipAsRnn, options: dict[str, Any]) -> None:
    found = car(picture(), names(5), **options)
    assert np.isfinite(found.scores).all() and found.masks.shape == (5, 37, 53)


def test_same_answer_twice_and_with_any_batch(car: ClipAsRnn) -> None:
    first = car(picture(), names(6), keep_threshold=0.1)
    for batch in (16, 2):
        again = car(picture(), names(6), keep_threshold=0.1, g_batch=batch)
        assert again.kept == first.kept
        assert np.allclose(again.scores, first.scores, atol=1e-5) and np.array_equal(again.masks, first.masks)


def test_works_whatever_the_caller_does_with_gradients(car: ClipAsRnn) -> None:
    expected = car(picture(), names(3))
    with torch.no_grad():
        assert np.array_equal(car(picture(), names(3)).masks, expected.masks)
    with torch.inference_mode():
        assert np.array_equal(car(picture(), names(3)).masks, expected.masks)
        given = TextEmbeddings(torch.randn(3, 16), torch.randn(2, 16))
        assert np.isfinite(car(picture(), names(3), text_embeddings=given).scores).all()


def test_nothing_is_left_in_the_models(car: ClipAsRnn) -> None:
    car(picture(), names(3))
    for model in (car.f, car.g):
        assert not any(module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_other_dtypes_of_g() -> None:
    clip = random_clip(1)
    clip.model.bfloat16()
    car = ClipAsRnn(random_clip(0), clip, CarConfig(refine="none"))
    assert_consistent(car(picture(), names(3)), 3, (37, 53))
    shared = ClipAsRnn(clip, config=CarConfig(refine="none"))
    assert shared.f.dtype == torch.float32 and shared.g.dtype == torch.bfloat16
    assert_consistent(shared(picture(), names(3)), 3, (37, 53))


def test_g_sees_a_view_once(car: ClipAsRnn) -> None:
    """Equal masks, other thresholds and the second step of a referring call cost nothing again."""
    seen: list[int] = []
    handle = car.g.vision_model.pre_layrnorm.register_forward_hook(lambda m, i, output: seen.append(len(output)))
    encoded = car.encode(picture())
    car(encoded, ["cat", "dog", "cat", "dog"], keep_threshold=0.1)
    first = sum(seen)
    assert first <= 2 + 2  # two different texts in each of at most two steps
    car(encoded, ["cat", "dog", "cat", "dog"], keep_threshold=0.1)
    assert sum(seen) == first
    seen.clear()
    car(car.encode(picture()), names(5), mode="referring", keep_threshold=0.25)
    assert sum(seen) == 5
    handle.remove()


def test_texts_are_embedded_once() -> None:
    car = random_car(3)
    counts: list[int] = []
    for model in (car.f, car.g):
        model.text_model.register_forward_hook(lambda m, i, output: counts.append(len(output.pooler_output)))
    car(picture(), names(3))
    assert sum(counts) == (3 + 23) + 15 * 3  # queries and background of f, templates of g
    counts.clear()
    car(picture(11, 13), names(4))
    assert sum(counts) == 1 + 15


def test_a_thousand_queries(car: ClipAsRnn) -> None:
    found = car(picture(), names(1000), templates=("a {}",), max_steps=2)
    assert len(found.scores) == 1000 and found.kept and np.isfinite(found.scores).all()
    assert len(found.kept_soft_masks) == len(found.kept)


def test_a_query_of_five_hundred_words_is_cut_with_one_warning() -> None:
    car = random_car(5)
    long = "kite " * 500
    with pytest.warns(UserWarning, match=r"'kite kite .*longer than the 77 tokens") as caught:
        found = car(picture(), ["dog", long])
    assert len(caught) == 1
    assert_consistent(found, 2, (37, 53))
    assert any("longer than the 77 tokens" in note for note in found.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert car(picture(), ["dog", long]).notes == found.notes


def test_equal_queries_keep_their_indices(car: ClipAsRnn) -> None:
    found = car(picture(), ["cat", "dog", "cat"], keep_threshold=0)
    assert found.kept == [0, 1, 2]
    assert found.scores[0] == pytest.approx(found.scores[2], abs=1e-5)
    assert np.array_equal(found.soft_masks[0], found.soft_masks[2])


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (12, 200, 77)])
def test_a_picture_of_one_colour_has_nothing_to_find(car: ClipAsRnn, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (40, 30), colour)
    image.putpixel((3, 3), tuple(min(255, value + 2) for value in colour))  # noise of a photo
    for options in ({}, {"mode": "referring"}):
        found = car(image, names(3), **options)
        assert_consistent(found, 3, (30, 40))
        assert found.kept == [] and found.regions() == [] and found.found == []
        assert "one colour" in found.notes[0] and found.notes[-1] == "nothing was found"


def test_nothing_passes(car: ClipAsRnn) -> None:
    found = car(picture(), names(5), keep_threshold=0.9, keep_at_least_one=False)
    assert_consistent(found, 5, (37, 53))
    assert found.kept == [] and found.regions() == []
    assert len(car(picture(), names(5), keep_threshold=2).kept) == 1


def test_notes(car: ClipAsRnn) -> None:
    found = car(picture(), ["Sky ", "the left dog"])
    assert any("left out of the background, as they are asked for: sky" in note for note in found.notes)
    assert any("left and right" in note for note in found.notes)
    kept = car(picture(), ["sky", "dog"], compat=Compat(background_keeps_queries=True))
    assert not any("left out" in note for note in kept.notes)


def test_sweep(car: ClipAsRnn) -> None:
    grid = {"mask_threshold": [0.3, 0.6], "keep_threshold": [0.1, 0.3]}
    results = list(sweep(car, picture(), names(3), grid))
    assert [chosen for chosen, _ in results] == [
        {"mask_threshold": eta, "keep_threshold": theta} for eta in (0.3, 0.6) for theta in (0.1, 0.3)
    ]
    for chosen, found in results:
        assert found.trace == car(picture(), names(3), **chosen).trace


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "there is no query"),
        ("a dog", "must be a list of texts"),
        (["a dog", "  "], "query 1 must be a text that is not blank"),
        (["a dog", None], "query 1 must be a text"),
        (7, "must be a list of texts"),
    ],
)
def test_bad_queries_are_named(car: ClipAsRnn, queries: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        car(picture(), queries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 0.3}, "unknown name 'theta'"),
        ({"g": "openai/clip-vit-base-patch16"}, "g cannot be changed here"),
        ({"refine": "tap"}, "use CarPipeline"),
        ({"mode": "panoptic"}, "mode must be one of"),
    ],
)
def test_bad_options_are_named(car: ClipAsRnn, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        car(picture(), names(2), **options)


def test_bad_pictures_are_named(car: ClipAsRnn) -> None:
    with pytest.raises(InputError, match="no file"):
        car("nowhere.png", names(2))
    encoded = car.encode(picture())
    with pytest.raises(InputError, match="another ClipAsRnn"):
        random_car()(encoded, names(2))
    with pytest.raises(InputError, match="max_side cannot be changed here"):
        car(encoded, names(2), max_side=50)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TextEmbeddings(torch.ones(2, 16)), r"queries must be of shape \(3, 16\)"),
        (TextEmbeddings(torch.ones(3, 16), torch.ones(2, 5)), r"background must be of shape \(2, 16\)"),
        (TextEmbeddings(torch.ones(3, 16), g_queries=torch.ones(15, 2, 16)), r"g_queries must be of shape"),
        (TextEmbeddings(torch.full((3, 16), torch.nan)), "queries contains NaN"),
    ],
)
def test_bad_embeddings_are_named(car: ClipAsRnn, given: TextEmbeddings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        car(picture(), names(3), text_embeddings=given)


def test_background_of_g_needs_embeddings(car: ClipAsRnn) -> None:
    with pytest.raises(InputError, match="g_background"):
        car(picture(), names(3), text_embeddings=TextEmbeddings(torch.ones(3, 16)), g_background=True)


def test_damaged_weights_are_named() -> None:
    clip = random_clip()
    with torch.no_grad():
        clip.model.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN"):
        ClipAsRnn(clip)(picture(), names(2))


def test_other_models_and_missing_tokenizers_are_named() -> None:
    with pytest.raises(InputError, match="not with a Linear"):
        Clip(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="tokenizer"):
        ClipAsRnn(Clip(random_clip().model))(picture(), names(2))
