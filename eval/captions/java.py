"""Official caption metrics: pycocoevalcap 1.2, whose tokenizer, METEOR and SPICE run in Java.

Its scorers are called one by one, never its `COCOEvalCap`, which also downloads another tokenizer. Java runs below a
worker process with a time limit, so that a Java that hangs, crashes or is not allowed to start costs its own metric.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Tokens = Mapping[str, Sequence[str]]  # by key texts whose words are separated by spaces
Part = tuple[Tokens, Tokens]  # captions, one for each key, and references

SECONDS, SECONDS_PER_TEXT = 900.0, 0.02  # how long Java may take; METEOR alone loads for minutes on a busy machine
_WORKER = Path(__file__).with_name("java_worker.py")


def missing_reason() -> str | None:
    """Why official metrics cannot be computed here; None where they can."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        return "pycocoevalcap is not installed: pip install 'tap-llm[eval-java]'"
    return None if shutil.which("java") else "there is no Java on this machine"


def tokenize(texts: Sequence[str]) -> list[str]:
    """Words of texts, separated by spaces.

    Raises:
        RuntimeError: Java fails.
    """
    # An empty line could shift all that follow; a lone full stop is dropped by the tokenizer.
    lines = [" ".join(text.split()) or "." for text in texts]
    return list(_ask("tokenize", lines, len(lines)))


def meteor(parts: Sequence[Part]) -> list[float]:
    """METEOR of each part; Java starts once.

    Raises:
        RuntimeError: Java fails.
    """
    return list(_ask("meteor", parts, _size(parts)))


def spice(parts: Sequence[Part]) -> list[float]:
    """SPICE of each part; at its first use it downloads a parser, and it wants 8 GB of memory.

    Raises:
        RuntimeError: Java or the download fails.
    """
    return list(_ask("spice", parts, 50 * _size(parts)))


def ngram_scores(captions: Tokens, references: Tokens) -> tuple[dict[str, float], list[float]]:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of a part, and CIDEr-D of each of its captions; no Java."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth, said = dict(references), dict(captions)
    bleus, _ = Bleu(4).compute_score(truth, said, verbose=0)
    rouge, _ = Rouge().compute_score(truth, said)
    cider, each = Cider().compute_score(truth, said)
    scores = {f"bleu_{n}": float(value) for n, value in enumerate(bleus, 1)}
    return {**scores, "rouge_l": float(rouge), "cider_d": float(cider)}, [float(value) for value in each]


def _size(parts: Sequence[Part]) -> int:
    return sum(1 + len(group) for _, references in parts for group in references.values())


def _ask(task: str, question: Any, texts: int) -> Any:
    """Have the worker do it.

    Raises:
        RuntimeError: it fails, or takes too long.
    """
    limit = SECONDS + SECONDS_PER_TEXT * texts
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder) / name for name in ("question.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(question), encoding="utf-8")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(_WORKER), task, str(asked), str(answered)],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{task}: Java gave no answer within {limit:.0f} seconds") from None
            finally:
                _end(process)
        if not answered.is_file():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-2:]
            raise RuntimeError(f"{task} failed: {'; '.join(said) or f'exit status {process.returncode}'}")
        return json.loads(answered.read_text(encoding="utf-8"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Also what the worker started, which would live on without it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # not on Windows; gone already
        process.kill()
    process.wait()
