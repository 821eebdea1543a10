"""Words about what a scene shows: phrases, places, captions in varied phrasing.

Every caption is lower-case and holds the object's name letter by letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .colours import words_in

T = TypeVar("T")

_PLURALS = ("shorts", "trousers", "shoes", "skis", "scissors", "pants", "jeans")  # said without an article
_SAID_LIKE_CONSONANT = ("uni", "use", "euro", "one", "ukulele")
_LEFT, _TOP = 0.36, 0.38  # where the outer thirds end, as people see them: a bit wider than a third
CLEARLY = 0.1  # how far two middles lie apart, in shares of the picture, before words compare them
_NEAR_BORDER = 0.03  # a middle so near the end of a third has no clear place

KIND_WORDS: dict[str, str] = {
    "shape": "a drawn shape",
    "grocery": "a grocery item",
    "garment": "a piece of clothing",
    "Smileys & Emotion": "a face or symbol of feeling",
    "People & Body": "a person or body part",
    "Animals & Nature": "an animal or plant",
    "Food & Drink": "food or drink",
    "Travel & Places": "a place or vehicle",
    "Activities": "something for sports, games or celebrations",
    "Objects": "an object",
    "Symbols": "a sign or symbol",
    "object": "an object",
}


@dataclass(frozen=True)
class Thing:
    """What words need to know of one object of a scene.

    Attributes:
        name: lower-case.
        phrase: name with article.
        colours: words, commonest first; may be empty.
        kind: key of `KIND_WORDS`.
        texture: "striped" and the like; "" where nothing is to say.
        size: "small", "large", or "".
        middle: (x, y) of the visible part, in shares of the picture.
        area: visible share of the picture.
        hidden_by: indices of the things that cover a part of it, the one that covers most first.
    """

    name: str
    phrase: str
    colours: tuple[str, ...]
    kind: str
    texture: str = ""
    size: str = ""
    middle: tuple[float, float] = (0.5, 0.5)
    area: float = 0.0
    hidden_by: tuple[int, ...] = ()


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all alike likely."""
    return options[int(rng.random() * len(options))]


# Phrases


def article(words: str) -> str:
    """ "a" or "an"."""
    vowel = words[:1] in "aeiou" and not words.startswith(_SAID_LIKE_CONSONANT)
    return "an" if vowel or words.startswith(("hour", "honest")) else "a"


def with_article(name: str) -> str:
    """ "a taxi", "an owl", "scissors"."""
    return name if name.split()[-1] in _PLURALS else f"{article(name)} {name}"


def split_article(phrase: str) -> tuple[str, str]:
    """("a", "taxi"); the first part is empty where there is no article."""
    first, _, rest = phrase.partition(" ")
    return (first, rest) if first in ("a", "an", "the") and rest else ("", phrase)


def noun_phrase(thing: Thing, adjectives: Sequence[str] = (), definite: bool = False) -> str:
    """The thing's phrase with adjectives before the noun, and the article that fits."""
    first, rest = split_article(thing.phrase)
    words = " ".join([*adjectives, rest])
    if definite:
        return f"the {words}"
    return f"{article(words)} {words}" if first else words


def colour_word(thing: Thing, count: int = 1) -> list[str]:
    """["red"] or ["red and white"]; nothing where the phrase says a colour already."""
    if not thing.colours or words_in(thing.phrase):
        return []
    return [" and ".join(thing.colours[:count])]


# Places


def place(middle: tuple[float, float]) -> str:
    """Where a point (in shares of the picture) lies: "top left", "left", "middle", ..."""
    x, y = middle
    row = "top" if y < _TOP else "bottom" if y > 1 - _TOP else ""
    column = "left" if x < _LEFT else "right" if x > 1 - _LEFT else ""
    return f"{row} {column}".strip() or "middle"


def has_clear_place(middle: tuple[float, float]) -> bool:
    """Whether a point lies so far from the ends of the thirds that people agree on its place."""
    ends = ((middle[0], _LEFT), (middle[0], 1 - _LEFT), (middle[1], _TOP), (middle[1], 1 - _TOP))
    return all(abs(value - end) > _NEAR_BORDER for value, end in ends)


