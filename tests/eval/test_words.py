"""What captions say of the truth."""

from __future__ import annotations

import pytest

from eval.words import judge_shape, said_of_shape, says_colour, says_name


@pytest.mark.parametrize(
    ("caption", "name", "says"),
    [
        ("a red Taxi.", "taxi", True),
        ("a carton of milk", "car", False),
        ("a face with tears of joy", "face with tears of joy", True),
        ("keycap: 1", "keycap: 1", True),
        ("a ring-shaped thing", "ring", True),
        ("a star", "ring", False),
    ],
)
def test_name(caption, name, says):
    assert says_name(caption, name) is says


@pytest.mark.parametrize(
    ("caption", "colours", "says"),
    [
        ("a red, round ball", ["blue", "red"], True),
        ("a light blue ball", ["blue"], False),
        ("a light blue ball", ["light blue"], True),
        ("a ball", ["red"], False),
        ("an infrared lamp", ["red"], False),
        ("(Red) ball", ["red"], True),
    ],
)
def test_colour(caption, colours, says):
    assert says_colour(caption, colours) is says


def test_only_the_subject_is_read():
    said = said_of_shape("A small striped red and white star, partly behind a large dotted blue ring")
    assert said == {"shape": ("star",), "colour": ("red", "white"), "texture": ("striped",), "size": ("small",)}
    assert said_of_shape("the ring with dots in front of a green star")["texture"] == ("dotted",)
    assert said_of_shape("a light blue ring to the left of a star")["colour"] == ("light blue",)
    assert said_of_shape("in front of a star") == {"shape": (), "colour": (), "texture": (), "size": ()}


STAR = {"shape": "star", "texture": "striped", "size": "small"}


@pytest.mark.parametrize(
    ("caption", "verdict"),
    [
        ("a small striped red star", {"shape": True, "colour": True, "texture": True, "size": True}),
        ("a big dotted red ring", {"shape": False, "colour": True, "texture": False, "size": False}),
        ("a star with stripes", {"shape": True, "colour": None, "texture": True, "size": None}),
        ("a red and blue star", {"shape": True, "colour": False, "texture": None, "size": None}),
        ("white thing behind a red star", {"shape": None, "colour": True, "texture": None, "size": None}),
        ("", {"shape": None, "colour": None, "texture": None, "size": None}),
    ],
)
def test_verdict_on_a_shape(caption, verdict):
    assert judge_shape(caption, STAR, ["red", "white"]) == verdict


def test_a_truth_that_is_unknown_is_not_judged():
    assert judge_shape("a large red star", {"shape": "star", "texture": "solid"}, ["red"])["size"] is None
    assert judge_shape("a striped star", {"shape": "star", "texture": "solid"}, ["red"])["texture"] is False
