"""CaR on a CLIP model made by hand: every number can be worked out on paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hand_clip import PLAIN, SETTINGS, SIDE, colour_picture, colour_texts, hand_made_car, hand_made_clip

from tap_llm.clip_as_rnn import CarOutput, Clip, ClipAsRnn, Compat
from tap_llm.clip_as_rnn.affinity import min_max, refine_cams
from tap_llm.clip_as_rnn.proposals import propose_masks, text_directions

QUERIES = ["red", "green", "blue"]
PATCHES = {"red": 6, "green": 12, "blue": 46}
SCALE = 20.0


@pytest.fixture(scope="module")
def car() -> ClipAsRnn:
    return hand_made_car()


def find(car: ClipAsRnn, queries: list[str], **options: object) -> CarOutput:
    return car(colour_picture(), queries, text_embeddings=colour_texts(queries), **options)  # type: ignore[arg-type]


def maps_of(car: ClipAsRnn, queries: list[str], background: list[str], **options: object) -> torch.Tensor:
    texts = colour_texts(queries, background).prepared(len(queries), 4, 4, "cpu")
    features = car.encode(colour_picture()).features
    return propose_masks(features, texts.f, texts.f_background, SCALE, car.config.updated(**options))


def patches_of(name: str) -> np.ndarray:
    """(8, 8) bool: the patches of a colour of the picture."""
    image = colour_picture()[::4, ::4]
    return {
        "red": (image == (255, 0, 0)).all(axis=2),
        "green": (image == (0, 255, 0)).all(axis=2),
        "blue": (image == 128).all(axis=2),
    }[name]


def test_every_map_is_exactly_zero_or_one(car: ClipAsRnn) -> None:
    maps = maps_of(car, QUERIES, ["gray"])
    for soft, name in zip(maps, QUERIES, strict=True):
        assert np.array_equal(soft.numpy() > 0.5, patches_of(name))
        assert torch.minimum(soft, 1 - soft).max() < 1e-6
        assert int(soft.round().sum()) == PATCHES[name]


def test_attention_is_block_diagonal_by_colour(car: ClipAsRnn) -> None:
    affinity = car.encode(colour_picture()).features.affinity
    colours = np.select([patches_of("red"), patches_of("green")], [0, 1], 2).ravel()
    assert affinity[torch.from_numpy(colours[:, None] != colours[None])].max() < 1e-6


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [("black", (1.000, 1.000, 0.128), (1.0, 1.0)), ("gray", (0.648, 0.895, 0.287), (0.786, 0.945))],
)
def test_scores_and_survivors(car: ClipAsRnn, prompt: str, first: tuple[float, ...], second: tuple[float, ...]) -> None:
    found = find(car, QUERIES, prompts=(prompt,))
    assert found.steps == 2
    assert found.trace[0].scores == pytest.approx(first, abs=5e-4)
    assert found.trace[1].scores == pytest.approx(second, abs=5e-4)
    assert [step.queries for step in found.trace] == [(0, 1, 2), (0, 1)]
    assert [step.kept for step in found.trace] == [(0, 1), (0, 1)]
    assert found.kept == [0, 1] and found.scores[2] == 0
    assert not found.masks[2].any() and not found.soft_masks[2].any()
    assert set(np.unique(found.label_map)) == {0, 1, 2}


def test_masks_are_where_the_colours_are(car: ClipAsRnn) -> None:
    found = find(car, QUERIES)
    for index, name in enumerate(("red", "green")):
        truth = np.kron(patches_of(name), np.ones((4, 4), dtype=bool))
        assert (found.masks[index] & truth).sum() / (found.masks[index] | truth).sum() > 0.9
        assert np.array_equal(found.label_map == index + 1, found.masks[index])


def test_without_recurrence_the_absent_query_takes_the_background(car: ClipAsRnn) -> None:
    found = find(car, QUERIES, max_steps=1)
    assert found.kept == [0, 1, 2] and found.steps == 1
    assert found.masks[2].sum() > 30 * 16


def test_a_single_query_survives_even_where_it_is_absent(car: ClipAsRnn) -> None:
    found = find(car, ["blue"])
    assert found.kept == [0] and found.trace[0].scores == (1.0,)
    assert any("single query" in note for note in found.notes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_order_of_the_queries_changes_their_order_only(car: ClipAsRnn, order: tuple[int, ...]) -> None:
    plain, permuted = find(car, QUERIES), find(car, [QUERIES[index] for index in order])
    assert np.allclose(permuted.scores, plain.scores[list(order)], atol=1e-6)
    assert np.array_equal(permuted.masks, plain.masks[list(order)])
    assert permuted.kept == sorted(order.index(index) for index in plain.kept)


def test_probability_of_a_single_text_has_no_gradient(car: ClipAsRnn) -> None:
    assert not maps_of(car, ["red"], [], compat=Compat(probability_target=True)).any()
    maps = maps_of(car, ["red"], [])
    assert np.array_equal(maps[0].numpy() > 0.5, patches_of("red"))
    assert torch.minimum(maps, 1 - maps).max() < 1e-6


def test_cam_of_a_single_text_before_refinement(car: ClipAsRnn) -> None:
    features = car.encode(colour_picture()).features
    red = colour_texts(["red"], []).prepared(1, 4, 4, "cpu")
    directions = text_directions(features.embedding, red.f, red.f_background, SCALE, car.config)
    cam = min_max(features.cams(directions).flatten(1)).reshape(8, 8).numpy()
    assert cam[patches_of("red")] == pytest.approx(1)
    assert cam[~patches_of("red")].max() <= 0.013
    assert refine_cams(features.affinity, torch.from_numpy(cam)[None], 0.4).round().sum() == 6


def test_a_plain_picture_has_no_gradient(car: ClipAsRnn) -> None:
    plain = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    plain[..., 0] = 255
    features = car.encode(plain).features
    for background in ([], ["gray"]):
        texts = colour_texts(["red"], background).prepared(1, 4, 4, "cpu")
        for compat in (Compat(), Compat(probability_target=True)):
            config = SETTINGS.updated(compat=compat)
            assert not propose_masks(features, texts.f, texts.f_background, SCALE, config).any()


def test_a_plain_picture_has_nothing_to_find(car: ClipAsRnn) -> None:
    plain = np.full((SIDE, SIDE, 3), (255, 0, 0), dtype=np.uint8)
    found = car(plain, QUERIES, text_embeddings=colour_texts(QUERIES))
    assert found.kept == [] and found.regions() == [] and not found.masks.any() and not found.label_map.any()
    assert found.masks.shape == found.soft_masks.shape == (3, SIDE, SIDE)
    # Even where that check is off: no map, so no mask.
    found = car(plain, QUERIES, text_embeddings=colour_texts(QUERIES), min_contrast=0)
    assert found.found == [] and not found.masks.any() and np.isfinite(found.scores).all()


def test_f_and_g_can_be_two_models() -> None:
    pair = ClipAsRnn(Clip(hand_made_clip(), settings=PLAIN), Clip(hand_made_clip(), settings=PLAIN), SETTINGS)
    assert find(pair, QUERIES).trace[0].scores == pytest.approx((0.648, 0.895, 0.287), abs=5e-4)


def test_swapped_gray_weights_change_the_scores(car: ClipAsRnn) -> None:
    plain, swapped = find(car, QUERIES), find(car, QUERIES, compat=Compat(gray_weights=True))
    assert swapped.trace[0].scores[0] - plain.trace[0].scores[0] == pytest.approx(0.00096, abs=1e-4)


def test_one_more_step_repeats_the_last(car: ClipAsRnn) -> None:
    plain = find(car, ["red", "green"])
    more = find(car, ["red", "green"], compat=Compat(one_more_step=True))
    assert plain.steps == 1 and more.steps == 2
    assert more.trace[0] == more.trace[1] and np.array_equal(plain.masks, more.masks)


def test_first_step_raw_takes_the_bare_queries_once(car: ClipAsRnn) -> None:
    """Where the bare texts all mean red, the first step's masks do."""
    texts = colour_texts(QUERIES)
    texts.first_step = colour_texts(["red", "red", "red"]).queries
    found = car(colour_picture(), QUERIES, text_embeddings=texts, compat=Compat(first_step_raw=True), keep_threshold=0)
    one = car(colour_picture(), QUERIES, text_embeddings=texts, keep_threshold=0)
    assert found.trace[0].scores != one.trace[0].scores
    more = Compat(first_step_raw=True, one_more_step=True)
    found = car(colour_picture(), QUERIES, text_embeddings=texts, compat=more, keep_threshold=0)
    assert found.trace[1].scores == pytest.approx(one.trace[0].scores)


