"""Conversations about the scene world as text, and what words say of the regions in them.

Where a region will be, the text has one placeholder. Pictures are composed small and without photos, for the sake of
what can be said about them alone, and are then forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tap_llm.conversations import read_conversation
from tap_llm.data.instructions import check_kinds, converse
from tap_llm.data.messages import Message
from tap_llm.data.scenes import Scene, SceneComposer
from tap_llm.errors import InputError
from tap_llm.region_llm.encoding import IGNORED, ConversationEncoder, Encoded
from tap_llm.region_llm.placeholders import find_placeholder

from .sources import VALIDATION_SEED, DataConfig, make_composers
from .views import tight_boxes

NO_WORD = -1
ROW = 128  # tokens, in which several conversations find room
_ATTEMPTS = 20  # scenes drawn for one conversation, until one has something to ask about
_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


@dataclass
class TalkConfig:
    """What is talked about."""

    sprites: list[str] = field(default_factory=list)
    """Folders of named cut-outs, whose names and colours are learned; none: drawn shapes only."""
    shape_share: float = 0.4
    """Share of drawn shapes among the objects of scenes."""
    scene_size: list[int] = field(default_factory=lambda: [128, 96])
    """Width and height of the scenes in pixels; nobody sees them."""
    scenes: int = 0
    """So many scenes are talked about again and again, which takes less time; 0: each conversation has a new one."""
    kinds: list[str] = field(default_factory=list)
    """Kinds of questions (see `instructions.KINDS`); none: all."""
    focus: list[str] = field(default_factory=list)
    """Kinds that are asked more often, until they are learned."""
    focus_share: float = 0.0
    """Share of conversations with questions of these alone."""
    single: int = 0
    """So many conversations at the start have one question each: what words say is found sooner in short ones."""
    told_share: float = 0.9
    """Share of conversations in which words stand for the regions; in the others nothing is known of them."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be."""
        if not 0 <= self.told_share <= 1:
            raise InputError(f"data.told_share must lie between 0 and 1, got {self.told_share}")
        if min(self.single, self.scenes) < 0:
            raise InputError(f"data.single and data.scenes must not be negative, got {self.single} and {self.scenes}")
        check_kinds([*self.kinds, *self.focus])
        if not 0 <= self.focus_share <= 1 or bool(self.focus_share) != bool(self.focus):
            raise InputError(
                f"data.focus names kinds of questions and data.focus_share, up to 1, how often they come; got "
                f"{self.focus} and {self.focus_share}"
            )
        if len(self.scene_size) != 2 or min(self.scene_size) < 1:
            raise InputError(f"data.scene_size must be width and height, got {self.scene_size}")


class Talk(NamedTuple):
    """One conversation.

    Attributes:
        scene: words only; `image` and `masks` are empty.
        boxes: (M, 4) tight boxes of its objects, (cx, cy, w, h) in shares.
        messages: what is said.
        told: whether words stand for the regions.
    """

    scene: Scene
    boxes: NDArray[np.float64]
    messages: list[Message]
    told: bool


class Talks:
    """Conversation n of an endless stream.

    Args:
        config: what about.
        seed: another seed, other conversations.
        composer: of scenes; made by default.

    Raises:
        InputError: settings or sprites that cannot be used.
    """

    def __init__(self, config: TalkConfig, seed: int = 0, composer: SceneComposer | None = None) -> None:
        config.check()
        self.config, self.seed = config, seed
        drawn = DataConfig(sprites=config.sprites, shape_share=config.shape_share)
        self.composer = composer or make_composers(drawn)[0]
        self._kept: dict[int, tuple[Scene, NDArray[np.float64]]] = {}

    def for_validation(self) -> Talks:
        """Other conversations of the same kind, of any length from the start."""
        config = replace(self.config, single=0, focus=[], focus_share=0.0)
        return Talks(config, VALIDATION_SEED, self.composer)

    def __getitem__(self, number: int) -> Talk:
        """Conversation n; raises InputError if twenty scenes in turn have nothing to ask about."""
        config, rng = self.config, np.random.default_rng((self.seed, number))
        told = bool(rng.random() < config.told_share)
        turns = 1 if number < config.single else None
        kinds = config.focus if rng.random() < config.focus_share else config.kinds
        for _ in range(_ATTEMPTS):
            scene, boxes = self._scene(int(rng.integers(config.scenes or 2**31)))
            conversation = converse(scene, int(rng.integers(2**31)), turns, kinds or None)
            if conversation.questions:
                return Talk(scene, boxes, conversation.messages, told)
        raise InputError(f"{_ATTEMPTS} scenes in turn have nothing to ask about; allow more kinds of questions")

    def texts(self, count: int) -> Iterator[str]:
        """What is said in the first conversations, and all names, to train a tokenizer on."""
        for number in range(count):
            for message in self[number].messages:
                yield "".join(part.get("text", "") for part in message["content"])
        if self.composer.sprites is not None:
            yield from (f"It is {sprite.phrase}" for sprite in self.composer.sprites.sprites)

    def _scene(self, index: int) -> tuple[Scene, NDArray[np.float64]]:
        """A scene without its pixels, and its boxes."""
        if index in self._kept:
            return self._kept[index]
        size = self.config.scene_size[0], self.config.scene_size[1]
        seed = int(np.random.default_rng((self.seed, index, 7)).integers(2**31))
        scene = self.composer.scene(seed, size)
        bare = replace(scene, image=_NO_PIXELS, masks=np.zeros((len(scene.things), 0, 0), dtype=bool))
        found = bare, _centred(scene)
        if self.config.scenes:
            self._kept[index] = found
        return found


