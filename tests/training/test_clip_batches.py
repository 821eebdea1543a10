"""What the small CLIP is shown and told: tokens, phrases, views of single objects, and batches of both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tap_llm.clip_as_rnn.vocabulary import BACKGROUND, ORIGAMI, TEMPLATES
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.shapes import SHAPE_NAMES
from tap_llm.data.sprites import Sprite, SpriteLibrary
from tap_llm.data.wording import Thing
from tap_llm.errors import InputError
from training.clip_batches import ClipBatches, ClipDataConfig, ClipPictures, painted, positives, window
from training.clip_phrases import Phrase, draw_background_words, draw_caption, draw_phrase
from training.clip_tokenizer import train_clip_tokenizer
from training.clip_views import coarse, random_blob, view_of

CONFIG = ClipDataConfig(scene_side=[64, 96], mosaic_grid=[2, 3], distractors=6, background_words=5)
KITE = Thing("kite", "a kite", ("red", "white"), "emoji", texture="striped")


@pytest.fixture(scope="module")
def pictures() -> ClipPictures:
    return ClipPictures(CONFIG, side=64, patch=16, seed=3)


@pytest.fixture(scope="module")
def tokenizer(pictures: ClipPictures) -> PreTrainedTokenizerFast:
    return train_clip_tokenizer(pictures.texts(1), 500)


@pytest.fixture(scope="module")
def batches(pictures: ClipPictures, tokenizer: PreTrainedTokenizerFast) -> ClipBatches:
    return ClipBatches(pictures, tokenizer, batch_size=4)


# Tokenizer


def test_tokenizer_follows_the_conventions_of_clip(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 3)
        ids = found(["a Red square", "square", "☕ unseen"], padding=True)["input_ids"]
        assert all(row[0] == 1 and row.count(3) == 1 for row in ids)
        assert ids[1][1:2] == ids[0][3:4]  # a word is the same wherever it stands
        assert found.decode(ids[2], skip_special_tokens=True).strip() == "☕ unseen"
        assert len(found("square " * 500, truncation=True)["input_ids"]) == 77 == found.model_max_length
    with pytest.raises(InputError, match="vocabulary must be at least 260"):
        train_clip_tokenizer(["a"], 100)


# Phrases


def test_phrases_are_true_and_asked_in_many_ways() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_phrase(rng, KITE) for _ in range(400)]
    assert all("kite" in phrase.text and phrase.fits(KITE) for phrase in drawn)
    texts = {phrase.text for phrase in drawn}
    assert {"kite", "a kite", "the kite", "a red kite", ORIGAMI.format("kite"), ORIGAMI.format("a kite")} <= texts
    assert any("striped red kite" in text for text in texts)
    bodies = [template.split("{}") for template in TEMPLATES]
    assert all(any(start in text and text.endswith(end) for text in texts) for start, end in bodies)


def test_what_a_phrase_fits() -> None:
    blue = Thing("kite", "a kite", ("blue",), "emoji")
    texts = [Phrase("kite", "kite"), Phrase("a red kite", "kite", "red"), Phrase("x", "kite", "", "striped")]
    table = positives([KITE, blue, Thing("dog", "a dog", (), "emoji"), None], texts, words=2)
    assert table.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 1]]


def test_background_words_are_no_names() -> None:
    rng = np.random.default_rng(1)
    words = draw_background_words(rng, 30, {"house", "cloud"})
    assert len(words) == len(set(words)) == 30
    assert not any(name in " ".join(words) for name in ("house", "cloud"))
    assert sum(any(word in text for word in BACKGROUND) for text in words) >= 15


def test_captions_name_what_is_there() -> None:
    rng = np.random.default_rng(2)
    dog = Thing("dog", "a dog", ("brown",), "emoji")
    said = {draw_caption(rng, [KITE, dog]) for _ in range(30)}
    assert "a photo of a red kite and a brown dog" in said and all("kite" in text and "dog" in text for text in said)
    assert draw_caption(rng, [dog]).endswith("a brown dog")


# Views


@pytest.mark.parametrize("seed", range(12))
def test_views_leave_the_object_and_change_the_rest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    mask = np.zeros((64, 48), dtype=bool)
    mask[16:32, 16:32] = True
    view = view_of(rng, image, mask, patch=16)
    red = (view == (255, 0, 0)).all(-1)
    same = (view == image).all(-1)
    assert view.shape == image.shape and same[18:30, 18:30].mean() > 0.5
    assert (same | red).mean() < 1 or (red & ~same).any()
    assert red.any() or not same[48:].any()  # far away all is changed, unless only a circle is drawn


def test_coarse_masks_stay_near_the_object() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((96, 96), dtype=bool)
    mask[32:64, 32:64] = True
    areas = [coarse(rng, mask, 16).sum() / mask.sum() for _ in range(20)]
    assert min(areas) > 0.5 and max(areas) < 3 and np.std(areas) > 0.05
    partial = [coarse(rng, mask, 8, partial=True) for _ in range(20)]
    assert all(part.any() and (part & mask).sum() > 0.5 * part.sum() for part in partial)
    assert np.mean([part.sum() for part in partial]) < 0.8 * np.mean(areas) * mask.sum()
    tiny = np.zeros((96, 96), dtype=bool)
    tiny[50, 50] = True
    assert coarse(rng, tiny, 16).any() and coarse(rng, tiny, 16, partial=True).any()


def test_blobs_keep_to_what_is_free() -> None:
    rng = np.random.default_rng(0)
    free = np.zeros((40, 40), dtype=bool)
    free[:, 20:] = True
    for _ in range(10):
        blob = random_blob(rng, free)
        assert blob.any() and not (blob & ~free).any()
    assert not random_blob(rng, np.zeros((8, 8), dtype=bool)).any()


# Pictures and batches


@pytest.mark.parametrize("size", [(96, 96), (110, 80), (70, 50)])
def test_windows_show_picture_and_ids_alike(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    scene = SceneComposer().scene(4, size)
    ids = painted(scene)
    assert all(np.array_equal(ids == index, mask) for index, mask in enumerate(scene.masks))
    flat = np.repeat(((ids + 1) * 20).astype(np.uint8)[..., None], 3, axis=2)
    for _ in range(8):
        image, cut = window(rng, flat, ids, 64)
        assert image.shape == (64, 64, 3) and cut.shape == (64, 64)
        assert (np.abs(image[..., 0].astype(int) - (cut + 1) * 20) < 10).mean() > 0.85


def test_batches_are_functions_of_their_number(batches: ClipBatches, tokenizer: PreTrainedTokenizerFast) -> None:
    again = ClipBatches(ClipPictures(CONFIG, 64, 16, seed=3), tokenizer, 4)[5]
    assert all(torch.equal(again[key], value) for key, value in batches[5].items())
    assert not torch.equal(batches[6]["images"], again["images"])
    other = ClipBatches(batches.pictures.for_validation(), tokenizer, 4)[5]
    assert not torch.equal(other["images"], again["images"])


def test_batches_hold_together(batches: ClipBatches) -> None:
    for number in range(6):
        batch = batches[number]
        regions, texts = len(batch["cover"]), len(batch["is_background"])
        assert batch["images"].shape == (8, 64, 64, 3) and batch["cover"].shape == (regions, 16)
        assert batch["positives"].shape == (regions + 4, texts) and len(batch["input_ids"]) == texts + 4
        assert batch["positives"].any(1).all()  # everything has a true text
        assert int(batch["is_background"].sum()) == 5 and not batch["positives"][:regions, -5:].any()
        assert (batch["cover"].sum(1) >= 0.75).all() and float(batch["cover"].max()) <= 1
        for image, row in enumerate(batch["picked"].tolist()):
            assert row == -1 or batch["region_image_index"][row] == image
        said = batches.tokenizer.batch_decode(batch["input_ids"][:texts], skip_special_tokens=True)
        assert len(set(said)) == texts


def test_shares_of_views(tokenizer: PreTrainedTokenizerFast) -> None:
    alone = ClipPictures(ClipDataConfig(scene_side=[64, 64], alone_share=1.0, background_share=0.0), 64, 16)
    assert all(alone[n].viewed is not None and not np.array_equal(alone[n].view, alone[n].image) for n in range(4))
    nothing = ClipPictures(ClipDataConfig(scene_side=[64, 64], alone_share=0.0, background_share=1.0), 64, 16)
    assert all(nothing[n].viewed is None for n in range(4))


def test_held_out_names_are_never_said() -> None:
    pixels = np.full((40, 40, 4), 255, dtype=np.uint8)
    sprites = [Sprite(f"gizmo{n}", f"a gizmo{n}", "object", "object", "object", (), pixels) for n in range(10)]
    known, novel = SpriteLibrary(sprites).split_names(0.3)
    pictures = ClipPictures(CONFIG, 64, 16, composers=(SceneComposer(known), SceneComposer()))
    said = " ".join(pictures.texts(2))
    assert all(name in said for name in known.names) and not any(name in said for name in novel.names)


def test_bundled_pictograms_have_a_share() -> None:
    """What may be said then names them too."""
    bundled = set(SpriteLibrary.bundled().names) - set(SHAPE_NAMES)
    config = replace(CONFIG, bundled_share=1.0)
    pictures = ClipPictures(config, 64, 16)
    assert bundled <= pictures.names and not bundled & ClipPictures(CONFIG, 64, 16).names
    things = [thing for number in range(8) for thing in pictures[number].things]
    assert 0.5 < np.mean([thing.name in bundled for thing in things]) < 1  # the others are drawn shapes
    assert len(pictures.vocabulary) == len(set(pictures.vocabulary))


def test_scenes_have_sides_of_all_ratios() -> None:
    pictures = ClipPictures(replace(CONFIG, aspect=2.0), 64, 16)
    rng = np.random.default_rng(0)
    sizes = [pictures._scene_size(rng) for _ in range(50)]
    ratios = [width / height for width, height in sizes]
    assert min(ratios) < 0.6 and max(ratios) > 1.7 and min(ratios) > 0.49 and max(ratios) < 2.05
    assert all(64 <= max(size) <= 96 for size in sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aspect": 0.5}, "data.aspect must lie between 1 and 4"),
        ({"bundled_share": 2.0}, "data.bundled_share must lie between 0 and 1"),
        ({"bundled_share": 0.5, "hold_out": 0.1}, "data.bundled_share would show names that data.hold_out leaves out"),
        ({"mosaic_share": 1.5}, "data.mosaic_share must lie between 0 and 1"),
        ({"alone_share": 0.6, "background_share": 0.6}, "add up to at most 1"),
        ({"distractors": -1}, "data.distractors must not be negative"),
        ({"scene_side": [9]}, "data.scene_side must be two positive numbers"),
        ({"sprites": ["absent"]}, "there is no folder absent"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClipPictures(ClipDataConfig(**settings), 64, 16)
