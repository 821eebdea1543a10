"""Ferret-Bench: referring description, referring reasoning and grounded conversation, rated beside reference answers.

    python -m eval.ferret_bench --model runs/chat/final --data refer_desc refer_reason ground_conv --images coco \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4 --judge-key-env OPENAI_API_KEY --out ferret.json

Each of --data is a folder with question.jsonl (40 questions, boxes inside the text as shares of the picture),
context.jsonl (a scene graph in words) and answer.jsonl (reference answers); pictures are COCO's. A box in a question is
given to the model as a region; a question without any is asked about the whole picture. The judge sees no picture but
the scene graph, and rates both answers from 1 to 10: the score is 100 * mean(answers) / mean(references), by folder.
The instructions to the judge are our own words.
Published (description / reasoning, GPT-4): Osprey-Chat 72.2 / 67.8, Ferret-7B 68.7 / 67.3; with GPT-4o, description
only: GAR-8B 64.8. Scores of different judges are not comparable.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch.utils.data import ConcatDataset

from tap_llm.data.messages import Piece
from tap_llm.errors import InputError
from tap_llm.regions import Region

from .base import Prediction, Run
from .cache import as_json
from .command import cli, parse
from .inquiries import Inquiries, Record, read_records
from .judge import Picture
from .judged import chat_parser, evaluate_judged
from .questions import Question
from .rated import RatedQuestions

_SHARE = r"\s*(\d*\.?\d+)\s*"
_BOX = re.compile(rf"\[{_SHARE},{_SHARE},{_SHARE},{_SHARE}\]")
_NOT_CONTEXT = ("id", "question_id", "image")


class FerretBench(RatedQuestions):
    """See the module's head; examples are records of `read_folder`."""

    protocol = "ferret-bench-v1"

    def facts(self, record: Record) -> Prediction:
        known = {key: str(record.get(key, "")) for key in ("context", "reference")}
        return {**known, "question": str(record.get("text", ""))}

    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        for key in ("context", "reference"):
            if not record.get(key):
                raise InputError(f"there is no {key} for this question")
        return [Question(*regions_in(record["text"], image.width, image.height))]

    def seen(self, prediction: Prediction) -> tuple[str, list[Picture]]:
        return f"A picture shows:\n{prediction['context']}\n\n", []


def regions_in(text: str, width: int, height: int) -> tuple[list[Region], list[Piece]]:
    """Boxes [x0, y0, x1, y1] in a text, as shares of the picture, become regions, each box one; or the whole picture.

    Args:
        text: of a question.
        width: of the picture.
        height: of the picture.

    Returns:
        Regions, and the text in pieces.
    """
    regions: list[Region] = []
    pieces: list[Piece] = []
    end = 0
    for match in _BOX.finditer(text):
        shares = [float(share) for share in match.groups()]
        if max(shares) > 1:
            continue
        box = [share * side for share, side in zip(shares, (width, height, width, height), strict=True)]
        if {"box": box} not in regions:
            regions.append({"box": box})
        pieces += [text[end : match.start()], regions.index({"box": box})]
        end = match.end()
    pieces = [piece for piece in (*pieces, text[end:]) if piece != ""]
    return regions or [{"box": [0, 0, width, height]}], pieces


# Files


def read_folder(folder: Path) -> list[Record | InputError]:
    """Questions of a folder, each with `context` and `reference`.

    Contexts belong to questions of the same `question_id`, else of the same `image`; answers to the same `question_id`.

    Raises:
        InputError: a file cannot be read.
        MissingFileError: a file is missing.
    """
    questions, contexts, answers = (
        read_records(folder / f"{name}.jsonl") for name in ("question", "context", "answer")
    )
    known = [record for record in contexts if isinstance(record, dict)]
    by_id = {str(record["question_id"]): record for record in known if "question_id" in record}
    by_image = {str(record["image"]): record for record in known if "image" in record}
    references = {str(r["question_id"]): r for r in answers if isinstance(r, dict) and "question_id" in r}

    def complete(record: Record) -> Record:
        name = str(record.get("question_id"))
        context = by_id.get(name) or by_image.get(str(record.get("image"))) or {}
        reference = str(references.get(name, {}).get("text", ""))
        return {**record, "context": context_text(context), "reference": reference}

    return [record if isinstance(record, InputError) else complete(record) for record in questions]


def context_text(record: Record) -> str:
    """A context's own text; where it is data, one line of JSON for each field."""
    facts = {key: value for key, value in record.items() if key not in _NOT_CONTEXT and value}
    if len(facts) == 1 and isinstance(next(iter(facts.values())), str):
        return str(next(iter(facts.values())))
    return "\n".join(f"{key}: {value if isinstance(value, str) else as_json(value)}" for key, value in facts.items())


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = chat_parser("ferret_bench", __doc__, max_new_tokens=512)
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="DIR", help="folders of questions")
    args = parse(parser, arguments)
    parts = [
        Inquiries(read_folder(folder), args.images or folder, id_keys=("question_id",), group=folder.name)
        for folder in args.data
    ]
    return evaluate_judged(FerretBench, ConcatDataset(parts), args)


if __name__ == "__main__":
    sys.exit(cli(main))
