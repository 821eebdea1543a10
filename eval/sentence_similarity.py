"""How near two names are in meaning: cosine of sentence embeddings, of any encoder that Transformers can load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tap_llm.errors import InputError
from tap_llm.loading import parse_device

_HOME = "sentence-transformers"  # of names without an organisation, such as all-MiniLM-L6-v2
_MAX_TOKENS = 256


class SentenceEncoder:
    """Mean over the tokens of a text, padding left out, then length 1, as sentence-transformers' MiniLM is used.

    Args:
        model: an encoder with `last_hidden_state`, in eval mode.
        tokenizer: its own, with a padding token.
        name: what results call it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @classmethod
    def from_pretrained(cls, name: str, device: str | None = None) -> Self:
        """Load an encoder.

        Args:
            name: a folder, a hub id, or the bare name of a model of sentence-transformers.
            device: the CPU by default; the texts are short.

        Raises:
            InputError: it cannot be loaded.
        """
        from transformers import AutoModel, AutoTokenizer

        source = name if Path(name).is_dir() or "/" in name else f"{_HOME}/{name}"
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModel.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
        except Exception as error:  # missing and damaged files surface as nearly any exception type
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"the embedding model {name} cannot be loaded: {reason}") from error
        if tokenizer.pad_token is None:
            raise InputError(f"the embedding model {name} cannot be used: its tokenizer has no padding token")
        return cls(model.eval().to(parse_device(device) or "cpu"), tokenizer, Path(name).name)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """(N, D) float32 embeddings of N texts, on the CPU. Equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = [self._batch(distinct[start : start + batch_size]) for start in range(0, len(distinct), batch_size)]
        place = {text: row for row, text in enumerate(distinct)}
        return torch.cat(rows)[[place[text] for text in texts]] if rows else torch.zeros(0, 0)

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Cosine of each of N texts with its partner."""
        both = self.encode([*first, *second])
        return (both[: len(first)] * both[len(first) :]).sum(1).tolist()

    def _batch(self, texts: list[str]) -> Tensor:
        limit = min(_MAX_TOKENS, self.tokenizer.model_max_length or _MAX_TOKENS)
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        hidden = self.model(**inputs).last_hidden_state.float()
        inside = inputs["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * inside).sum(1) / inside.sum(1).clamp(min=1)
        return normalize(mean, dim=1).cpu()