def place_phrase(where: str) -> str:
    """ "in the top left of the picture", "at the right of the picture"."""
    return f"{'in' if ' ' in where or where == 'middle' else 'at'} the {where} of the picture"


def _varied_place(rng: np.random.Generator, where: str) -> str:
    if where == "middle":
        return pick(rng, ("in the middle", "in the middle of the picture", "in the centre", "near the centre"))
    if where in ("left", "right"):
        return pick(rng, (f"on the {where}", f"at the {where} of the picture", f"on the {where} side"))
    if where in ("top", "bottom"):
        return pick(rng, (f"at the {where}", f"at the {where} of the picture", f"near the {where}"))
    upper = where.replace("top", "upper").replace("bottom", "lower")
    return pick(rng, (f"in the {where}", f"in the {where} of the picture", f"at the {upper}", f"in the {upper} part"))


# Captions


def captions(rng: np.random.Generator, things: Sequence[Thing], index: int) -> list[str]:
    """Three captions of a thing: short, long, varied.

    The short one is colour and phrase, the long one adds the place and what hides it, the third is free in what it
    says and how.

    Args:
        rng: decides what is said.
        things: all things of the scene, back to front.
        index: of the thing to caption.

    Returns:
        Lower-case captions; none where the thing's phrase lacks its name.
    """
    thing = things[index]
    if thing.name not in thing.phrase:
        return []
    texture = [thing.texture] if thing.texture else []
    colour = colour_word(thing)
    short = noun_phrase(thing, [*texture, *colour])
    hider = f", partly hidden by {noun_phrase(things[thing.hidden_by[0]])}" if thing.hidden_by else ""
    long = f"{short} {place_phrase(place(thing.middle))}{hider}"
    return [short, long, _free_caption(rng, things, index)]


def _free_caption(rng: np.random.Generator, things: Sequence[Thing], index: int) -> str:
    thing = things[index]
    dice = rng.random(5).tolist()
    adjectives = [thing.size] if thing.size and dice[0] < 0.5 else []
    tail = ""
    if thing.texture and dice[1] < 0.85:
        tail = _TEXTURE_TAILS.get(thing.texture, "") if dice[1] < 0.2 else ""
        adjectives += [] if tail else [thing.texture]
    if dice[2] < 0.85:
        adjectives += colour_word(thing, count=2 if dice[2] < 0.25 else 1)
    text = noun_phrase(thing, adjectives, definite=dice[3] < 0.1) + tail
    if dice[4] < 0.3:
        return text
    if dice[4] < 0.55:
        return f"{text} {_varied_place(rng, place(thing.middle))}"
    return f"{text}{_relation(rng, things, index)}"


_TEXTURE_TAILS = {"striped": " with stripes", "dotted": " with dots", "checked": " with checks"}


def _relation(rng: np.random.Generator, things: Sequence[Thing], index: int) -> str:
    """What hides the thing, what it hides, or how it lies to a neighbour; "" for a thing alone."""
    thing = things[index]
    covers = [i for i, other in enumerate(things) if index in other.hidden_by]
    if thing.hidden_by:
        words = pick(rng, (", partly hidden by", ", partly behind", " behind", ", half covered by"))
        return f"{words} {_reference(rng, things[thing.hidden_by[0]])}"
    if covers:
        return f" in front of {_reference(rng, things[covers[0]])}"
    others = [i for i in range(len(things)) if i != index]
    if not others:
        return ""
    other = things[pick(rng, others)]
    return f" {_direction(thing, other)} {_reference(rng, other)}"


def _direction(thing: Thing, other: Thing) -> str:
    """How `thing` lies to `other`, by the longer way between their middles."""
    dx, dy = (a - b for a, b in zip(thing.middle, other.middle, strict=True))
    if max(abs(dx), abs(dy)) < CLEARLY:
        return "next to"
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def _reference(rng: np.random.Generator, thing: Thing) -> str:
    """Another thing, as a caption points at it."""
    dice = rng.random(2).tolist()
    return noun_phrase(thing, colour_word(thing) if dice[0] < 0.6 else (), definite=dice[1] < 0.4)
