"""Runs the parts of pycocoevalcap that start Java: `java_worker.py TASK QUESTION.json ANSWER.json`.

A program of its own because these classes wait for Java for ever; see `eval.captions.java`, which ends it in time.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def tokenize(lines: list[str]) -> list[str]:
    """Words of lines, by the PTB tokenizer."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = PTBTokenizer().tokenize({"all": [{"caption": line} for line in lines]}) if lines else {}
    words = list(found.get("all", ()))
    if len(words) != len(lines):
        raise RuntimeError(f"{len(words)} lines came back for {len(lines)}")
    return words


def meteor(parts: list[Any]) -> list[float]:
    """METEOR of (captions, references)."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return [float(scorer.compute_score(references, captions)[0]) for captions, references in parts]
    except (OSError, ValueError) as error:  # nothing, or no number, came from Java
        scorer.meteor_p.kill()
        said = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(said[-1] if said else repr(error)) from error


def spice(parts: list[Any]) -> list[float]:
    """SPICE of (captions, references)."""
    from pycocoevalcap.spice.spice import Spice

    return [float(Spice().compute_score(references, captions)[0]) for captions, references in parts]


def main() -> None:
    """See the module's head."""
    task, question, answer = sys.argv[1:]
    tasks = {"tokenize": tokenize, "meteor": meteor, "spice": spice}
    found = tasks[task](json.loads(Path(question).read_text(encoding="utf-8")))
    part = Path(f"{answer}.part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(answer)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a Meteor that has failed would wait for a lock of its own while it is cleared away
