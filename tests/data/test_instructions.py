"""Conversations about scenes: answers are true, nothing is told twice, and text alone tells nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from tap_llm.data.instruction_kinds import KINDS, Draft, View
from tap_llm.data.instructions import Conversation, InstructionSamples, Question, converse, same_answer
from tap_llm.data.scenes import Scene, SceneComposer
from tap_llm.data.shapes import SHAPE_COLOURS, SHAPE_NAMES
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.data.wording import CLEARLY, KIND_WORDS, Thing, place, with_article
from tap_llm.errors import InputError

Asked = list[tuple[Scene, Question]]
LISTED = ("shape", "colour", "texture", "size")
COMPARED = ("left_right", "above_below", "larger")


@pytest.fixture(scope="module")
def composer() -> SceneComposer:
    return SceneComposer(SpriteLibrary.bundled(), shape_share=0.5, objects=(5, 7))


@pytest.fixture(scope="module")
def scenes(composer: SceneComposer) -> list[Scene]:
    return [composer.scene(seed, (96, 72)) for seed in range(150)]


@pytest.fixture(scope="module")
def talks(scenes: list[Scene]) -> list[tuple[Scene, Conversation]]:
    return [(scene, converse(scene, seed)) for seed, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def asked(scenes: list[Scene]) -> dict[str, Asked]:
    """Many single questions of every kind, straight from the kinds."""
    found: dict[str, Asked] = defaultdict(list)
    for number, scene in enumerate(scenes * 3):
        for kind in KINDS:
            found[kind] += [(scene, question) for question in converse(scene, number, 1, [kind]).questions]
    return found


def make_scene(things: list[Thing], attributes: list[dict[str, str]] | None = None) -> Scene:
    """A scene of nothing but words."""
    count = len(things)
    masks = np.ones((count, 32, 32), dtype=bool)
    captions = [[thing.phrase] * 3 for thing in things]
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    return Scene(image, masks, things, captions, ["object"] * count, attributes or [{}] * count, [1.0] * count)


def thing(name: str, x: float = 0.5, y: float = 0.5, area: float = 0.1, colour: str = "red") -> Thing:
    return Thing(name, with_article(name), (colour,), "Objects", middle=(x, y), area=area)


def share(values: list[bool]) -> float:
    return float(np.mean(values))


def within(count: int, total: int, chance: float) -> bool:
    """Within four standard deviations of chance."""
    return abs(count / total - chance) < 4 * (chance * (1 - chance) / total) ** 0.5


# Answers are true


def test_every_kind_comes_up(asked: dict[str, Asked]) -> None:
    assert list(asked) == list(KINDS)
    assert min(len(questions) for questions in asked.values()) > 30


@pytest.mark.parametrize("kind", LISTED)
def test_attributes(asked: dict[str, Asked], kind: str) -> None:
    for scene, question in asked[kind]:
        (index,) = question.regions
        assert scene.kinds[index] == "shape" and question.answer == scene.attributes[index][kind]
        assert kind != "size" or scene.visible[index] >= 0.9


def test_names_captions_and_places(asked: dict[str, Asked]) -> None:
    for kind, told in {
        "name": lambda scene, index: scene.phrases[index],
        "caption": lambda scene, index: scene.captions[index][0],
        "describe": lambda scene, index: scene.captions[index][1],
        "place": lambda scene, index: place(scene.things[index].middle),
    }.items():
        assert all(question.answer == told(scene, question.regions[0]) for scene, question in asked[kind])


def test_the_right_kind_is_chosen(asked: dict[str, Asked], talks: list[tuple[Scene, Conversation]]) -> None:
    shown = 0
    for scene, talk in talks:
        for turn, question in enumerate(talk.questions):
            if question.kind == "kind":
                words = talk.messages[2 * turn]["content"][-1]["text"]
                listed = re.findall(r"^[A-D]\. .*", words, re.MULTILINE)
                right = KIND_WORDS[scene.things[question.regions[0]].kind]
                assert f"{question.answer}. {right}" in listed
                assert len(set(listed)) == len(listed) == len(question.choices)
                shown += 1
    assert shown > 5 and {len(question.choices) for _, question in asked["kind"]} >= {2, 3}


def wins(scene: Scene, question: Question, measure: Callable[[Thing], float]) -> bool:
    first, second = (measure(scene.things[index]) for index in question.regions)
    return first > second


def axis_of(kind: str) -> int:
    return int("above" in kind)


@pytest.mark.parametrize("kind", ["left_right", "above_below"])
def test_relations(asked: dict[str, Asked], kind: str) -> None:
    for scene, question in asked[kind]:
        first, second = (scene.things[index].middle[axis_of(kind)] for index in question.regions)
        assert abs(first - second) > CLEARLY
        if question.value:  # which of the two
            towards_start = question.value in ("left", "higher")
            assert question.answer == ("region 1" if (first < second) == towards_start else "region 2")
        else:
            assert question.answer == question.choices[int(first > second)]


def test_larger(asked: dict[str, Asked]) -> None:
    for scene, question in asked["larger"]:
        first_wins = wins(scene, question, lambda about: about.area) != bool(re.search("small|less", question.form))
        assert question.answer == ("region 1" if first_wins else "region 2")


def test_yes_and_no(asked: dict[str, Asked]) -> None:
    for kind in ("is_name", "is_colour", "is_texture"):
        for scene, question in asked[kind]:
            (index,) = question.regions
            about = scene.things[index]
            values = {
                "is_name": (about.phrase,),
                "is_colour": about.colours,
                "is_texture": (scene.attributes[index].get("texture"),),
            }[kind]
            assert (question.answer == "yes") == (question.value in values)
    for kind in ("is_left_right", "is_above_below"):
        for scene, question in asked[kind]:
            first, second = (scene.things[index].middle[axis_of(kind)] for index in question.regions)
            assert (question.answer == "yes") == ((first < second) == bool(re.search("left|above", question.value)))
    for scene, question in asked["is_larger"]:
        larger = wins(scene, question, lambda about: about.area)
        assert (question.answer == "yes") == (larger == (question.value == "larger"))
    for kind in ("same_kind", "same_colour"):
        for scene, question in asked[kind]:
            first, second = (scene.things[index] for index in question.regions)
            same = (
                KIND_WORDS[first.kind] == KIND_WORDS[second.kind]
                if kind == "same_kind"
                else first.colours == second.colours
            )
            assert (question.answer == "yes") == same


def test_counts(asked: dict[str, Asked]) -> None:
    for scene, question in asked["count"]:
        value = question.value.split(" ", 1)[1]
        count = 0
        for index in question.regions:
            about = scene.things[index]
            words = {about.phrase, *about.colours, KIND_WORDS[about.kind], scene.attributes[index].get("texture")}
            count += value in words
        assert str(count) == question.answer and len(set(question.regions)) == len(question.regions)


# What is unclear is not asked


@pytest.mark.parametrize(
    ("kinds", "things"),
    [
        (["left_right", "is_left_right"], [thing("owl", 0.5), thing("taxi", 0.58)]),
        (["above_below", "is_above_below"], [thing("owl", y=0.5), thing("taxi", y=0.58)]),
        (["larger", "is_larger"], [thing("owl", area=0.1), thing("taxi", area=0.13)]),
        (["is_name"], [thing("cat"), thing("cat face"), thing("cat")]),
        (["is_colour", "same_colour", "count"], [thing("owl", colour="blue"), thing("taxi", colour="navy blue")]),
        (["place", "is_place"], [thing("owl", 0.36), thing("taxi", y=0.39)]),
        (["same_kind", "kind", "count"], [thing("owl"), thing("taxi"), thing("bus")]),
        (["colour", "texture", "size", "shape"], [thing("owl"), thing("taxi")]),
        (list(KINDS), []),
    ],
)
def test_unclear(kinds: list[str], things: list[Thing]) -> None:
    assert not any(converse(make_scene(things), seed, kinds=kinds).messages for seed in range(20))


def test_yes_needs_a_no_in_the_same_scene() -> None:
    alike = [thing("owl", colour="red"), thing("taxi", colour="red")]
    assert not any(converse(make_scene(alike), seed, kinds=["same_colour"]).questions for seed in range(20))
    both = make_scene([*alike, thing("bus", colour="blue")])
    answers = Counter(converse(both, seed, 1, ["same_colour"]).questions[0].answer for seed in range(200))
    assert within(answers["yes"], 200, 0.5)


# Text alone tells nothing


def place_of_answer(question: Question) -> object:
    """The answer, or for "region 2" its place among those named."""
    return question.choices.index(question.answer) if question.answer.startswith("region") else question.answer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("is_", "same_"))])
def test_yes_and_no_are_alike_frequent(asked: dict[str, Asked], kind: str) -> None:
    forms: dict[str, list[bool]] = defaultdict(list)
    for _, question in asked[kind]:
        assert question.choices == ("yes", "no")
        forms[question.form].append(question.answer == "yes")
    total = [yes for values in forms.values() for yes in values]
    assert within(sum(total), len(total), 0.5)
    assert all(within(sum(values), len(values), 0.5) for values in forms.values() if len(values) >= 15)


@pytest.mark.parametrize("kind", COMPARED)
def test_both_sides_are_alike_frequent(asked: dict[str, Asked], kind: str) -> None:
    forms: dict[tuple[str, str], list[object]] = defaultdict(list)
    for _, question in asked[kind]:
        forms[question.form, question.value].append(place_of_answer(question))
    for answers in forms.values():
        counts = Counter(answers)
        assert len(answers) < 15 or within(max(counts.values()), len(answers), 0.5)


def test_counts_and_letters_are_alike_frequent(asked: dict[str, Asked]) -> None:
    for kind in ("count", "kind"):
        groups: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for _, question in asked[kind]:
            groups[question.choices][question.answer] += 1
        for choices, counts in groups.items():
            total = counts.total()
            assert total < 30 or all(within(counts[choice], total, 1 / len(choices)) for choice in choices)


@pytest.mark.parametrize("kind", ["is_name", "is_colour", "is_place"])
def test_wrong_values_are_those_that_are_right_elsewhere(asked: dict[str, Asked], kind: str) -> None:
    """A guesser that learned which values go with yes in one half of the data is at chance in the other."""
    yes_for: dict[str, list[bool]] = defaultdict(list)
    questions = [question for _, question in asked[kind]]
    half = len(questions) // 2
    for question in questions[:half]:
        yes_for[question.value].append(question.answer == "yes")
    guesses = [
        (share(yes_for[question.value]) >= 0.5) == (question.answer == "yes")
        for question in questions[half:]
        if question.value in yes_for
    ]
    assert len(guesses) > 60 and within(sum(guesses), len(guesses), 0.5)


def test_open_answers_spread(asked: dict[str, Asked]) -> None:
    for kind, size in {
        "colour": len(SHAPE_COLOURS),
        "shape": len(SHAPE_NAMES),
        "texture": 4,
        "size": 3,
        "place": 9,
    }.items():
        counts = Counter(question.answer for _, question in asked[kind])
        assert len(counts) == size and max(counts.values()) < 2.2 * counts.total() / size


# Conversations


def test_messages_belong_to_the_questions(talks: list[tuple[Scene, Conversation]]) -> None:
    for scene, talk in talks:
        assert [message["role"] for message in talk.messages] == ["user", "assistant"] * len(talk.questions)
        assert talk.messages[0]["content"][0] == {"type": "image"}
        seen: list[int] = []
        for turn, question in enumerate(talk.questions):
            said, answer = talk.messages[2 * turn]["content"], talk.messages[2 * turn + 1]["content"]
            assert answer == [{"type": "text", "text": question.answer}]
            seen += [part["index"] for part in said if part["type"] == "region"]
            assert set(question.regions) <= set(seen)
            assert not re.search(r"[{}]|  ", "".join(part.get("text", "<r>") for part in said))
        assert len(set(seen)) == len(seen) and max(seen) < len(scene.names)


def test_turns_vary_and_some_need_no_new_region(talks: list[tuple[Scene, Conversation]]) -> None:
    lengths = Counter(len(talk.questions) for _, talk in talks)
    assert set(lengths) == {1, 2, 3, 4} and min(lengths.values()) > 20
    later = [message["content"] for _, talk in talks for message in talk.messages[2::2]]
    without = share([all(part["type"] == "text" for part in content) for content in later])
    assert 0.25 < without < 0.75
    assert any(re.search(r"\bit\b", content[0].get("text", "")) for content in later)


def test_nothing_is_told_twice(talks: list[tuple[Scene, Conversation]]) -> None:
    for _, talk in talks:
        told: set[tuple[int, str]] = set()
        for question in talk.questions:
            new = {(index, topic) for index in question.regions for topic in KINDS[question.kind].topics}
            assert not new & told
            told |= new


def test_a_name_gives_away_the_colour_of_what_is_no_shape() -> None:
    scene = make_scene([thing("banana", colour="yellow"), thing("owl", colour="red")])
    for seed in range(40):
        talk = converse(scene, seed, 4, ["name", "is_name", "is_colour"])
        regions = [question.regions for question in talk.questions]
        assert len(set(regions)) == len(regions)


def test_a_seed_gives_one_conversation(scenes: list[Scene]) -> None:
    assert converse(scenes[0], 3) == converse(scenes[0], 3) != converse(scenes[0], 4)
    assert len(converse(scenes[0], 3, turns=6).questions) == 6


def test_samples_are_whole_and_fixed(composer: SceneComposer) -> None:
    samples = InstructionSamples(composer, 3, seed=1, size=(96, 72), turns=2, kinds=["name", "larger"])
    assert len(list(samples)) == 3
    for index in range(3):
        sample = samples[index]
        sample.check()
        scene, talk = samples.example(index)
        assert sample.conversations == talk.messages and len(sample.regions) == len(scene.names)
        assert {question.kind for question in talk.questions} <= {"name", "larger"}
    assert samples[-1].conversations == samples[2].conversations != samples[1].conversations


# Scoring, and bad input


def test_same_answer() -> None:
    assert same_answer("A taxi.", "a taxi") and same_answer("taxi", "a taxi") and same_answer(" Region 2", "region 2")
    assert not same_answer("a taxi cab", "a taxi") and not same_answer("", "a taxi") and same_answer("A", "A")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["nmae"]}, "unknown kind of question 'nmae'; known are name, caption"),
        ({"turns": 0}, "at least one turn"),
        ({"seed": -1}, "a seed of at least 0"),
    ],
)
def test_impossible_wishes_are_named(scenes: list[Scene], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        converse(scenes[0], **{"seed": 0, **options})


def test_scenes_that_allow_no_question(composer: SceneComposer) -> None:
    plain = SceneComposer(SpriteLibrary.bundled(), shape_share=0, objects=(1, 1))
    with pytest.raises(InputError, match="20 scenes in turn have nothing to ask about"):
        InstructionSamples(plain, 1, size=(64, 64), kinds=["larger"])[0]
    with pytest.raises(IndexError):
        InstructionSamples(composer, 1)[1]


def test_drafts_come_from_free_objects_only(scenes: list[Scene]) -> None:
    for kind in KINDS.values():
        for seed in range(30):
            draft = kind.ask(View(np.random.default_rng(seed), scenes[seed], (0, 2, 3)))
            assert draft is None or (isinstance(draft, Draft) and set(draft.regions) <= {0, 2, 3})
