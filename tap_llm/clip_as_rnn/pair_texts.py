"""The texts of a call, as f and g are asked with them."""

from __future__ import annotations

import warnings
from typing import Any

from .configuration_car import CarConfig
from .notes import free_background, remarks
from .text import TextEmbeddings, TextEncoder, shorten


class PairTexts:
    """Text encoders of f and g; equal models share one, and its memory.

    Args:
        f: encoder of f.
        g: encoder of g; may be the same.
    """

    def __init__(self, f: TextEncoder, g: TextEncoder) -> None:
        self.f, self.g = f, g
        self._warned: set[str] = set()

    def forget(self) -> None:
        """Empty the memories; they fill again by themselves."""
        self.f.forget()
        self.g.forget()

    def prepare(
        self, queries: list[str], given: TextEmbeddings | None, config: CarConfig, progress: bool
    ) -> tuple[TextEmbeddings, list[str]]:
        """Embeddings of queries and background words, unless they are given, and what to know about the queries.

        Raises:
            InputError: there is no tokenizer.
        """
        words, left_out = free_background(config, queries)
        notes = remarks(queries, config, left_out if given is None else [])
        if given is not None:
            return given, notes
        return self._embed(queries, words, config, progress), notes + self._long_queries(queries, config)

    def _embed(self, queries: list[str], words: list[str], config: CarConfig, progress: bool) -> TextEmbeddings:
        optional: dict[str, Any] = {}
        if config.g_background:
            optional["g_background"] = self.g.embed(words, config.g_templates)
        if config.compat.first_step_raw:
            optional["first_step"] = self.f.embed_mean(queries, ("{}",), progress)
        return TextEmbeddings(
            queries=self.f.embed_mean(queries, config.f_templates, progress),
            background=self.f.embed_mean(words, config.f_templates),
            g_queries=self.g.embed(queries, config.g_templates, progress),
            **optional,
        )

    def _long_queries(self, queries: list[str], config: CarConfig) -> list[str]:
        """A note on each query that CLIP does not read to its end; a warning too, the first time."""
        pairs = (self.f, config.f_templates), (self.g, config.g_templates)
        long = {query: encoder.limit for encoder, templates in pairs for query in encoder.too_long(queries, templates)}
        notes = [
            f"the query {shorten(query)!r} is longer than the {limit} tokens that CLIP reads: the rest is ignored"
            for query, limit in long.items()
        ]
        for note in sorted({*notes} - self._warned):
            warnings.warn(note, stacklevel=2)
        self._warned.update(notes)
        return notes


__all__ = ["PairTexts"]
