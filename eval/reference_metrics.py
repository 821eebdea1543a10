"""CIDEr-D and METEOR against reference captions, by the original implementation (pycocoevalcap 1.2, needs Java).

Both sides go through its PTB tokenizer. CIDEr-D takes document frequencies from the references of the very captions
that are judged: values of different sets are not comparable. Its class is called Cider, but computes CIDEr-D.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

METRICS = ("cider_d", "meteor")


def missing_reason() -> str | None:
    """Why these metrics cannot be computed here; None where they can."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        return "pycocoevalcap is not installed: pip install 'tap-llm[eval-java]'"
    return None if shutil.which("java") else "there is no Java on this machine"


class ReferenceMetrics:
    """Starts Java and tokenizes once, then scores any part; each part once, however often it is asked for.

    Args:
        captions: by key.
        references: by key, one or more.

    Raises:
        RuntimeError: Java fails.
    """

    def __init__(self, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
        from pycocoevalcap.meteor.meteor import Meteor

        self._captions = _tokenize({key: [caption] for key, caption in captions.items()})
        self._references = _tokenize({key: references[key] for key in captions})
        self._meteor = Meteor()
        self._scores: dict[tuple[str, ...], dict[str, float]] = {}

    def score(self, keys: Sequence[str]) -> dict[str, float]:
        """CIDEr-D and METEOR of some captions, at least one.

        Raises:
            RuntimeError: Java fails.
        """
        from pycocoevalcap.cider.cider import Cider

        part = tuple(keys)
        if part not in self._scores:
            captions = {key: self._captions[key] for key in part}
            references = {key: self._references[key] for key in part}
            cider, _ = Cider().compute_score(references, captions)
            self._scores[part] = {"cider_d": float(cider), "meteor": self._score_meteor(references, captions)}
        return self._scores[part]

    def _score_meteor(self, references: dict[str, list[str]], captions: dict[str, list[str]]) -> float:
        try:
            return float(self._meteor.compute_score(references, captions)[0])
        except (OSError, ValueError) as error:
            self._meteor.lock.release()  # it still holds its lock, and would wait for it for ever when it is deleted
            raise RuntimeError(f"METEOR failed: {error!r}") from error


def _tokenize(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    records: dict[str, list[dict[str, Any]]] = {
        # An empty line could shift all that follow; a lone full stop is dropped by the tokenizer.
        key: [{"caption": " ".join(text.split()) or "."} for text in group]
        for key, group in texts.items()
    }
    try:
        tokens = PTBTokenizer().tokenize(records)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the PTB tokenizer failed: {error!r}") from error
    if [len(tokens.get(key, ())) for key in records] != [len(group) for group in records.values()]:
        raise RuntimeError("the PTB tokenizer failed: it returns another number of captions")
    return dict(tokens)
