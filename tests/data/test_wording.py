"""Words: articles, colours, places, and that what captions say is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tap_llm.data.colours import COLOUR_WORDS, name_colours, words_in
from tap_llm.data.wording import (
    Thing,
    captions,
    has_clear_place,
    noun_phrase,
    place,
    place_phrase,
    split_article,
    with_article,
)
from tap_llm.masks import decode_rle


def thing(name: str, x: float = 0.5, y: float = 0.5, **extra: object) -> Thing:
    return Thing(name, with_article(name), ("red", "white"), "Objects", middle=(x, y), area=0.1, **extra)  # type: ignore[arg-type]


# Phrases


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("taxi", "a taxi"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("scissors", "scissors"),
        ("hourglass", "an hourglass"),
    ],
)
def test_article(name: str, phrase: str) -> None:
    assert with_article(name) == phrase


def test_split_article() -> None:
    assert split_article("a carton of milk") == ("a", "carton of milk")
    assert split_article("satsumas") == ("", "satsumas")


def test_adjectives_change_the_article() -> None:
    assert noun_phrase(thing("owl"), ["red"]) == "a red owl"
    assert noun_phrase(thing("taxi"), ["orange"]) == "an orange taxi"
    assert noun_phrase(thing("scissors"), ["red"]) == "red scissors"
    assert noun_phrase(thing("owl"), ["red"], definite=True) == "the red owl"


# Colours


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((230, 30, 30), "red"), ((255, 140, 0), "orange"), ((255, 225, 40), "yellow"), ((40, 170, 60), "green"),
        ((30, 80, 220), "blue"), ((160, 210, 250), "light blue"), ((20, 25, 80), "navy blue"),
        ((120, 40, 160), "purple"), ((250, 150, 190), "pink"), ((110, 70, 40), "brown"), ((220, 200, 165), "beige"),
        ((130, 130, 130), "grey"), ((10, 10, 10), "black"), ((250, 250, 250), "white"),
    ],
)  # fmt: skip
def test_colour_of_plain_pixels(rgb: tuple[int, int, int], word: str) -> None:
    assert name_colours(np.full((5, 5, 3), rgb, dtype=np.uint8)) == (word,)


def test_colours_come_by_share() -> None:
    pixels = np.zeros((100, 3), dtype=np.uint8)
    pixels[:60] = (230, 30, 30)
    pixels[60:90] = (250, 250, 250)  # the last tenth, black, is too little to be named
    assert name_colours(pixels) == ("red", "white")
    assert name_colours(pixels[:0]) == ()


def test_colours_agree_with_the_pictograms_list(shared_data: Path) -> None:
    objects = json.loads((shared_data / "emoji" / "objects.json").read_text("utf-8"))["objects"][::8]
    first = within = total = 0
    for entry in objects:
        file = entry["files"]["noto"]
        pixels = np.asarray(Image.open(shared_data / "emoji" / file["file_name"]).convert("RGBA"))
        word = name_colours(pixels[..., :3][pixels[..., 3] > 200])[0]
        total, first, within = total + 1, first + (word == file["colours"][0]), within + (word in file["colours"])
    assert first > 0.88 * total and within > 0.95 * total


def test_words_in_text() -> None:
    assert words_in("a light blue and red t-shirt") == ("light blue", "red")
    assert words_in("a blueberry in a greenhouse") == ()
    assert words_in("an orange") == ("orange",)


# Places


def test_places_are_those_of_the_composed_sample(shared_data: Path) -> None:
    data = json.loads((shared_data / "composed_sample" / "sample.json").read_text("utf-8"))
    for entry in data["annotations"]:
        ys, xs = np.nonzero(decode_rle(entry["segmentation"]))
        where = place((xs.mean() / 400, ys.mean() / 300))
        assert where == entry["place"] and place_phrase(where) in entry["caption_long"]


def test_near_the_end_of_a_third_no_place_is_clear() -> None:
    assert has_clear_place((0.1, 0.5)) and has_clear_place((0.5, 0.9))
    assert not has_clear_place((0.37, 0.5)) and not has_clear_place((0.1, 0.6))


# Captions


def test_short_and_long_caption() -> None:
    scene = [thing("owl", 0.1, 0.9, hidden_by=(1,)), thing("taxi", 0.2, 0.9)]
    short, long, _ = captions(np.random.default_rng(0), scene, 0)
    assert short == "a red owl"
    assert long == "a red owl in the bottom left of the picture, partly hidden by a taxi"


def test_free_captions_are_true_and_vary() -> None:
    scene = [
        thing("owl", 0.1, 0.1, size="small"),
        thing("taxi", 0.9, 0.1, hidden_by=(2,)),
        thing("ring", 0.9, 0.2, texture="striped"),
    ]
    rng = np.random.default_rng(0)
    texts = {index: {captions(rng, scene, index)[2] for _ in range(400)} for index in range(3)}
    assert min(len(found) for found in texts.values()) > 15
    owl, taxi, ring = (" | ".join(texts[index]) for index in range(3))
    assert "small red owl" in owl and "small" not in taxi and "striped" not in owl.split(" of ")[0].split("|")[0]
    assert not re.search(r"behind|hidden|covered|in front|right of|right|bottom|below", owl)
    assert "to the left of" in owl and re.search(r"behind (a|the)", taxi) and "in front of" in ring
    assert "striped red ring" in ring and "with stripes" in ring


def test_a_colour_in_the_name_is_not_said_twice() -> None:
    bird = Thing("black bird", "a black bird", ("grey",), "Animals & Nature")
    assert captions(np.random.default_rng(0), [bird], 0)[0] == "a black bird"


def test_a_thing_alone_gets_captions() -> None:
    rng = np.random.default_rng(0)
    assert all("owl" in text for _ in range(100) for text in captions(rng, [thing("owl")], 0))


def test_colour_words_are_unique() -> None:
    assert len(set(COLOUR_WORDS)) == len(COLOUR_WORDS) == 15
