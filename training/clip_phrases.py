"""What is said of objects: names, colours and textures, bare and in the templates that CaR asks with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tap_llm.clip_as_rnn.vocabulary import BACKGROUND, BACKGROUND_LARGE, ORIGAMI, TEMPLATES
from tap_llm.data import wording
from tap_llm.data.wording import Thing

_LARGE_SHARE = 0.25  # of the background words that come from the longer list


@dataclass(frozen=True)
class Phrase:
    """A text about one kind of object.

    Attributes:
        text: what is said.
        name: of the object.
        colour: "" where nothing is said of it; so the texture.
    """

    text: str
    name: str
    colour: str = ""
    texture: str = ""

    def fits(self, thing: Thing) -> bool:
        """Whether the text is true of a thing."""
        if self.name != thing.name or (self.texture and self.texture != thing.texture):
            return False
        return not self.colour or self.colour in thing.colours


def draw_phrase(rng: np.random.Generator, thing: Thing) -> Phrase:
    """A text about a thing: "kite", "a red kite", "the kite", "a photo of a kite.", "a clean origami red kite." ..."""
    dice = rng.random(3).tolist()
    colours = wording.colour_word(thing) if dice[0] < 0.4 else []
    texture = thing.texture if dice[1] < 0.25 else ""
    adjectives = [texture, *colours] if texture else colours
    bare = " ".join([*adjectives, thing.name])
    if dice[2] < 0.4:
        text = bare
    elif dice[2] < 0.6:
        text = f"the {bare}"
    else:
        text = wording.noun_phrase(thing, adjectives)
    return Phrase(_wrapped(rng, text), thing.name, "".join(colours), texture)


def draw_background_words(rng: np.random.Generator, count: int, names: set[str]) -> list[str]:
    """Words for what lies behind objects, each once; none is the name of an object."""
    pools = [[word for word in pool if word not in names] for pool in (BACKGROUND, BACKGROUND_LARGE)]
    more = int((rng.random(count) < _LARGE_SHARE).sum())
    first = rng.permutation(pools[0])[: count - more].tolist()
    second = rng.permutation([word for word in pools[1] if word not in first])[: count - len(first)].tolist()
    return [_wrapped(rng, word) for word in first + second]


def draw_caption(rng: np.random.Generator, things: list[Thing]) -> str:
    """What a picture shows: up to three of its things, in any order."""
    chosen = rng.permutation(len(things))[:3].tolist()
    said = [wording.noun_phrase(thing, wording.colour_word(thing)) for thing in (things[i] for i in chosen)]
    start = wording.pick(rng, ("", "a photo of ", "there is ", "a picture of "))
    return start + ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]


def _wrapped(rng: np.random.Generator, text: str) -> str:
    """The text bare, as CaR's proposals ask (origami), or in a template of its classifier."""
    dice = float(rng.random())
    if dice < 0.4:
        return text
    return (ORIGAMI if dice < 0.7 else wording.pick(rng, TEMPLATES)).format(text)
