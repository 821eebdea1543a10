"""Conversations about the regions of composed scenes: questions with short, exact answers, as much as one wants.

    scene = SceneComposer().scene(seed=7)
    conversation = converse(scene, seed=0)
    conversation.messages                       # chat messages; region parts point at the scene's objects
    conversation.questions[0].answer            # "a striped ring", "left", "region 2", "yes", "3", ...
    InstructionSamples(SceneComposer(), 10_000) # the same as a sequence of samples to train on

A conversation has one to four questions: what a region is, its colour, shape, texture, size and place, a caption or a
full description, its kind by multiple choice, left or right, above or below, which of two is larger, how many of
several have something in common, whether two are alike, and yes/no forms of these. Regions come in when they are first
asked about; later turns may speak of them by name alone ("region 1", "it"). What one answer tells about a region, no
other question of the conversation asks for. How text alone is kept at chance: see `instruction_kinds`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .instruction_kinds import KINDS, Draft, View
from .messages import Dialogue, Message, Piece, Style, with_choices
from .samples import RegionSample
from .scenes import Scene, SceneComposer, Size

MAX_TURNS = 4  # drawn where no number is given
_STYLES: tuple[Style, ...] = ("inline", "inline", "inline", "bare", "ahead")
_STAY = 0.5  # how often a turn first tries the regions that were spoken of
_SCENES = 20  # tried for one sample, until one has something to ask about
_SLOT = re.compile(r"(\{\w+\})")


@dataclass(frozen=True)
class Question:
    """One question as it was asked.

    Attributes:
        kind: key of `KINDS`.
        form: its wording; {0} and {1} stand for regions, {list} for all of them, {v} for `value`.
        value: what it asks for by name ("a taxi", "left"); "" for open questions.
        regions: indices of the scene's objects, in the order of {0}, {1}.
        answer: exactly what the assistant says.
        choices: all answers there could be, where they are few.
    """

    kind: str
    form: str
    value: str
    regions: tuple[int, ...]
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages, and what was asked; question i is answered by the assistant's i-th message.

    Attributes:
        messages: user and assistant in turn; the first content part is the picture.
        questions: none where the scene has nothing to ask about.
    """

    messages: list[Message]
    questions: list[Question]


def converse(scene: Scene, seed: int, turns: int | None = None, kinds: Iterable[str] | None = None) -> Conversation:
    """Ask about a scene.

    Args:
        scene: what is asked about.
        seed: non-negative; the same gives the same conversation.
        turns: so many questions, fewer where the scene has no more to ask; by default 1 to 4, at random.
        kinds: keys of `KINDS` to choose from; by default all.

    Raises:
        InputError: a negative seed, less than one turn, an unknown kind.
    """
    wanted = list(KINDS if kinds is None else dict.fromkeys(kinds))
    check_kinds(wanted)
    if seed < 0 or (turns is not None and turns < 1):
        raise InputError(f"expected a seed of at least 0 and at least one turn, got seed {seed} and {turns} turns")
    talk = _Talk(np.random.default_rng(seed), scene, wanted)
    for _ in range(int(talk.rng.integers(1, MAX_TURNS + 1)) if turns is None else turns):
        if not talk.ask():
            break
    return Conversation(talk.dialogue.messages, talk.questions)


def check_kinds(kinds: Iterable[str]) -> None:
    """Raise InputError for a kind of question that there is not."""
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None:
        raise InputError(f"unknown kind of question {unknown!r}; known are {', '.join(KINDS)}")


def same_answer(said: str, expected: str) -> bool:
    """Whether an answer is the expected one; case, a full stop, spaces and a leading article do not count."""
    return _plain(said) == _plain(expected)


def _plain(text: str) -> str:
    return re.sub(r"^(a|an|the) ", "", " ".join(text.lower().split()).strip(" .!"))


