"""Does a caption say what is true: the name, a colour, and of drawn shapes also texture and size."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tap_llm.data.colours import words_in
from tap_llm.data.shapes import SHAPE_NAMES

Said = dict[str, tuple[str, ...]]

_TEXTURES = {
    "striped": "striped", "stripes": "striped", "dotted": "dotted", "dots": "dotted",
    "checked": "checked", "checks": "checked", "solid": "solid",
}  # fmt: skip
_SIZES = {"small": "small", "little": "small", "medium": "medium", "large": "large", "big": "large"}
# Where a caption turns from the thing itself to its place, or to other things.
_ELSEWHERE = re.compile(r",| (?:behind|in|at|on|near|next to|to the|above|below|partly|half|beside|under|over)\b")


def says_name(caption: str, name: str) -> bool:
    """Whether the caption holds the name letter by letter, as whole words; case does not count."""
    return re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", caption.lower()) is not None


def says_colour(caption: str, colours: Sequence[str]) -> bool:
    """Whether the caption, wherever, holds one of the colour words; "light blue" is not "blue"."""
    return bool(set(words_in(_plain(caption))) & set(colours))


def said_of_shape(caption: str) -> Said:
    """What a caption says of its subject: "shape", "colour", "texture" and "size", each as words found.

    Only what comes before the place and before other things counts: of "a red star behind a blue ring" that is
    "a red star".
    """
    subject = _plain(_ELSEWHERE.split(f" {caption.lower()}")[0])
    words = subject.split()
    return {
        "shape": tuple(word for word in words if word in SHAPE_NAMES),
        "colour": words_in(subject),
        "texture": tuple(_TEXTURES[word] for word in words if word in _TEXTURES),
        "size": tuple(_SIZES[word] for word in words if word in _SIZES),
    }


def judge_shape(caption: str, truth: dict[str, str], colours: Sequence[str]) -> dict[str, bool | None]:
    """Whether what a caption says of a drawn shape is true.

    Args:
        caption: any text.
        truth: `shape`, `texture`, and `size` where sizes have words.
        colours: of the shape; two where it has two.

    Returns:
        By attribute ("shape", "colour", "texture", "size") True, False, or None where the caption says nothing about
        it, or the truth is not known. All words that are said must be true.
    """
    right = {key: {truth[key]} for key in ("shape", "texture", "size") if key in truth} | {"colour": set(colours)}
    said = said_of_shape(caption)
    return {key: set(said[key]) <= right[key] if said[key] and right.get(key) else None for key in said}


def _plain(text: str) -> str:
    """Lower-case without punctuation, which would hide words from `words_in`."""
    return re.sub(r"[^\w\s'’-]", " ", text.lower())
