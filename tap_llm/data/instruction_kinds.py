"""What can be asked about the regions of a scene; one short function per kind of question.

Text alone tells nothing, by construction. A question with a closed set of answers is asked only where the scene allows
each of them, and then the answer is drawn before the regions are. Yes and no ask for a value out of the same pair of
regions: that of the region asked about, or that of the other one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from .colours import words_in
from .instruction_forms import FORMS
from .scenes import Scene
from .shapes import SIZES, TEXTURES
from .wording import CLEARLY, KIND_WORDS, Thing, has_clear_place, pick, place, place_phrase

_LARGER = 1.4  # ratio of the areas before words compare them
_WHOLE = 0.9  # visible share of an object before its size has a word
# Kinds whose members people may call either way are not compared; nearly everything is an object.
_CONFUSED = (
    {"a grocery item", "food or drink"},
    {"a face or symbol of feeling", "a person or body part", "an animal or plant", "a sign or symbol"},
)
_COUNTS = {2: (0, 1, 2), 3: (0, 1, 2, 3), 4: (1, 2, 3)}  # right answers by the number of regions, all alike likely


@dataclass(frozen=True)
class Draft:
    """A question before regions have numbers.

    Attributes:
        form: its wording; {0} and {1} stand for regions, {v} for the value, {list} for all regions.
        regions: indices of the scene's objects, in the order of {0}, {1}.
        answer: text, or the index of an object that is the answer.
        value: what fills {v}.
        choices: all answers there could be, where they are few; empty where the regions are the choices.
        listed: choices that the question lists.
    """

    form: str
    regions: tuple[int, ...]
    answer: str | int
    value: str = ""
    choices: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """A scene, and which of its objects a question may be about: of those what it asks for was not yet said.

    Attributes:
        rng: draws the question.
        scene: all objects.
        free: indices of the objects that may be asked about.
    """

    rng: np.random.Generator
    scene: Scene
    free: tuple[int, ...]

    def thing(self, index: int) -> Thing:
        """One object in words."""
        return self.scene.things[index]

    def form(self, name: str) -> str:
        """One of the wordings."""
        return pick(self.rng, FORMS[name])

    def coin(self) -> bool:
        """True half of the time."""
        return bool(self.rng.random() < 0.5)

    def pairs(self, fits: Callable[[int, int], bool]) -> list[tuple[int, int]]:
        """Pairs of free objects, in random order each, for which `fits`, a symmetric test."""
        return [(a, b) if self.coin() else (b, a) for a, b in combinations(self.free, 2) if fits(a, b)]


# Open questions


def _ask_name(view: View) -> Draft | None:
    named = [i for i in view.free if view.thing(i).name in view.thing(i).phrase]
    if not named:
        return None
    index = pick(view.rng, named)
    return Draft(view.form("name"), (index,), view.thing(index).phrase)


def _ask_caption(view: View, form: str, number: int) -> Draft | None:
    told = [i for i in view.free if view.scene.captions[i]]
    if not told:
        return None
    index = pick(view.rng, told)
    return Draft(view.form(form), (index,), view.scene.captions[index][number])


def _ask_value(
    view: View, form: str, value_of: Callable[[View, int], str], choices: tuple[str, ...] = ()
) -> Draft | None:
    """The values that occur are alike likely, however many objects have them; "" is no value."""
    having: dict[str, list[int]] = defaultdict(list)
    for index in view.free:
        having[value_of(view, index)].append(index)
    values = sorted(having.keys() - {""})
    if not values:
        return None
    value = pick(view.rng, values)
    return Draft(view.form(form), (pick(view.rng, having[value]),), value, choices=choices)


def _ask_kind(view: View) -> Draft | None:
    """Multiple choice among kinds that the picture shows, each as likely to be the right one."""
    kinds: list[str] = []
    for index in view.rng.permutation(view.free).tolist():
        kind = _kind_words(view, index)
        if len(kinds) < 4 and kind not in kinds:
            kinds.append(kind)
    if len(kinds) < 2:
        return None
    kinds = [kinds[i] for i in view.rng.permutation(len(kinds))]
    right = pick(view.rng, range(len(kinds)))
    letters = "ABCD"[: len(kinds)]
    index = pick(view.rng, [i for i in view.free if _kind_words(view, i) == kinds[right]])
    listed = tuple(f"{letter}. {kind}" for letter, kind in zip(letters, kinds, strict=True))
    return Draft(view.form("kind"), (index,), letters[right], choices=tuple(letters), listed=listed)


# Two regions


def _far_apart(view: View, axis: int) -> tuple[int, int, bool] | None:
    """Two objects clearly apart along an axis, and whether the first lies further to its start."""
    pairs = view.pairs(lambda a, b: abs(view.thing(a).middle[axis] - view.thing(b).middle[axis]) > CLEARLY)
    if not pairs:
        return None
    a, b = pick(view.rng, pairs)
    return a, b, bool(view.thing(a).middle[axis] < view.thing(b).middle[axis])


def _ask_relation(view: View, axis: int) -> Draft | None:
    """On which side of the other, or which of the two lies further to one side."""
    found = _far_apart(view, axis)
    if found is None:
        return None
    a, b, a_first = found
    if view.rng.random() < 0.7:
        sides = (("left", "right"), ("above", "below"))[axis]
        return Draft(view.form(("left_right", "above_below")[axis]), (a, b), sides[not a_first], choices=sides)
    first_wanted = view.coin()
    value = (("right", "left"), ("lower", "higher"))[axis][first_wanted]
    return Draft(view.form(("further", "higher")[axis]), (a, b), a if a_first == first_wanted else b, value)


def _differ_in_area(view: View) -> tuple[int, int, bool] | None:
    """Two objects of clearly different visible areas, and whether the first is the larger one."""

    def differ(a: int, b: int) -> bool:
        areas = view.thing(a).area, view.thing(b).area
        return max(areas) >= _LARGER * min(areas)

    pairs = view.pairs(differ)
    if not pairs:
        return None
    a, b = pick(view.rng, pairs)
    return a, b, view.thing(a).area > view.thing(b).area


def _ask_larger(view: View) -> Draft | None:
    found = _differ_in_area(view)
    if found is None:
        return None
    a, b, a_larger = found
    form = pick(view.rng, ("larger", "larger", "smaller"))
    return Draft(view.form(form), (a, b), a if a_larger == (form == "larger") else b)


# Several regions


def _ask_count(view: View) -> Draft | None:
    """How many of two to four regions have a value; only where every count in `_COUNTS` is possible."""
    possible = [
        (value, number, having, lacking)
        for value, having, lacking in _splits(view)
        for number, counts in _COUNTS.items()
        if len(having) >= max(counts) and len(lacking) >= number - min(counts)
    ]
    if not possible:
        return None
    value, number, having, lacking = pick(view.rng, possible)
    count = pick(view.rng, _COUNTS[number])
    chosen = [*view.rng.permutation(having)[:count].tolist(), *view.rng.permutation(lacking)[: number - count].tolist()]
    regions = tuple(view.rng.permutation(chosen).tolist())
    return Draft(view.form("count"), regions, str(count), value, tuple(map(str, _COUNTS[number])))


def _splits(view: View) -> Iterator[tuple[str, list[int], list[int]]]:
    """Values in words, the free objects that have each, and those that clearly have not."""
    readings: tuple[tuple[str, Callable[[View, int], str], Callable[[str, str], bool]], ...] = (
        ("show", _phrase, _other_names),
        ("are", _only_colour, _other_colours),
        ("show", _clear_kind, _other_kinds),
        ("are", partial(_attribute, key="texture"), str.__ne__),
    )
    for verb, value_of, apart in readings:
        values = {i: value for i in view.free if (value := value_of(view, i))}
        for value in sorted(set(values.values())):
            having = [i for i in values if values[i] == value]
            yield f"{verb} {value}", having, [i for i in values if apart(value, values[i])]


# Yes or no


def _yes_or_no(view: View, form: str, regions: tuple[int, ...], yes: bool, value: str = "") -> Draft:
    return Draft(view.form(form), regions, "yes" if yes else "no", value, ("yes", "no"))


def _ask_whether(
    view: View, form: str, value_of: Callable[[View, int], str], apart: Callable[[View, int, int], bool]
) -> Draft | None:
    """Whether a region has a value: its own, or that of another region which is `apart`."""
    values = {i: value_of(view, i) for i in view.free}
    pairs = view.pairs(lambda a, b: bool(values[a] and values[b]) and values[a] != values[b] and apart(view, a, b))
    if not pairs:
        return None
    about, other = pick(view.rng, pairs)
    yes = view.coin()
    return _yes_or_no(view, form, (about,), yes, values[about if yes else other])


def _names_apart(view: View, a: int, b: int) -> bool:
    """Both shapes or both not, so that what was said of a pattern does not give the answer away."""
    one, other = view.thing(a), view.thing(b)
    return (one.kind == "shape") == (other.kind == "shape") and _other_names(one.name, other.name)


def _colours_apart(view: View, a: int, b: int) -> bool:
    """Neither has any of the other's colours."""
    return all(_other_colours(mine, other) for mine in view.thing(a).colours for other in view.thing(b).colours)