def test_similarity_floor_rejects_even_the_only_query(car: ClipAsRnn) -> None:
    found = find(car, ["blue"], min_similarity=0.6)
    assert found.kept == [] and found.steps == 1 and found.notes[-1] == "nothing was found"
    assert find(car, QUERIES, min_similarity=0.0, prompts=("black",)).kept == [0, 1]


def test_masks_of_nearly_everything_can_be_dropped(car: ClipAsRnn) -> None:
    assert find(car, ["blue"]).masks.mean() > 0.6
    found = find(car, ["blue"], max_area=0.6)
    assert found.kept == [] and found.scores.tolist() == [0] and not found.label_map.any()


def test_equal_queries_are_several(car: ClipAsRnn) -> None:
    found = find(car, ["red", "green", "red"], keep_threshold=0.2)
    assert found.kept == [0, 1, 2]
    assert found.scores[0] == pytest.approx(found.scores[2])
    assert found.masks[0].any() and not found.masks[2].any()
    assert found.found == [0, 1]
    assert any("more than once (queries 0, 2)" in note for note in found.notes)


def test_referring_merges_the_expressions(car: ClipAsRnn) -> None:
    found = find(car, ["red", "red"], mode="referring", keep_threshold=0.2)
    assert found.merged_mask is not None
    assert np.array_equal(found.merged_mask, found.masks[0]) and np.array_equal(found.masks[0], found.masks[1])
    (region,) = found.regions()
    assert region["category"] == "red" and region["id"] == 0
    assert len(found.regions(merged=False)) == 2


