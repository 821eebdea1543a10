"""GAR-Bench: questions about several regions and their relations, and captions of regions in their context.

    python -m eval.gar_bench --model runs/chat/final --data GAR-Bench-VQA.json --images images --out vqa.json
    python -m eval.gar_bench --model runs/chat/final --data GAR-Bench-Caption-Simple.json --images images \\
        --judge-url https://api.openai.com/v1 --judge-model gpt-4o --judge-key-env OPENAI_API_KEY --out simple.json

Download GAR-Bench-VQA.json (424 questions), GAR-Bench-Caption-Simple.json (97) and GAR-Bench-Caption-Detailed.json
(107) with their pictures. VQA: multiple choice, answered greedily; right is the exact letter, and no judge is needed.
Captions: a judge that sees the picture with the regions painted, and a crop of each, says whether the caption agrees
with the reference; its instructions are our own words, so numbers are near those published, not the same.
Published, GAR-1B / GAR-8B: VQA 47.9 / 57.8; simple 55.7 / 63.9, detailed 66.4 / 69.2 (judge GPT-4o).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tap_llm.data.messages import split_markers, with_choices
from tap_llm.errors import InputError

from .answerers import ChatAnswerer, load_chat
from .base import Prediction, Run, Scores, describe_model
from .command import cli, evaluate, finish, parse
from .inquiries import Inquiries, Record, read_records
from .judge_endpoint import JudgeError
from .judged import JudgedQuestions, chat_parser, evaluate_judged
from .marks import cropped, painted
from .questions import Question, RegionQuestions, mean, said_of

_MARKER = re.compile(r"<Prompt(\d+)>")
_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_LETTERED = re.compile(r"\s*\(?[A-Z][.):]\s")
_SIMPLE = "Describe <Prompt0> in detail."
_DETAILED = "Describe <Prompt0> in detail, including the relationship with <Prompt1>."
_VERDICT = re.compile(r"\b(true|false)\b", re.IGNORECASE)
_TASK = """\
The first picture shows {count} region(s), painted and numbered from 1; the other pictures are crops of them, in \
order. A model was asked: {question}

Reference: {reference}
Answer of the model: {answer}

Does the answer describe the region(s) correctly and agree with the reference in what the reference says? Wording does \
not matter, and true details beyond the reference do no harm. Reply with one word, True or False."""


class GarVqa(RegionQuestions):
    """Multiple choice; see the module's head."""

    protocol = "gar-bench-vqa-v1"

    def facts(self, record: Record) -> Prediction:
        options = options_of(record.get("choices"))
        answer = answer_letter(record.get("answer"), options)
        return {"type": str(record.get("type", "unknown")), "answer": answer, "options": options}

    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        options = options_of(record["choices"])
        if not options or answer_letter(record["answer"], options) is None:
            raise InputError(f"the answer {record['answer']!r} is none of the options {options}")
        text = f"Question: {record['question']}\nOptions: "
        ending = "\nAnswer with the correct option's letter directly."
        return [_question(record, with_choices(f"{text}{options[0]}", options[1:]) + ending)]

    def score(self, predictions: list[Prediction]) -> Scores:
        """Accuracy, and the share of answers that are the letter of an option, in all and by type."""
        said = [said_letter(said_of(p), len(p["options"])) for p in predictions]
        right = [p["answer"] is not None and p["answer"] == letter for p, letter in zip(predictions, said, strict=True)]
        metrics = {
            name: {
                "questions": len(places),
                "accuracy": mean([right[place] for place in places]),
                "letters": mean([said[place] is not None for place in places]),
            }
            for name, places in by_type(predictions).items()
        }
        ranks = [
            [(float(one), "\n".join([*p["options"], f"truth: {p['answer']}", f"answer: {said_of(p)}"]))]
            for p, one in zip(predictions, right, strict=True)
        ]
        return self.scores(metrics, predictions, ranks)


