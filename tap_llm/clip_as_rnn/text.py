"""Text embeddings for f and g: from a CLIP model with a memory of what it has seen, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from ..errors import InputError

_MAX_REMEMBERED = 100_000  # texts; then the memory starts afresh


class TextEncoder:
    """Unit text embeddings of a CLIP model; no text is embedded twice.

    Args:
        model: a `CLIPModel`.
        tokenizer: its tokenizer; None: only texts embedded elsewhere can be used.
        batch_size: texts embedded at once.
    """

    def __init__(self, model: Any, tokenizer: Any = None, batch_size: int = 128) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._known: dict[str, Tensor] = {}
        self._is_long: dict[str, bool] = {}

    @property
    def limit(self) -> int:
        """Tokens that the model reads of a text."""
        return self.model.config.text_config.max_position_embeddings

    def forget(self) -> None:
        """Empty the memory."""
        self._known.clear()

    def embed(self, queries: Sequence[str], templates: Sequence[str], progress: bool = False) -> Tensor:
        """Embed queries in templates; what the model does not read of long ones (`too_long`) is cut off.

        Args:
            queries: N texts.
            templates: K texts with `{}` in place of the query.
            progress: show a bar.

        Returns:
            (K, N, E) float32 on the model's device, unit vectors.

        Raises:
            InputError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("texts need the CLIP model's tokenizer: pass it, or give text_embeddings")
        texts = [template.replace("{}", query) for template in templates for query in queries]
        self._learn(texts, progress)
        width = self.model.config.projection_dim
        rows = torch.stack([self._known[text] for text in texts]) if texts else torch.zeros(0, width)
        return rows.reshape(len(templates), len(queries), width).to(self.model.device)

    def embed_mean(self, queries: Sequence[str], templates: Sequence[str], progress: bool = False) -> Tensor:
        """(N, E) unit vectors: mean over the templates of [`TextEncoder.embed`]."""
        return normalize(self.embed(queries, templates, progress).mean(dim=0), dim=-1)

    def _learn(self, texts: Sequence[str], progress: bool) -> None:
        if len(self._known) > _MAX_REMEMBERED:
            self._known.clear()
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        starts = range(0, len(new), self.batch_size)
        for start in tqdm(starts, desc="texts", leave=False, disable=not progress):
            batch = new[start : start + self.batch_size]
            self._known.update(zip(batch, self._features(batch).cpu(), strict=True))

    @torch.no_grad()
    def _features(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
        inputs = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        features = self.model.get_text_features(**inputs)
        features = features if isinstance(features, Tensor) else features.pooler_output
        return normalize(features.float(), dim=-1)

    def too_long(self, queries: Sequence[str], templates: Sequence[str]) -> list[str]:
        """Those of the queries that do not fit into what the model reads, in the longest of the templates."""
        template = max(templates, key=len)
        new = [query for query in dict.fromkeys(queries) if query not in self._is_long]
        if new and self.tokenizer is not None:
            rows = self.tokenizer([template.replace("{}", query) for query in new], verbose=False)["input_ids"]
            self._is_long.update({query: len(row) > self.limit for query, row in zip(new, rows, strict=True)})
        return [query for query in dict.fromkeys(queries) if self._is_long.get(query)]


def shorten(text: str, length: int = 60) -> str:
    """A text for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


@dataclass(eq=False)
class TextEmbeddings:
    """Texts embedded by the user: N queries and B background words; they need not be unit vectors.

    Attributes:
        queries: (N, E) of f.
        background: (B, E) of f; None: no background words.
        g_queries: (K, N, E') of g, one row of texts per template, or (N, E') without templates; None: `queries`.
        g_background: (K, B, E') of g, needed for `CarConfig.g_background` only.
        first_step: (N, E) of f, needed for `Compat.first_step_raw` only.
    """

    queries: Tensor
    background: Tensor | None = None
    g_queries: Tensor | None = None
    g_background: Tensor | None = None
    first_step: Tensor | None = None

    def prepared(self, count: int, width_f: int, width_g: int, device: torch.device | str) -> PassTexts:
        """Checked, as float32 unit vectors on a device.

        Args:
            count: N, the number of queries.
            width_f: E.
            width_g: E'.
            device: where to.

        Raises:
            InputError: other shapes, or values that are not finite.
        """
        g = self.queries if self.g_queries is None else self.g_queries
        g = g[None] if g.ndim == 2 else g
        background = self.queries[:0] if self.background is None else self.background
        first = self.queries if self.first_step is None else self.first_step
        g_shape = (len(g), len(background), width_g)
        return PassTexts(
            f=_unit("queries", self.queries, (count, width_f), device),
            f_first=_unit("first_step", first, (count, width_f), device),
            f_background=_unit("background", background, (len(background), width_f), device),
            g=_unit("g_queries", g, (len(g), count, width_g), device),
            g_background=None
            if self.g_background is None
            else _unit("g_background", self.g_background, g_shape, device),
        )


def _unit(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise InputError(f"text_embeddings: {name} must be of shape {shape}, got {tuple(tensor.shape)}")
    values = tensor.detach().clone().to(device, torch.float32)  # a copy: inference tensors cannot be differentiated
    if not torch.isfinite(values).all():
        raise InputError(f"text_embeddings: {name} contains NaN or infinite values")
    return normalize(values, dim=-1)


@dataclass(eq=False)
class PassTexts:
    """Unit embeddings of the N queries of one pass, float32, on the model's device.

    Attributes:
        f: (N, E).
        f_first: (N, E), in the first step.
        f_background: (B, E).
        g: (K, N, E').
        g_background: (K, B, E'), or None.
    """

    f: Tensor
    f_first: Tensor
    f_background: Tensor
    g: Tensor
    g_background: Tensor | None

    def of_pass(self, ids: Sequence[int], rivals: Sequence[int] | None = None) -> PassTexts:
        """Those of the queries `ids`; with `rivals`, these queries are the background."""
        rows = list(ids)
        background, g_background = self.f_background, self.g_background
        if rivals is not None:
            background = self.f[list(rivals)]
            g_background = None if g_background is None else self.g[:, list(rivals)]
        return PassTexts(self.f[rows], self.f_first[rows], background, self.g[:, rows], g_background)


__all__ = ["PassTexts", "TextEmbeddings", "TextEncoder", "shorten"]