class InstructionSamples(Sequence[RegionSample]):
    """Conversations about composed scenes as samples; sample i is a pure function of all settings and i.

    Args:
        composer: makes the scenes.
        length: number of samples.
        seed: of all samples.
        size: (width, height) of the scenes in pixels.
        turns: see `converse`.
        kinds: see `converse`.

    Raises:
        InputError: as `converse`; on access also, if twenty scenes in turn have nothing to ask about.
    """

    def __init__(
        self,
        composer: SceneComposer,
        length: int,
        seed: int = 0,
        size: Size = (400, 300),
        turns: int | None = None,
        kinds: Iterable[str] | None = None,
    ) -> None:
        self.composer, self.length, self.seed, self.size, self.turns = composer, length, seed, size, turns
        self.kinds = None if kinds is None else list(kinds)

    def __len__(self) -> int:
        return self.length

    def example(self, index: int) -> tuple[Scene, Conversation]:
        """Scene and conversation of a sample, for scoring."""
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        for _ in range(_SCENES):
            scene_seed, seed = rng.integers(0, 2**31, 2).tolist()
            scene = self.composer.scene(scene_seed, self.size)
            conversation = converse(scene, seed, self.turns, self.kinds)
            if conversation.questions:
                return scene, conversation
        raise InputError(f"{_SCENES} scenes in turn have nothing to ask about; allow more kinds of questions")

    def __getitem__(self, index: int) -> RegionSample:  # type: ignore[override]
        scene, conversation = self.example(index + self.length if index < 0 else index)
        sample = scene.to_sample()
        sample.conversations = conversation.messages
        return sample


@dataclass
class _Talk:
    """A conversation in the making."""

    rng: np.random.Generator
    scene: Scene
    kinds: list[str]
    dialogue: Dialogue = field(default_factory=Dialogue)
    questions: list[Question] = field(default_factory=list)
    told: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))  # topics by object

    def ask(self) -> bool:
        """Ask and answer one question; False where there is none left."""
        known = self.dialogue.introduced
        pools = [list(range(len(self.scene.things)))]
        if known and self.rng.random() < _STAY:
            pools.insert(0, known)
        for pool in pools:
            for kind in self._shuffled_kinds():
                free = [i for i in pool if not KINDS[kind].topics & self.told[i]]
                draft = KINDS[kind].ask(View(self.rng, self.scene, tuple(free)))
                if draft is not None:
                    self._say(kind, draft)
                    return True
        return False

    def _shuffled_kinds(self) -> list[str]:
        """Heavier ones tend to come first."""
        keys = {kind: self.rng.random() ** (1 / KINDS[kind].weight) for kind in self.kinds}
        return sorted(keys, key=lambda kind: -keys[kind])

    def _say(self, kind: str, draft: Draft) -> None:
        style = _STYLES[int(self.rng.random() * len(_STYLES))]
        again = len(draft.regions) == 1 and bool(self.questions) and self.questions[-1].regions == draft.regions
        short = again and self.rng.random() < 0.5
        self.dialogue.user(_question_pieces(draft, "it" if short else None), style)
        self.dialogue.assistant([draft.answer])
        answer = self.dialogue.messages[-1]["content"][0]["text"]
        choices = draft.choices or (tuple(map(self.dialogue.name, draft.regions)) if answer != draft.answer else ())
        self.questions.append(Question(kind, draft.form, draft.value, draft.regions, answer, choices))
        for index in draft.regions:
            self.told[index] |= self._topics(index, KINDS[kind].topics)

    def _topics(self, index: int, topics: frozenset[str]) -> set[str]:
        """What is known after an answer: of anything but a drawn shape, name and colour tell each other."""
        linked = {"name", "colour"}
        is_shape = self.scene.things[index].kind == "shape"
        return set(topics) | (linked if topics & linked and not is_shape else set())


def _question_pieces(draft: Draft, pronoun: str | None) -> list[Piece]:
    """The question with its slots filled."""
    filled: dict[str, list[Piece]] = {f"{{{place}}}": [index] for place, index in enumerate(draft.regions)}
    if pronoun is not None:
        filled["{0}"] = [pronoun]
    filled["{v}"] = [draft.value]
    filled["{list}"] = _listed(draft.regions)
    words = _SLOT.split(with_choices(draft.form, draft.listed))
    return [piece for word in words for piece in filled.get(word, [word]) if piece != ""]


def _listed(regions: Sequence[int]) -> list[Piece]:
    """ "region 1, region 2 and region 3"."""
    pieces: list[Any] = []
    for place, index in enumerate(regions):
        pieces += [{0: "", len(regions) - 1: " and "}.get(place, ", "), index]
    return pieces