class GarCaption(JudgedQuestions):
    """Captions that a judge compares with references; see the module's head."""

    protocol = "gar-bench-caption-v1"

    def facts(self, record: Record) -> Prediction:
        known = {"reference": str(record.get("answer", "")), "question": _caption_question(record)}
        return {**known, "type": str(record.get("type", "unknown"))}

    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        if not record["answer"]:
            raise InputError("there is no reference to compare with")
        return [_question(record, _caption_question(record))]

    def score(self, predictions: list[Prediction]) -> Scores:
        """Share of captions that the judge holds for true, in all and by type."""
        verdicts = self.judge.map(self._verdict, predictions)
        metrics = {
            name: {"captions": len(places), "true": mean([verdicts[place][0] for place in places])}
            for name, places in by_type(predictions).items()
        }
        ranks = [
            [(float(true), f"{p['question']}\ntruth: {p['reference']}\nanswer: {said_of(p)}")]
            for p, (true, _) in zip(predictions, verdicts, strict=True)
        ]
        faults = [f"{p['id']}: {why}" for p, (_, why) in zip(predictions, verdicts, strict=True) if why]
        return self.scores({self.judge.label(): metrics}, predictions, ranks, faults)

    def _verdict(self, prediction: Prediction) -> tuple[bool, str]:
        """Whether the judge says "true", and what went wrong."""
        answer = said_of(prediction)
        if not answer:
            return False, ""
        crops = cropped(prediction)
        known = {"count": len(crops), "question": prediction["question"], "reference": prediction["reference"]}
        try:
            reply = self.judge.ask(_TASK.format(**known, answer=answer), [painted(prediction), *crops])
        except JudgeError as error:
            return False, str(error)
        verdict = _VERDICT.search(reply)
        if verdict is None:
            return False, f"the judge says neither true nor false: {reply[:80]!r}"
        return verdict[1].lower() == "true", ""


def by_type(predictions: Sequence[Prediction]) -> dict[str, list[int]]:
    """Places of the predictions of each type, and of "all"; the latter alone where there is one type."""
    kinds = sorted({prediction["type"] for prediction in predictions})
    groups = {kind: [place for place, p in enumerate(predictions) if p["type"] == kind] for kind in kinds}
    return {"all": list(range(len(predictions))), **(groups if len(groups) > 1 else {})}


def _masks(record: Record) -> list[Any]:
    masks = record.get("mask_rles") or []
    return [masks] if isinstance(masks, Mapping) else list(masks)


def _question(record: Record, text: str) -> Question:
    masks = _masks(record)
    if not masks:
        raise InputError("there are no masks")
    return Question([{"mask": mask} for mask in masks], split_markers(text, _MARKER, 0, len(masks)))


def _caption_question(record: Record) -> str:
    return str(record.get("question") or (_DETAILED if len(_masks(record)) > 1 else _SIMPLE))


def options_of(choices: Any) -> list[str]:
    """Options as "A. red", "B. blue", …; of a list, of a dict by letter, or of lines of text."""
    if isinstance(choices, str):
        choices = [line for line in choices.splitlines() if line.strip()]
    if isinstance(choices, Mapping):
        return [f"{letter}. {text}" for letter, text in sorted(choices.items())]
    texts = [str(choice).strip() for choice in choices or []]
    if texts and all(_LETTERED.match(text) for text in texts):
        return texts
    return [f"{chr(ord('A') + index)}. {text}" for index, text in enumerate(texts)]


def answer_letter(answer: Any, options: Sequence[str]) -> str | None:
    """The letter of the right option, which files give as such or as the option's text; None if it is neither."""
    text = str(answer).strip()
    letter = said_letter(text, len(options))
    texts = [_LETTERED.sub("", option, count=1).strip() for option in options]
    places = [index for index, option in enumerate(options) if text in (option, texts[index])]
    if letter is None and places:
        return chr(ord("A") + places[0])
    return letter


def said_letter(answer: str, count: int) -> str | None:
    """The letter that an answer consists of, with or without punctuation; None where it says anything else."""
    match = _LETTER.fullmatch(answer)
    letter = match[1].upper() if match else ""
    return letter if letter and ord(letter) - ord("A") < count else None


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = chat_parser("gar_bench", __doc__, max_new_tokens=256)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="such as GAR-Bench-VQA.json")
    args = parse(parser, arguments)
    examples = Inquiries(read_records(args.data), args.images or args.data.parent, id_keys=("id", "question_id"))
    if "caption" in args.data.stem.lower():
        return evaluate_judged(GarCaption, examples, args)
    chat = load_chat(args)
    vqa = GarVqa(examples, ChatAnswerer(chat))
    return finish(evaluate(vqa, args, describe_model(chat, args.model), args.batch_size), args)


if __name__ == "__main__":
    sys.exit(cli(main))
