"""Checks the queries of a call, and says what its user should know."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ..errors import InputError
from .configuration_car import CarConfig
from .text import shorten

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def checked_queries(queries: Sequence[str]) -> list[str]:
    """The queries as a list.

    Raises:
        InputError: one text in place of a list, no query, or one that is no text or blank.
    """
    if isinstance(queries, str) or not isinstance(queries, Sequence):
        raise InputError(f"queries must be a list of texts such as ['a dog', 'the red kite'], got {queries!r}")
    if not queries:
        raise InputError("there is no query: give at least one text to look for")
    for index, query in enumerate(queries):
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"query {index} must be a text that is not blank, got {query!r}")
    return list(queries)


def free_background(config: CarConfig, queries: Sequence[str]) -> tuple[list[str], list[str]]:
    """Background words that no query asks for, and those left out because one does."""
    if config.compat.background_keeps_queries:
        return list(config.background), []
    asked = {_key(query) for query in queries}
    free = [word for word in config.background if _key(word) not in asked]
    return free, [word for word in config.background if _key(word) in asked]


def remarks(queries: Sequence[str], config: CarConfig, left_out: Sequence[str]) -> list[str]:
    """What makes the scores of these queries special, one sentence each."""
    notes = []
    if left_out:
        notes.append(f"left out of the background, as they are asked for: {', '.join(left_out)}")
    if len(queries) == 1 and not config.g_background and config.min_similarity is None:
        notes.append(
            "a single query has nothing to compete with and always scores 1: ask for other things too, "
            "or set g_background=True"
        )
    doubles = [query for query, count in Counter(map(_key, queries)).items() if count > 1]
    if doubles:
        places = ", ".join(str(index) for index, query in enumerate(queries) if _key(query) == doubles[0])
        notes.append(
            f"{shorten(doubles[0])!r} is asked for more than once (queries {places}): equal queries share their "
            "score, and the first takes the pixels"
        )
    if any(_SIDES.search(query) for query in queries):
        notes.append("CLIP confuses left and right: do not rely on them")
    return notes


def _key(text: str) -> str:
    return text.strip().casefold()


__all__ = ["checked_queries", "free_background", "remarks"]
