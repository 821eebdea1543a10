"""Chat messages about the regions of a picture.

    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is region 1 "},
                                 {"type": "region", "index": 0}, {"type": "text", "text": "?"}]}
    {"role": "assistant", "content": [{"type": "text", "text": "a taxi"}]}

The picture comes first. Every region is one content part, at its first mention by the user; after that, and in
answers, its name "region 1" stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ..errors import InputError

Message = dict[str, Any]
Piece = str | int  # text, or the index of a region
Style = Literal["inline", "bare", "ahead"]

_PROMPT = re.compile(r"<Prompt(\d+)>")


def text_part(text: str) -> dict[str, Any]:
    """A content part of text."""
    return {"type": "text", "text": text}


def region_part(index: int) -> dict[str, Any]:
    """A content part that stands for a region of the sample."""
    return {"type": "region", "index": index}


class Dialogue:
    """Puts messages together.

    Args:
        fixed: regions are called by their index plus one; else they are numbered as they are introduced.

    Attributes:
        messages: so far.
    """

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed
        self.messages: list[Message] = []
        self._numbers: dict[int, int] = {}

    @property
    def introduced(self) -> list[int]:
        """Indices of the regions that were spoken of, in order."""
        return list(self._numbers)

    def name(self, index: int) -> str:
        """What an introduced region is called."""
        return f"region {self._numbers[index]}"

    def user(self, pieces: Iterable[Piece], style: Style = "inline") -> None:
        """The user says something.

        Args:
            pieces: text, and indices of regions.
            style: how regions come in that are new: behind their name ("What is region 1 <r>?"), in its place
                ("What is <r>?"), or listed ahead ("region 1: <r>", then "What is region 1?").
        """
        pieces = list(pieces)
        new = self._number(piece for piece in pieces if isinstance(piece, int))
        parts: list[dict[str, Any]] = [] if any(m["role"] == "user" for m in self.messages) else [{"type": "image"}]
        if style == "ahead":
            parts += self._introductions(new)
            new = []
        for piece in pieces:
            if isinstance(piece, str):
                parts.append(text_part(piece))
            elif piece in new:
                new.remove(piece)
                parts += [*([text_part(f"{self.name(piece)} ")] if style == "inline" else []), region_part(piece)]
            else:
                parts.append(text_part(self.name(piece)))
        self._say("user", parts)

    def assistant(self, pieces: Iterable[Piece]) -> None:
        """The assistant answers; a region that the user did not speak of yet is introduced in the user's message."""
        pieces = list(pieces)
        self.introduce((piece for piece in pieces if isinstance(piece, int)), len(self.messages) - 1)
        words = [piece if isinstance(piece, str) else self.name(piece) for piece in pieces]
        self._say("assistant", [text_part("".join(words))])

    def system(self, text: str) -> None:
        """Instructions ahead of the dialogue."""
        self._say("system", [text_part(text)])

    def introduce(self, indices: Iterable[int], message: int) -> None:
        """List those of the regions that are new at the head of a message of the user."""
        parts = self._introductions(self._number(indices))
        content = self.messages[message]["content"]
        at = 1 if content[0]["type"] == "image" else 0
        self.messages[message]["content"] = _merged([*content[:at], *parts, *content[at:]])

    def _number(self, indices: Iterable[int]) -> list[int]:
        """Number those that have no number yet, and return them."""
        new = [index for index in dict.fromkeys(indices) if index not in self._numbers]
        for index in new:
            self._numbers[index] = index + 1 if self.fixed else len(self._numbers) + 1
        return new

    def _introductions(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """One line each."""
        lines = [(text_part(f"{self.name(index)}: "), region_part(index), text_part("\n")) for index in indices]
        return [part for line in lines for part in line]

    def _say(self, role: str, parts: list[dict[str, Any]]) -> None:
        self.messages.append({"role": role, "content": _merged(parts)})


def split_markers(text: str, marker: re.Pattern[str], first: int, count: int) -> list[Piece]:
    """Text in which markers such as "<region1>" stand for regions, as pieces.

    Args:
        text: with any number of markers.
        marker: its first group is the number.
        first: number of the first region.
        count: of regions.

    Raises:
        InputError: a marker without a region.
    """
    pieces: list[Piece] = []
    end = 0
    for match in marker.finditer(text):
        index = int(match[1]) - first
        if not 0 <= index < count:
            raise InputError(f"{match[0]} stands for no region: there are {count}, counted from {first}")
        pieces += [text[end : match.start()], index]
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece != ""]


def with_choices(question: str, choices: Sequence[str]) -> str:
    """A question, and what to choose from, one to a line."""
    return "\n".join([question, *choices])


def question_messages(record: Mapping[str, Any]) -> list[Message]:
    """A record `{"question", "answer", "regions"}` as two messages.

    Args:
        record: `<Prompt0>` in its texts stands for the first of `regions`; `choices`, if there are, end the question.

    Raises:
        InputError: a marker without a region.
    """
    regions = list(record.get("regions") or [])
    question, answer = (
        [piece if isinstance(piece, str) else regions[piece] for piece in split_markers(text, _PROMPT, 0, len(regions))]
        for text in (with_choices(record["question"], record.get("choices") or ()), record["answer"])
    )
    dialogue = Dialogue()
    dialogue.user(question)
    dialogue.assistant(answer)
    dialogue.introduce(regions, 0)
    return dialogue.messages


def _merged(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring text parts as one."""
    merged: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = text_part(merged[-1]["text"] + part["text"])
        else:
            merged.append(part)
    return merged