def test_things_and_stuff_in_two_passes(car: ClipAsRnn) -> None:
    """Stuff has the things as its background, so that they no longer compete for the first pass."""
    found = find(car, QUERIES, stuff=("blue",), stuff_prompts=("black",))
    assert [step.queries for step in found.trace] == [(0, 1), (2,)]
    assert found.kept == [0, 1, 2]
    assert set(np.unique(found.label_map)) == {1, 2, 3}
    assert np.array_equal(found.label_map == 1, found.masks[0])  # things lie on top
    mutual = find(car, QUERIES, stuff=("blue",), mutual_background=True)
    assert mutual.kept == [0, 1, 2]


def test_an_encoded_picture_answers_alike_and_goes_through_f_once(car: ClipAsRnn) -> None:
    runs: list[int] = []
    handle = car.f.vision_model.pre_layrnorm.register_forward_hook(lambda *_: runs.append(1))
    encoded = car.encode(colour_picture())
    for prompts in (("black",), ("gray",), ("gray",)):
        found = car(encoded, QUERIES, text_embeddings=colour_texts(QUERIES), prompts=prompts)
        assert found.trace == find(car, QUERIES, prompts=prompts).trace
    handle.remove()
    assert len(runs) == 1 + 3  # the three calls with the bare picture encode it