def words_of(scene: Scene, index: int) -> str:
    """All that words say of an object itself; its main colour twice, because the order will not count."""
    thing, drawn = scene.things[index], scene.attributes[index]
    words = [thing.phrase, *thing.colours[:1], *thing.colours, drawn.get("texture", ""), drawn.get("size", "")]
    return "".join(f" {word}" for word in words if word)


@dataclass
class _Piece:
    """One conversation as ids, with what is known of the regions at its placeholders."""

    text: Encoded
    words: list[list[int]]
    boxes: list[Any]

    def __len__(self) -> int:
        return len(self.text.ids)


class TalkBatches:
    """Micro-batch n of conversations; several share a row, each with positions of its own from 0 on.

    Models of Transformers see by the positions where another conversation begins, and keep them apart.

    Args:
        talks: conversation n.
        tokenizer: with a chat template.
        batch_size: conversations in a batch.
        max_length: longest conversation in tokens; what is beyond is cut off.
        length: number of batches; None for an endless run.
    """

    def __init__(
        self,
        talks: Talks,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int,
        length: int | None = None,
    ) -> None:
        self.talks, self.tokenizer, self.batch_size = talks, tokenizer, batch_size
        self.max_length, self.length = max_length, length
        self.region_id = find_placeholder(tokenizer)
        self.encoder = ConversationEncoder(tokenizer, str(tokenizer.chat_template), self.region_id, 1, 0)

    def __len__(self) -> int:
        return self.length if self.length is not None else 2**40

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """A batch of R rows.

        Returns:
            `input_ids` and `position_ids` (R, L), padded on the right; `labels` (R, L), the ids again, -100 for
            padding, placeholders and the first token of each conversation; `answers` (R, L) bool, which of these an
            assistant says. Of the N placeholders, row by row: `words` (N, W) ids padded with -1, none where nothing is
            told, and `boxes` (N, 4) float32 (cx, cy, w, h) in shares.
        """
        first = number * self.batch_size
        pieces = [self._piece(which) for which in range(first, first + self.batch_size)]
        order = packed([len(piece) for piece in pieces], ROW)
        rows = [[pieces[which] for which in row] for row in order]
        words = [ids for row in rows for piece in row for ids in piece.words]
        boxes = [box for row in rows for piece in row for box in piece.boxes]
        return {
            **self._texts(rows),
            "words": padded(words, NO_WORD),
            "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
        }

    def take_problems(self) -> list[str]:
        """Nothing can be broken here."""
        return []

    def _piece(self, which: int) -> _Piece:
        scene, boxes, messages, told = self.talks[which]
        objects = [{"row": row} for row in range(len(scene.things))]
        conversation = read_conversation(messages, [None], objects, allow_unused_regions=True)
        whole = self.encoder.encode(conversation, prompt=False, need_labels=True)
        text = Encoded(whole.ids[: self.max_length], whole.labels[: self.max_length])
        parts = [conversation.regions[part]["row"] for part in conversation.parts if part >= 0]
        regions = parts[: text.ids.count(self.region_id)]
        words = [self._word_ids(scene, region) if told else [] for region in regions]
        return _Piece(text, words, [boxes[region] for region in regions])

    def _word_ids(self, scene: Scene, index: int) -> list[int]:
        return self.tokenizer.encode(words_of(scene, index), add_special_tokens=False)

    def _texts(self, rows: list[list[_Piece]]) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        ids = padded([[index for piece in row for index in piece.text.ids] for row in rows], pad)
        answers = padded([[label for piece in row for label in piece.text.labels] for row in rows], IGNORED) != IGNORED
        places = padded([[place for piece in row for place in range(len(piece))] for row in rows], 0)
        unsaid = (ids == pad) | (ids == self.region_id) | (places == 0)
        labels = ids.masked_fill(unsaid, IGNORED)
        return {"input_ids": ids, "position_ids": places, "labels": labels, "answers": answers}


def packed(lengths: list[int], room: int) -> list[list[int]]:
    """Put pieces into few rows, the longest first, each into the first row that has room for it.

    Args:
        lengths: of the pieces.
        room: of a row; that of the longest piece, if it is longer.

    Returns:
        Indices of the pieces of each row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = next((row for row, left in enumerate(free) if left >= lengths[index]), len(rows))
        if fits == len(rows):
            rows.append([])
            free.append(max([room, *lengths]))
        rows[fits].append(index)
        free[fits] -= lengths[index]
    return rows


def _centred(scene: Scene) -> NDArray[np.float64]:
    """(M, 4) tight boxes of a scene's objects as (cx, cy, w, h) in shares."""
    height, width = scene.image.shape[:2]
    corners = tight_boxes(scene.masks) / (width, height, width, height)
    low, high = corners[:, :2], corners[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1)


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Lists of ids as one tensor, filled up on the right."""
    table = torch.full((len(rows), max(map(len, rows), default=0)), value)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=table.dtype)
    return table
