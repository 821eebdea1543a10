"""What readers of conversations share: records of a JSON list or of JSON lines, and turns that become messages."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..messages import Dialogue, Message, Piece, split_markers
from ..samples import RegionSample
from .base import PackedRecords, SampleReader, read_json
from .jsonl import Lines, parse_object

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RecordSamples(SampleReader):
    """One sample per record of a JSON list, or of a file with one record per line.

    Args:
        path: the file.
        image_root: folder of the pictures; see [`SampleReader`].
        document: the parsed list, where it was read already.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, document: Any = None) -> None:
        super().__init__(path, image_root)
        self._records = self._open(document)
        self._kept: list[int] | None = None

    def _open(self, document: Any) -> Any:
        """Whatever holds the records: `len` and an index."""
        if document is None and not _is_list(self.path):
            return Lines(self.path)
        document = read_json(self.path) if document is None else document
        if not isinstance(document, list):
            raise InputError(f"{self.path}: expected a list of records")
        return PackedRecords(document)

    def _leave_out(self, unfit: Callable[[dict[str, Any]], bool], reason: str) -> None:
        """Leave out records for which `unfit`, and say how many; broken ones stay, to be named when they are read."""

        def keeps(index: int) -> bool:
            try:
                return not unfit(self._record(index))
            except (InputError, AttributeError, KeyError, IndexError, TypeError, ValueError):
                return True

        total = len(self._records)
        self._kept = [index for index in range(total) if keeps(index)]
        if len(self._kept) < total:
            self.notes.append(f"left out {total - len(self._kept)} records {reason}")

    def __len__(self) -> int:
        return len(self._records) if self._kept is None else len(self._kept)

    def where(self, index: int) -> str:
        place = self._place(index)
        return self._records.where(place) if isinstance(self._records, Lines) else f"record {place}"

    def _place(self, index: int) -> int:
        return index if self._kept is None else self._kept[index]

    def _record(self, place: int) -> dict[str, Any]:
        record = self._records[place]
        record = parse_object(record) if isinstance(record, bytes) else record
        if not isinstance(record, dict):
            raise InputError(f"expected a record, got {type(record).__name__}")
        return record

    def _read(self, index: int) -> RegionSample:
        return self._sample(self._record(self._place(index)))

    @abstractmethod
    def _sample(self, record: dict[str, Any]) -> RegionSample:
        """Put the sample of a record together."""


def messages_from_turns(turns: Any, count: int, marker: re.Pattern[str], first: int, ending: str = "") -> list[Message]:
    """LLaVA's turns `{"from": "human" or "gpt", "value": text}` as messages; regions that no turn speaks of come first.

    Args:
        turns: the list; "<image>" in its texts falls away, since the picture always comes first.
        count: of regions.
        marker: stands for a region in a text; its first group is the number.
        first: number of the first region.
        ending: said at the end of each question.

    Raises:
        InputError: no turns, an unknown role, a turn that is empty or out of order, a marker without a region.
    """
    spoken = []
    if not isinstance(turns, list) or not turns:
        raise InputError("conversations: is empty, or not a list of turns")
    for index, turn in enumerate(turns):
        try:
            role = _role(turn["from"])
            spoken.append((role, split_markers(_without_image(turn["value"], role, ending), marker, first, count)))
        except InputError as error:
            raise InputError(f"conversations[{index}]: {error}") from error
    return build_messages(spoken, count)


def build_messages(spoken: Sequence[tuple[str, Sequence[Piece]]], count: int) -> list[Message]:
    """Messages of a dialogue about `count` regions, called by their places.

    Args:
        spoken: role ("user", "assistant" or "system") and what is said: text, and indices of regions.
        count: of regions.

    Raises:
        InputError: a turn out of order or empty.
    """
    dialogue = Dialogue(fixed=True)
    expected = "user"
    for index, (role, pieces) in enumerate(spoken):
        if not pieces:
            raise InputError(f"conversations[{index}]: is empty")
        if role == "system" and index == 0:
            dialogue.system("".join(map(str, pieces)))
            continue
        if role != expected:
            raise InputError(f"conversations[{index}]: it is the {expected}'s turn, but the {role} speaks")
        dialogue.user(pieces) if role == "user" else dialogue.assistant(pieces)
        expected = "assistant" if role == "user" else "user"
    if expected == "assistant" or len(dialogue.messages) < 2:
        raise InputError("conversations: the last question has no answer")
    dialogue.introduce(range(count), int(dialogue.messages[0]["role"] == "system"))
    return dialogue.messages


def _role(name: Any) -> str:
    if name not in ROLES:
        raise InputError(f"unknown role {name!r}; known are {', '.join(ROLES)}")
    return ROLES[name]


def _without_image(text: str, role: str, ending: str) -> str:
    text = re.sub(r"\s*<image>\s*", "\n", text).strip()
    return f"{text} {ending}" if ending and role == "user" and not text.endswith(ending) else text


def _is_list(path: Path) -> bool:
    """Whether a file is one JSON list; lines begin with a brace."""
    with open(path, "rb") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def linked(indices: Sequence[int]) -> list[Piece]:
    """ " (region 1, region 2)": what a phrase stands for."""
    pieces: list[Piece] = []
    for index in indices:
        pieces += [", " if pieces else " (", index]
    return [*pieces, ")"] if pieces else []
