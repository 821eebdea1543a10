"""MDVP-Bench: questions about boxes and points in photos, documents, screenshots and more, rated by a judge that sees.

    python -m eval.mdvp_bench --model runs/chat/final --data MDVP-Bench/*.json --images images \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4o --judge-key-env OPENAI_API_KEY --out mdvp.json

Download the 30 files of MDVP-Bench from Afeng-x/Draw-and-Understand (15 pairs of domain and task, as boxes and as
points) with their pictures. The judge sees the picture with all marks painted and numbered, and rates the model's and
the reference answer from 1 to 10; the score of a file is 100 * mean(answers) / mean(references), and may exceed 100.
The instructions to the judge are our own words.

A file holds ten questions: differences of many points between models are chance.
Published (GPT-4o, GAR-1B / GAR-8B, detailed captions of boxes): natural 152.6 / 178.6, OCR 149.6 / 149.1, multi-panel
103.7 / 117.2, screenshot 115.3 / 123.0.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import ConcatDataset

from tap_llm.data.messages import split_markers
from tap_llm.errors import InputError

from .base import Prediction, Run
from .command import cli, parse
from .inquiries import Inquiries, Record, read_records
from .judge import Picture
from .judged import chat_parser, evaluate_judged
from .marks import painted
from .questions import Question
from .rated import RatedQuestions
from .region_records import regions_of

CAVEAT = "a file holds ten questions: differences of many points between models are chance"
_MARKER = re.compile(r"<\s*[Rr]egion\s*(\d+)\s*>")
_CONTEXT = "The picture shows {count} region(s), marked and numbered from 1.\n\n"


class MdvpBench(RatedQuestions):
    """See the module's head.

    Examples are records `{"image_name", "question", "gt_answers", "bbox" or "points"}`, in groups by file.
    """

    protocol = "mdvp-bench-v1"

    def facts(self, record: Record) -> Prediction:
        return {"question": str(record.get("question", "")), "reference": _text(record.get("gt_answers"))}

    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        regions = regions_of(record)
        if not _text(record["gt_answers"]):
            raise InputError("there is no reference answer to compare with")
        return [Question(regions, split_markers(record["question"], _MARKER, 1, len(regions)))]

    def seen(self, prediction: Prediction) -> tuple[str, list[Picture]]:
        return _CONTEXT.format(count=len(prediction["shown"][0])), [painted(prediction)]


def _text(answer: Any) -> str:
    """Reference answers, which may be a list with one for each region."""
    return "\n".join(map(str, answer)) if isinstance(answer, list) else str(answer or "")


def read_files(paths: Sequence[Path], images: Path | None) -> list[Inquiries]:
    """Examples of each file, or of all JSON files of a folder, with the file's name as "group".

    Args:
        paths: files and folders.
        images: folder of the pictures; by default that of each file.

    Raises:
        InputError: a file cannot be read, or there is none.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise InputError(f"there are no JSON files in {', '.join(map(str, paths))}")
    return [
        Inquiries(read_records(file), images or file.parent, "image_name", ("question_id",), file.stem)
        for file in files
    ]


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = chat_parser("mdvp_bench", __doc__, max_new_tokens=512)
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="FILE", help="files, or their folder")
    args = parse(parser, arguments)
    return evaluate_judged(MdvpBench, ConcatDataset(read_files(args.data, args.images)), args, [CAVEAT])


if __name__ == "__main__":
    sys.exit(cli(main))