def _ask_whether_related(view: View, axis: int) -> Draft | None:
    found = _far_apart(view, axis)
    if found is None:
        return None
    a, b, a_first = found
    yes = view.coin()
    value = (("to the right of", "to the left of"), ("below", "above"))[axis][a_first == yes]
    return _yes_or_no(view, ("is_left_right", "is_above_below")[axis], (a, b), yes, value)


def _ask_whether_larger(view: View) -> Draft | None:
    found = _differ_in_area(view)
    if found is None:
        return None
    a, b, a_larger = found
    yes = view.coin()
    return _yes_or_no(view, "is_larger", (a, b), yes, "larger" if a_larger == yes else "smaller")


def _ask_same(
    view: View, form: str, value_of: Callable[[View, int], str], apart: Callable[[str, str], bool]
) -> Draft | None:
    """Whether two regions share a value; only where the scene has a pair for yes and one for no."""
    values = {i: value_of(view, i) for i in view.free}
    same = view.pairs(lambda a, b: values[a] == values[b] != "")
    other = view.pairs(lambda a, b: bool(values[a] and values[b]) and apart(values[a], values[b]))
    if not (same and other):
        return None
    yes = view.coin()
    return _yes_or_no(view, form, pick(view.rng, same if yes else other), yes)


# What values are


