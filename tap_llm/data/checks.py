"""What can be wrong with a sample; one message per fault, the field in front."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..conversations import read_conversation
from ..errors import InputError
from ..regions import parse_region, read_mask
from .messages import question_messages

if TYPE_CHECKING:
    from .samples import RegionSample

REGION_EXTRAS = ("id", "category", "captions", "attributes", "type")
_EXTRA_TYPES = (
    ("id", (int, str), "a number or text"),
    ("category", str, "text"),
    ("caption", str, "text"),
    ("attributes", Mapping, "a dict"),
)
_MESSAGE, _RECORD = {"role", "content"}, {"question", "answer"}


def type_problems(sample: RegionSample) -> Iterator[str]:
    """Fields and keys of regions whose values are of a wrong type; quick, nothing is read."""
    for name in ("id", "source", "license"):
        if not isinstance(getattr(sample, name), str):
            yield f"{name}: expected text, got {_kind(getattr(sample, name))}"
    yield from _list_problems("captions", sample.captions, str)
    yield from _list_problems("conversations", sample.conversations, Mapping)
    yield from _list_problems("regions", sample.regions, Mapping)
    for index, region in enumerate(sample.regions):
        yield from (f"{region_name(index, region)}: {problem}" for problem in _region_type_problems(region))


def sample_problems(sample: RegionSample) -> Iterator[str]:
    """All faults of a sample: a broken picture, impossible regions, empty texts, references to regions it lacks."""
    yield from _empty("captions", sample.captions)
    try:
        sample.load_image()
    except InputError as error:
        yield str(error)
    seen: set[str] = set()
    for index, region in enumerate(sample.regions):
        yield from (f"{region_name(index, region)}: {problem}" for problem in _region_problems(region, sample.size))
        key = json.dumps(region.get("id"))
        if key != "null" and key in seen:
            yield f"{region_name(index, region)}: another region has the same id"
        seen.add(key)
    yield from _talk_problems(sample)


def region_name(index: int, region: Mapping[str, Any]) -> str:
    """How messages call a region: its place, and its id where it has one."""
    number = region.get("id")
    return f"regions[{index}]" if number is None else f"regions[{index}] (id {number})"


def named(name: str, problem: object) -> str:
    """`name: problem`, the name once."""
    text = str(problem)
    return text if text.startswith((f"{name}:", f"{name} ")) else f"{name}: {text}"


def _list_problems(name: str, values: Any, kind: type) -> Iterator[str]:
    expected = "texts" if kind is str else "dicts"
    if not isinstance(values, (list, tuple)):
        yield f"{name}: expected a list of {expected}, got {_kind(values)}"
        return
    for index, value in enumerate(values):
        if not isinstance(value, kind):
            yield f"{name}[{index}]: expected one of the {expected}, got {_kind(value)}"


def _region_type_problems(region: Mapping[str, Any]) -> Iterator[str]:
    if region.get("captions") is not None:
        yield from _list_problems("captions", region["captions"], str)
    for key, kind, expected in _EXTRA_TYPES:
        if region.get(key) is not None and not isinstance(region[key], kind):
            yield f"{key}: expected {expected}, got {_kind(region[key])}"


def _region_problems(region: Mapping[str, Any], size: tuple[int, int] | None) -> Iterator[str]:
    yield from _empty("captions", region.get("captions") or ())
    yield from _empty("category", [region.get("category")])
    if size is not None:  # without a picture, places cannot be judged
        yield from _form_problems(region, size)


def _form_problems(region: Mapping[str, Any], size: tuple[int, int]) -> Iterator[str]:
    """A mask and the rest are judged apart: as annotations they may stand together, as prompts they may not."""
    prompt = {key: value for key, value in region.items() if key not in (*REGION_EXTRAS, "mask")}
    has_mask = region.get("mask") is not None
    try:
        if has_mask:
            read_mask(region["mask"], *size)
        if prompt or not has_mask:
            parse_region(prompt, *size)
    except InputError as error:
        yield str(error)


def _talk_problems(sample: RegionSample) -> Iterator[str]:
    """What training would refuse in its conversation: a list of chat messages, or of questions with answers."""
    turns, regions = sample.conversations, sample.regions
    problems = [f"conversations[{index}]: {text}" for index, turn in enumerate(turns) for text in _turn_problems(turn)]
    chat = [turn.keys() >= _MESSAGE for turn in turns]
    if problems:
        yield from problems
    elif any(chat) and not all(chat):
        yield f"conversations[{chat.index(not chat[0])}]: messages and questions with answers are mixed"
    elif any(chat):
        yield from _chat_problems(turns, regions, sample.size)
    else:
        for index, record in enumerate(turns):
            yield from (f"conversations[{index}]: {text}" for text in _record_problems(record, len(regions)))


def _turn_problems(turn: Mapping[str, Any]) -> Iterator[str]:
    """Keys and types of one chat message, or of one question with its answer."""
    if not any(pair <= turn.keys() for pair in (_MESSAGE, _RECORD)):
        keys = ", ".join(map(str, turn))
        yield f'expected {{"role", "content"}} or {{"question", "answer"}}, got keys {keys}'
        return
    for key in ("role", "question", "answer", "content"):
        value = turn.get(key, "none")
        if not isinstance(value, (str, list, tuple) if key == "content" else str):
            yield f"{key}: expected text{' or a list of parts' * (key == 'content')}, got {_kind(value)}"
        yield from _empty(key, [value])


def _chat_problems(
    turns: Sequence[Mapping[str, Any]], regions: Sequence[Mapping[str, Any]], size: tuple[int, int] | None
) -> Iterator[str]:
    """The first fault of a chat, and impossible regions that its messages hold themselves."""
    given = [{"row": row} for row in range(len(regions))]
    try:
        chat = read_conversation(turns, images=["the picture"], regions=given, allow_unused_regions=True)
    except InputError as error:
        yield f"conversations: {error}"
        return
    if not any(turn["role"] == "assistant" for turn in turns):
        yield "conversations: no message of the assistant, so there is nothing to learn"
    inline = [region for region in chat.regions if "row" not in region]
    if size is not None:
        yield from (f"conversations: {problem}" for region in inline for problem in _form_problems(region, size))


def _record_problems(record: Mapping[str, Any], num_regions: int) -> Iterator[str]:
    """References of a question and its answer to regions that the sample lacks."""
    listed = record.get("regions") or []
    for index in listed if isinstance(listed, (list, tuple)) else [listed]:
        if not isinstance(index, int) or not 0 <= index < num_regions:
            yield f"region index {index!r}: there are {num_regions} regions, counted from 0"
            return
    try:
        question_messages(record)
    except InputError as error:
        yield str(error)


def _empty(name: str, texts: Iterable[Any]) -> Iterator[str]:
    if any(isinstance(text, str) and not text.strip() for text in texts):
        yield f"{name}: is empty"


def _kind(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
