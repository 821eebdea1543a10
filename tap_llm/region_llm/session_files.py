"""Conversations as JSON: `{"messages": [...]}` as the processor takes them, pictures by their paths."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..regions import region_to_json

Message = dict[str, Any]


def write_messages(messages: list[Message], target: Path) -> None:
    """Write a conversation; pictures that are not from files are written beside it.

    Raises:
        InputError: it cannot be written.
    """
    try:
        record = {"messages": [_message_to_json(message, target, number) for number, message in enumerate(messages)]}
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; choose another place") from error


def read_messages(source: Path) -> list[Message]:
    """Read a conversation; paths of pictures are as seen from here.

    Raises:
        InputError: it is not there, or something else.
    """
    try:
        messages = json.loads(source.read_text(encoding="utf-8"))["messages"]
        for message in messages:
            if message["role"] not in ("system", "user", "assistant") or not isinstance(message["content"], str | list):
                raise ValueError(f"unknown message {message}")
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image":
                    part["path"] = str(source.parent / part["path"])
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source} is not a saved conversation: {type(error).__name__}: {error}") from error
    return messages


def _message_to_json(message: Message, target: Path, number: int) -> Message:
    if isinstance(message["content"], str):
        return message
    parts = [_part_to_json(part, target, f"{number}.{index}") for index, part in enumerate(message["content"])]
    return {**message, "content": parts}


def _part_to_json(part: dict[str, Any], target: Path, place: str) -> dict[str, Any]:
    if part["type"] == "region":
        return region_to_json(part)
    if part["type"] != "image":
        return part
    if "path" not in part:
        name = f"{target.stem}.{place}.png"
        part["image"].save(target.with_name(name))
        return {"type": "image", "path": name}
    whole, folder = Path(part["path"]).resolve(), target.resolve().parent
    return {"type": "image", "path": str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)}


__all__ = ["read_messages", "write_messages"]