def _phrase(view: View, index: int) -> str:
    thing = view.thing(index)
    return thing.phrase if thing.name in thing.phrase else ""


def _main_colour(view: View, index: int) -> str:
    """The commonest colour, unless the name says another one."""
    thing = view.thing(index)
    return thing.colours[0] if thing.colours and words_in(thing.name) in ((), thing.colours[:1]) else ""


def _only_colour(view: View, index: int) -> str:
    return _main_colour(view, index) if len(view.thing(index).colours) == 1 else ""


def _kind_words(view: View, index: int) -> str:
    return KIND_WORDS.get(view.thing(index).kind, KIND_WORDS["object"])


def _clear_kind(view: View, index: int) -> str:
    """Nearly everything is an object, so that kind is not compared with others."""
    words = _kind_words(view, index)
    return "" if words == KIND_WORDS["object"] else words


def _attribute(view: View, index: int, key: str) -> str:
    """Of a drawn shape; sizes are those of whole shapes, so of a shape that is partly hidden there is none."""
    hidden = key == "size" and view.scene.visible[index] < _WHOLE
    return "" if hidden else view.scene.attributes[index].get(key, "")


def _place(view: View, index: int) -> str:
    middle = view.thing(index).middle
    return place(middle) if has_clear_place(middle) else ""


def _place_words(view: View, index: int) -> str:
    where = _place(view, index)
    return where and place_phrase(where)


def _other_names(a: str, b: str) -> bool:
    """Neither name holds the other, as "cat" and "cat face" do."""
    return not (set(a.split()) <= set(b.split()) or set(b.split()) <= set(a.split()))


def _other_colours(a: str, b: str) -> bool:
    """Not shades of one colour."""
    return a.split()[-1] != b.split()[-1]


def _other_kinds(a: str, b: str) -> bool:
    """Not two kinds that people take for one another."""
    return a != b and not any({a, b} <= group for group in _CONFUSED)


# The list


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        ask: draws a question, or None where the free objects allow none.
        topics: what the answer tells about the regions; of each region a topic comes up once in a conversation.
        weight: how often it is tried.
    """

    ask: Callable[[View], Draft | None]
    topics: frozenset[str]
    weight: int


def _kind(topics: str, weight: int, ask: Callable[..., Draft | None], **fixed: Any) -> Kind:
    return Kind(partial(ask, **fixed), frozenset(topics.split()), weight)


def _about(attribute: str) -> dict[str, Any]:
    return {"form": attribute, "value_of": partial(_attribute, key=attribute)}


def _any_pair(view: View, a: int, b: int) -> bool:
    return True


KINDS: dict[str, Kind] = {
    "name": _kind("name class", 3, _ask_name),
    "caption": _kind("name class colour texture", 1, _ask_caption, form="caption", number=0),
    "describe": _kind("name class colour texture x y", 1, _ask_caption, form="describe", number=1),
    "colour": _kind("colour class", 2, _ask_value, **_about("colour")),
    "shape": _kind("name class", 2, _ask_value, **_about("shape")),
    "texture": _kind("texture class", 2, _ask_value, **_about("texture"), choices=TEXTURES),
    "size": _kind("area class", 2, _ask_value, **_about("size"), choices=tuple(SIZES)),
    "place": _kind("x y", 2, _ask_value, form="place", value_of=_place),
    "kind": _kind("name class", 2, _ask_kind),
    "left_right": _kind("x", 2, _ask_relation, axis=0),
    "above_below": _kind("y", 2, _ask_relation, axis=1),
    "larger": _kind("area", 3, _ask_larger),
    "count": _kind("name class colour texture", 4, _ask_count),
    "is_name": _kind("name class", 2, _ask_whether, form="is_name", value_of=_phrase, apart=_names_apart),
    "is_colour": _kind("colour", 2, _ask_whether, form="is_colour", value_of=_main_colour, apart=_colours_apart),
    "is_texture": _kind(
        "texture class", 1, _ask_whether, **_about("texture") | {"form": "is_texture"}, apart=_any_pair
    ),
    "is_place": _kind("x y", 1, _ask_whether, form="is_place", value_of=_place_words, apart=_any_pair),
    "is_left_right": _kind("x", 1, _ask_whether_related, axis=0),
    "is_above_below": _kind("y", 1, _ask_whether_related, axis=1),
    "is_larger": _kind("area", 2, _ask_whether_larger),
    "same_kind": _kind("name class", 2, _ask_same, form="same_kind", value_of=_clear_kind, apart=_other_kinds),
    "same_colour": _kind("colour", 6, _ask_same, form="same_colour", value_of=_only_colour, apart=_other_colours),
}
