"""The LLM's cache from one turn to the next."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache


class TurnCache:
    """Keeps keys and values of what the LLM has read, as long as a conversation goes on as it began."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []
        self._parts: list[int] = []

    def take(self, ids: list[int], parts: list[int]) -> Any:
        """The cache for a prompt, cut to what the prompt begins with; None where nothing of it can be used.

        It is handed out once: what is generated goes into it, and comes back with [`TurnCache.keep`].

        Args:
            ids: of the whole conversation.
            parts: which images and regions its placeholders stand for, in their order.
        """
        cache, self._cache = self._cache, None
        if cache is None or parts[: len(self._parts)] != self._parts:
            return None
        known = cache.get_seq_length()
        common = _common_length(self._ids[:known], ids[:-1])  # at least one id must be read anew
        if common == known:
            return cache
        try:
            cache.crop(common - known)
        except (RuntimeError, ValueError, AttributeError):  # sliding windows and states that have forgotten the past
            return None
        return cache

    def keep(self, cache: Any, ids: list[int], parts: list[int]) -> None:
        """Remember a cache, and the conversation that it holds (to which more ids may belong than it has read)."""
        grows = isinstance(cache, DynamicCache)  # others have a fixed size
        self._cache, self._ids, self._parts = (cache if grows else None), ids, parts


def _common_length(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


__all__ = ["TurnCache"]
