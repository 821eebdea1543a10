"""What can be wrong with a sample, found by reading all of it; one message per fault, the field in front."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..regions import _read_mask, parse_region

if TYPE_CHECKING:
    from .samples import RegionSample

REGION_EXTRAS = ("id", "category", "captions", "attributes", "type")


def sample_problems(sample: RegionSample) -> Iterator[str]:
    """All faults of a sample: wrong types, a broken picture, impossible regions, empty texts, wrong references."""
    for name in ("id", "source", "license"):
        if not isinstance(getattr(sample, name), str):
            yield f"{name}: expected text, got {_kind(getattr(sample, name))}"
    yield from _text_problems("captions", sample.captions)
    try:
        sample.load_image()
    except InputError as error:
        yield str(error)
    if not isinstance(sample.regions, (list, tuple)):
        yield f"regions: expected a list of regions, got {_kind(sample.regions)}"
        return
    yield from _list_problems(sample.regions, sample.size)
    yield from _conversation_problems(sample.conversations, len(sample.regions))


def region_name(index: int, region: Any) -> str:
    """How messages call a region: its place, and its id where it has one."""
    number = region.get("id") if isinstance(region, Mapping) else None
    return f"regions[{index}]" if number is None else f"regions[{index}] (id {number})"


def named(name: str, problem: object) -> str:
    """`name: problem`, the name once."""
    text = str(problem)
    return text if text.startswith((f"{name}:", f"{name} ")) else f"{name}: {text}"


def _list_problems(regions: Any, size: tuple[int, int] | None) -> Iterator[str]:
    seen: set[str] = set()
    for index, region in enumerate(regions):
        name = region_name(index, region)
        yield from (f"{name}: {problem}" for problem in _region_problems(region, size))
        key = json.dumps(region.get("id"), default=repr) if isinstance(region, Mapping) else "null"
        if key != "null" and key in seen:
            yield f"{name}: another region has the same id"
        seen.add(key)


def _region_problems(region: Any, size: tuple[int, int] | None) -> Iterator[str]:
    if not isinstance(region, Mapping):
        yield f'expected a dict such as {{"box": [x0, y0, x1, y1]}}, got {_kind(region)}'
        return
    if region.get("captions") is not None:
        yield from _text_problems("captions", region["captions"])
    if region.get("category") is not None:
        yield from _text_problems("category", [region["category"]])
    if not isinstance(region.get("id"), (int, str, type(None))):
        yield f"id: expected a number or text, got {_kind(region['id'])}"
    if not isinstance(region.get("attributes"), (Mapping, type(None))):
        yield f"attributes: expected a dict, got {_kind(region['attributes'])}"
    if size is not None:  # without a picture, places cannot be judged
        yield from _form_problems(region, size)


def _form_problems(region: Mapping[str, Any], size: tuple[int, int]) -> Iterator[str]:
    """A mask and the rest are judged apart: as annotations they may stand together, as prompts they may not."""
    prompt = {key: value for key, value in region.items() if key not in (*REGION_EXTRAS, "mask")}
    has_mask = region.get("mask") is not None
    try:
        if has_mask:
            _read_mask(region["mask"], *size)
        if prompt or not has_mask:
            parse_region(prompt, *size)
    except InputError as error:
        yield str(error)


def _conversation_problems(conversations: Any, num_regions: int) -> Iterator[str]:
    if not isinstance(conversations, (list, tuple)):
        yield f"conversations: expected a list of messages or records, got {_kind(conversations)}"
        return
    for index, turn in enumerate(conversations):
        yield from (f"conversations[{index}]: {problem}" for problem in _turn_problems(turn, num_regions))


def _turn_problems(turn: Any, num_regions: int) -> Iterator[str]:
    """What is wrong with one chat message, or one question with its answer."""
    if not isinstance(turn, Mapping) or not any(pair <= turn.keys() for pair in _TURN_KEYS):
        got = f"keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else _kind(turn)
        yield f'expected {{"role", "content"}} or {{"question", "answer"}}, got {got}'
        return
    for key in ("role", "question", "answer"):
        if key in turn:
            yield from _text_problems(key, [turn[key]])
    content = turn.get("content", [])
    if isinstance(content, str):
        yield from _text_problems("content", [content])
    elif not isinstance(content, (list, tuple)):
        yield f"content: expected text or a list of parts, got {_kind(content)}"
    for index in _used_regions(turn):
        if not isinstance(index, int) or not 0 <= index < num_regions:
            yield f"region index {index!r}: there are {num_regions} regions, counted from 0"


_TURN_KEYS = ({"role", "content"}, {"question", "answer"})


def _used_regions(turn: Mapping[str, Any]) -> list[Any]:
    """Indices of regions that a turn speaks of."""
    listed = turn.get("regions") or []
    content = turn.get("content")
    parts = content if isinstance(content, (list, tuple)) else []
    inline = [part.get("index") for part in parts if isinstance(part, Mapping) and part.get("type") == "region"]
    return [*(listed if isinstance(listed, (list, tuple)) else [listed]), *inline]


def _text_problems(name: str, texts: Any) -> Iterator[str]:
    if not isinstance(texts, (list, tuple)):
        yield f"{name}: expected a list of texts, got {_kind(texts)}"
        return
    for text in texts:
        if not isinstance(text, str):
            yield f"{name}: expected text, got {_kind(text)}"
        elif not text.strip():
            yield f"{name}: is empty"


def _kind(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
