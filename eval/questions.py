"""What benchmarks of questions about regions share: checked regions, answers of a whole batch, faults by question.

What is wrong with one region costs the questions about it, what is wrong with a picture or a record all of its
questions. Each is named, and counts as wrong.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from tap_llm.data.messages import Dialogue, Message, Piece
from tap_llm.data.readers.base import size_of
from tap_llm.errors import InputError
from tap_llm.images import load_image
from tap_llm.masks import encode_rle
from tap_llm.regions import Region, parse_region, read_mask

from .base import Benchmark, Examples, Prediction, Scores
from .cases import Case, CaseRegion
from .inquiries import Inquiry, Record


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        regions: what it is about; those that `pieces` do not mention are listed ahead of it.
        pieces: text, and indices of `regions`.
        problem: why it cannot be asked; "" where it can.
    """

    regions: list[Region] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    problem: str = ""

    def messages(self) -> list[Message]:
        """As the user's message."""
        dialogue = Dialogue(fixed=True)
        dialogue.user(self.pieces)
        dialogue.introduce(range(len(self.regions)), 0)
        return dialogue.messages


class Answerer(Protocol):
    """A model under test."""

    def settings(self) -> dict[str, Any]:
        """What decides its answers beside its weights."""

    def __call__(self, asked: Sequence[tuple[Image.Image, list[Question]]]) -> list[list[str]]:
        """Answers to the questions about each picture."""


class RegionQuestions(Benchmark):
    """A benchmark whose examples are records: a picture, regions, and questions about them.

    Args:
        examples: [`Inquiries`].
        answerer: model under test.
    """

    unit = "questions"

    def __init__(self, examples: Examples, answerer: Answerer) -> None:
        self.inquiries, self.answerer = examples, answerer

    @abstractmethod
    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        """What is asked about a picture.

        Raises:
            InputError: or `KeyError`, `TypeError`, `ValueError`: the record is malformed.
        """

    def facts(self, record: Record) -> Prediction:
        """What scoring needs to know of a record; of an empty one, for those that are malformed, all is unknown."""
        return {}

    def examples(self) -> Examples:
        return self.inquiries

    def settings(self) -> dict[str, Any]:
        return self.answerer.settings()

    def count(self, prediction: Prediction) -> int:
        return len(prediction["answers"])

    def truth(self, example: Inquiry) -> Prediction:
        try:
            known = self.facts(example.record)
        except (AttributeError, InputError, KeyError, TypeError, ValueError):  # the questions will say why
            known = self.facts({})
        return {"image": str(example.image.absolute()), "digest": example.digest, "group": example.group, **known}

    def predict(self, example: Inquiry) -> Prediction:
        return self.predict_batch([example])[0]

    def predict_batch(self, examples: list[Inquiry]) -> list[Prediction]:
        """`answers` of each example, None where there is none, its `faults`, by question, and what to draw."""
        opened = [self._open(example) for example in examples]
        answers = self.answerer([(image, [one for one in asked if not one.problem]) for image, asked in opened])
        return [_prediction(*pair, found) for pair, found in zip(opened, answers, strict=True)]

    def scores(
        self,
        metrics: dict[str, Any],
        predictions: Sequence[Prediction],
        ranks: Sequence[Sequence[tuple[float, str]]],
        faults: Sequence[str] = (),
        not_measured: dict[str, str] | None = None,
    ) -> Scores:
        """Metrics with their faults and cases.

        Args:
            metrics: all.
            predictions: of these.
            ranks: for each prediction and each of its questions how good the answer is, higher is better, and what was
                asked, expected and answered.
            faults: beside answers that are missing or empty.
            not_measured: reason by metric.
        """
        pairs = zip(predictions, ranks, strict=True)
        cases = [_case(p, place, len(rows), *row) for p, rows in pairs for place, row in enumerate(rows)]
        return Scores(metrics, not_measured or {}, cases=cases, faults=[*_unanswered(predictions), *faults])

    def _open(self, example: Inquiry) -> tuple[Image.Image, list[Question]]:
        """The picture and its questions; those with a region that cannot be used have a problem."""
        if example.problem:
            raise InputError(example.problem)
        image = load_image(example.image)
        try:
            _check_size(example.record, image)
            return image, [_checked(question, image) for question in self.questions(example.record, image)]
        except KeyError as error:
            raise InputError(f'the record is malformed: "{error.args[0]}" is missing') from error
        except InputError:
            raise
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"the record is malformed: {error}") from error


def _check_size(record: Record, image: Image.Image) -> None:
    stated = size_of(record)
    if stated not in (None, (image.height, image.width)):
        raise InputError(f"the picture is {image.width}x{image.height}, but its record states {stated[1]}x{stated[0]}")


def _checked(question: Question, image: Image.Image) -> Question:
    try:
        for region in question.regions:
            parse_region(region, image.height, image.width)
    except InputError as error:
        return Question(problem=str(error))
    return question


def _prediction(image: Image.Image, asked: Sequence[Question], answers: Sequence[str]) -> Prediction:
    said = iter(answers)
    return {
        "answers": [None if question.problem else next(said) for question in asked],
        "faults": {str(number): question.problem for number, question in enumerate(asked) if question.problem},
        "shown": [[_shown(region, image) for region in question.regions] for question in asked],
    }


def _shown(region: Region, image: Image.Image) -> CaseRegion:
    if "mask" in region:
        return {"mask": encode_rle(read_mask(region["mask"], image.height, image.width))}
    return {"region": region}


# For `score`


def answers_of(prediction: Prediction, count: int) -> list[str]:
    """Answers to `count` questions; "" where there is none, whatever the reason."""
    answers = [answer or "" for answer in prediction.get("answers", [])]
    return [*answers, *[""] * count][:count]


def said_of(prediction: Prediction) -> str:
    """The answer where there is one question."""
    return answers_of(prediction, 1)[0]


def mean(values: Sequence[float]) -> float:
    """0 of none."""
    return sum(values) / len(values) if values else 0.0


def _where(prediction: Prediction, place: int, count: int) -> str:
    return str(prediction["id"]) if count < 2 else f"{prediction['id']}, question {place + 1}"


def _case(prediction: Prediction, place: int, count: int, score: float, text: str) -> Case:
    shown = prediction.get("shown", [])
    return {
        "score": score,
        "title": _where(prediction, place, count),
        "text": text,
        "image": None if "fault" in prediction else prediction["image"],
        "truth": shown[place] if place < len(shown) else [],
    }


def _unanswered(predictions: Sequence[Prediction]) -> list[str]:
    """One line for each question that could not be asked, and for each answer that is empty."""
    lines = []
    for prediction in predictions:
        answers = prediction.get("answers", [])
        for place, answer in enumerate(answers):
            if not answer:
                reason = prediction["faults"][str(place)] if answer is None else "the answer is empty"
                lines.append(f"{_where(prediction, place, len(answers))}: {reason}")
    return lines
