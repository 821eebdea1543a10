"""Messages with content parts: checked, and turned into plain messages with a mark for each image and region."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError
from .regions import Region

ROLES = ("system", "user", "assistant", "tool")
_IMAGE_KEYS = ("image", "path")
_NOT_THE_FORM = ("type", "index", "image")
_PRIVATE_USE = range(0xE000, 0xF8FF)  # code points without a meaning: one that the text lacks becomes the mark


@dataclass(eq=False)
class Conversation:
    """A checked conversation.

    Attributes:
        messages: role and plain text each; `mark`, a number and `mark` stand for the parts.
        mark: a character that the text does not contain.
        parts: what part number i is: region r as r, image k as -1 - k.
        images: in order of appearance.
        regions: rows, in order of first mention.
        region_images: image of each row.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    mark: str = ""
    parts: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    region_images: list[int] = field(default_factory=list)

    @property
    def pattern(self) -> re.Pattern[str]:
        """Finds the marks; group 1 is the number of the part."""
        return re.compile(f"{self.mark}(\\d+){self.mark}")


def read_conversation(
    messages: Any,
    images: Sequence[Any] | None = None,
    regions: Sequence[Region] | None = None,
    allow_unused_regions: bool = False,
) -> Conversation:
    """Check one conversation.

    Args:
        messages: chat messages; content is text or a list of parts.
        images: for image parts without a picture of their own, in order; without any image part they stand before
            the first user turn's text.
        regions: what parts such as `{"type": "region", "index": 0}` (or, in order, `{"type": "region"}`) point at.
        allow_unused_regions: regions to which no part points are left out instead of refused.

    Raises:
        InputError: see the messages below; where it was found is in front.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("the conversation is empty: give at least one message")
    contents = [_contents(message, index) for index, message in enumerate(messages)]
    contents = _with_images(messages, contents, images)
    reader = _Reader(_free_mark(contents), list(images or []), list(regions or []))
    for index, (message, parts) in enumerate(zip(messages, contents, strict=True)):
        try:
            text = "".join(reader.read(part) for part in parts)
        except InputError as error:
            raise type(error)(f"message {index}: {error}") from error
        reader.result.messages.append({**message, "content": text})
    reader.check_all_used(allow_unused_regions)
    return reader.result


def _contents(message: Any, index: int) -> list[dict[str, Any]]:
    """A message's content as a list of parts."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f'message {index}: expected {{"role": ..., "content": ...}}, got {str(message)[:80]}')
    if message["role"] not in ROLES:
        raise InputError(f"message {index}: unknown role {message['role']!r}; roles are {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("reasoning_content")):
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        raise InputError(f'message {index}: "content" must be text or a list of parts, got {str(content)[:80]}')
    return [dict(part) for part in content]


def _checked_text(text: str) -> str:
    """The text, if it is Unicode: bytes that Python could not read, and escapes such as "\\ud83d", leave halves."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not valid Unicode: character {error.start} is half of one: rewrite it") from None
    return text


def _with_images(messages: Any, contents: list[list[dict[str, Any]]], images: Any) -> list[list[dict[str, Any]]]:
    """Image parts for images that were given beside messages without any."""
    if not images or any(part.get("type") == "image" for parts in contents for part in parts):
        return contents
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    added: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    return [added + parts if index == first else parts for index, parts in enumerate(contents)]


def _free_mark(contents: list[list[dict[str, Any]]]) -> str:
    text = "".join(str(part.get("text", "")) for parts in contents for part in parts)
    return next(mark for mark in map(chr, _PRIVATE_USE) if mark not in text)


class _Reader:
    """Walks through the parts of a conversation in order, and collects what they name."""

    def __init__(self, mark: str, images: list[Any], regions: list[Region]) -> None:
        self.result = Conversation(mark=mark)
        self.given_images, self.given_regions = images, regions
        self.taken_images = 0
        self.rows: dict[int, int] = {}  # row of each region of the list

    def read(self, part: dict[str, Any]) -> str:
        """The part as text: a mark for an image or a region."""
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise InputError('a text part needs "text"')
            return _checked_text(part["text"])
        if kind not in ("image", "region"):
            raise InputError(f'unknown part type {kind!r}; types are "text", "image" and "region"')
        self.result.parts.append(self._image(part) if kind == "image" else self._region(part))
        return f"{self.result.mark}{len(self.result.parts) - 1}{self.result.mark}"

    def _image(self, part: dict[str, Any]) -> int:
        picture = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
        if picture is None and part.keys() & {"url", "base64"}:
            raise InputError('images are not fetched here: load the picture and give it as "image"')
        if picture is None:
            if self.taken_images == len(self.given_images):
                raise InputError(
                    f'more image parts than images: {len(self.given_images)} given; a part may hold its own "image"'
                )
            picture = self.given_images[self.taken_images]
            self.taken_images += 1
        self.result.images.append(picture)
        return -len(self.result.images)

    def _region(self, part: dict[str, Any]) -> int:
        form = {key: value for key, value in part.items() if key not in _NOT_THE_FORM and value is not None}
        if form and "index" in part:
            raise InputError('a region part has either an "index" or a form such as "box", not both')
        image = self._image_of(part)
        if form:
            return self._add(form, image)
        index = part.get("index", len(self.rows))
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self.given_regions):
            raise InputError(
                f"region part {index} has no region: {len(self.given_regions)} given beside the messages; "
                'a part may hold its own "box", "points", "sketch" or "mask"'
            )
        if index not in self.rows:
            region = self.given_regions[index]
            self.rows[index] = self._add({k: v for k, v in region.items() if k not in _NOT_THE_FORM}, image)
        return self.rows[index]

    def _image_of(self, part: dict[str, Any]) -> int:
        count = len(self.result.images)
        if count == 0:
            raise InputError("a region before any image: put an image part in front of it, or give the image beside")
        image = part.get("image", count - 1)
        if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < count:
            raise InputError(f'"image": {image!r} of a region must number an image before it, 0 to {count - 1}')
        return image

    def _add(self, region: Region, image: int) -> int:
        self.result.regions.append(region)
        self.result.region_images.append(image)
        return len(self.result.regions) - 1

    def check_all_used(self, allow_unused_regions: bool) -> None:
        """Nothing given beside the messages may be left over."""
        if self.taken_images < len(self.given_images):
            raise InputError(f"{len(self.given_images)} images given, but {self.taken_images} image parts need one")
        unused = sorted(set(range(len(self.given_regions))) - self.rows.keys())
        if unused and not allow_unused_regions:
            raise InputError(
                f"{len(self.given_regions)} regions given, but region parts point at {len(self.rows)} of them "
                f"(never at region {unused[0]}): leave it out, or add a part"
            )


__all__ = ["ROLES", "Conversation", "read_conversation"]
