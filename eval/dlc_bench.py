"""DLC-Bench: detailed captions of 100 regions, judged by questions about what they say and what they must not say.

    python -m eval.dlc_bench --model runs/chat/final --data DLC-Bench --judge-url http://localhost:8000/v1 \\
        --judge-model meta-llama/Llama-3.1-8B-Instruct --out dlc.json

Download nvidia/DLC-Bench: annotations.json (COCO-like, masks as RLE), qa.json (392 positive and 500 negative questions,
by region, whose choices carry scores), class_names.json and images/.

Protocol of judge A, which sees the caption only: first whether the caption may be about an object of the region's
class; if not, every later score of the region is at most 0. Each question is one request, temperature 0. Unusable
replies score 0. "positive" and "negative" are means over regions of the mean score of their questions, "average" is the
mean of the two. The instructions to the judge are our own words. Captions are greedy; published ones were sampled at
temperature 0.2.
Published (pos / neg / avg, judge Llama-3.1-8B-Instruct): GAR-8B 50.2 / 84.6 / 67.4, DAM-3B 51.0 / 83.0 / 67.0,
PixelRefer-7B avg 68.3. Numbers that a judge with pictures gave (GPT-4o: GAR-8B 77.0) are not comparable.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tap_llm.data.readers.base import list_of, read_json
from tap_llm.errors import InputError, MissingFileError

from .base import Prediction, Run, Scores
from .command import cli, parse
from .inquiries import Inquiries, Record
from .judge import chosen, lettered
from .judge_endpoint import JudgeError
from .judged import JudgedQuestions, chat_parser, evaluate_judged
from .questions import Question, mean, said_of

PROMPT = "Describe the masked region in detail."
KINDS = ("positive", "negative")
_YES_NO = ("Yes", "No")
_TASK = """\
Here is a description of an object in a picture:
{caption}

Answer a multiple-choice question from this description alone. Choose the option that fits best, even if none fits \
exactly. Reply with the letter of one option and nothing else.

Question: {question}
{options}"""
_RECOGNITION = """\
Is it likely that the object in the description is a {name}, or an object of a similar type? The words need not match \
exactly."""


class DlcBench(JudgedQuestions):
    """See the module's head; examples are records of `read_regions`."""

    protocol = "dlc-bench-judge-a-v1"
    unit = "regions"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "prompt": PROMPT}

    def facts(self, record: Record) -> Prediction:
        return {"name": record.get("name", ""), "asked": record.get("asked", [])}

    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        if not record["name"]:
            raise InputError("class_names.json has no name for it")
        if not record["asked"]:
            raise InputError("qa.json has no questions about it")
        return [Question([{"mask": record["segmentation"]}], [PROMPT])]

    def score(self, predictions: list[Prediction]) -> Scores:
        """Means over regions; one without any question is wrong too, as far as that goes."""
        judged = self.judge.map(self._judge, predictions)
        means: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for prediction, (_, scores, _) in zip(predictions, judged, strict=True):
            kinds = [question["kind"] for question in prediction["asked"]]
            for kind in set(kinds or KINDS):
                means[kind].append(mean([one for one, of in zip(scores, kinds, strict=True) if of == kind]))
        values = {kind: mean(means[kind]) for kind in KINDS}
        metrics = {
            "regions": len(predictions),
            "judge_questions": sum(len(prediction["asked"]) for prediction in predictions),
            "recognized": mean([recognized for recognized, _, _ in judged]),
            **values,
            "average": mean(list(values.values())),
        }
        pairs = list(zip(predictions, judged, strict=True))
        ranks = [
            [(mean(scores), f"{p['name']}, recognized: {known}\nanswer: {said_of(p)}")]
            for p, (known, scores, _) in pairs
        ]
        faults = [f"{p['id']}: {why}" for p, (_, _, why) in pairs if why]
        return self.scores({self.judge.label(): metrics}, predictions, ranks, faults)

    def _judge(self, prediction: Prediction) -> tuple[bool, list[float], str]:
        """Whether the object was recognized, a score for each question, and what went wrong."""
        caption = said_of(prediction)
        if not caption:
            return False, [0.0] * len(prediction["asked"]), ""
        failed: list[str] = []
        is_it = _RECOGNITION.format(name=prediction["name"])
        recognized = self._choose(caption, is_it, _YES_NO, failed) == 0
        scores = []
        for question in prediction["asked"]:
            texts, values = zip(*question["choices"], strict=True)
            place = self._choose(caption, question["question"], texts, failed)
            value = 0.0 if place is None else float(values[place])
            scores.append(value if recognized else min(0.0, value))
        why = (
            f"{len(failed)} of {len(scores) + 1} questions to the judge came to nothing: {failed[0]}" if failed else ""
        )
        return recognized, scores, why

    def _choose(self, caption: str, question: str, options: Sequence[str], failed: list[str]) -> int | None:
        """Index of the option that the judge takes; without a usable reply None, and the reason joins `failed`."""
        try:
            reply = self.judge.ask(_TASK.format(caption=caption, question=question, options=lettered(options)))
        except JudgeError as error:
            failed.append(str(error))
            return None
        place = chosen(reply, options)
        if place is None:
            failed.append(f"the judge chose none of the options: {reply[:80]!r}")
        return place


# Files


def read_regions(folder: Path) -> list[Record | InputError]:
    """Regions with their questions, as records: `id`, `file_name`, `segmentation`, `name`, `asked`.

    `qa.json` is, by the region's id, a list of `{"question", "type", "choices": [[text, score], ...]}`, where the type
    begins with "pos" or "neg"; `class_names.json` is a name by the same id.

    Raises:
        InputError: a file cannot be read, or is of another form.
        MissingFileError: a file is missing.
    """
    documents = [_document(folder / f"{name}.json") for name in ("annotations", "qa", "class_names")]
    annotations, asked, names = documents
    path = folder / "annotations.json"
    images = {image.get("id"): image for image in list_of(annotations, "images", path)}
    records: list[Record | InputError] = []
    for number, annotation in enumerate(list_of(annotations, "annotations", path)):
        try:
            records.append(_region(annotation, images, asked, names))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            records.append(InputError(f"region {annotation.get('id', number)}: {missing}"))
    return records


def _document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(f"there is no file {path}")
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path} must hold a JSON object")
    return document


def _region(annotation: Record, images: Mapping[Any, Record], asked: Record, names: Record) -> Record:
    name = str(annotation["id"])
    return {
        "id": name,
        "file_name": images.get(annotation.get("image_id"), {}).get("file_name"),
        "segmentation": annotation.get("segmentation"),
        "name": str(names.get(name) or ""),
        "asked": [_asked(question) for question in asked.get(name) or []],
    }


def _asked(question: Record) -> Record:
    kind = next((kind for kind in KINDS if str(question["type"]).lower().startswith(kind[:3])), None)
    if kind is None:
        raise ValueError(f"a question of the unknown type {question['type']!r}")
    choices = [[str(text), float(score)] for text, score in question["choices"]]
    if not choices:
        raise ValueError("a question without choices")
    return {"question": str(question["question"]), "kind": kind, "choices": choices}


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = chat_parser("dlc_bench", __doc__, max_new_tokens=512)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of nvidia/DLC-Bench")
    args = parse(parser, arguments)
    own = args.data / "images"
    examples = Inquiries(read_regions(args.data), args.images or (own if own.is_dir() else args.data), "file_name")
    return evaluate_judged(DlcBench, examples, args)


if __name__ == "__main__":
    sys.exit(cli(main))
