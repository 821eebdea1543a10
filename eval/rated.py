"""Answers that a judge rates beside reference answers: one request for both, ratings from 1 to 10."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .base import Prediction, Scores
from .judge import Picture
from .judge_endpoint import JudgeError
from .judged import JudgedQuestions
from .questions import mean, said_of

LOWEST, HIGHEST = 1.0, 10.0
_TASK = """\
{context}Question about regions of the picture:
{question}

[Answer 1]
{reference}
[End of answer 1]

[Answer 2]
{answer}
[End of answer 2]

Rate both answers for accuracy, relevance, helpfulness and level of detail, each from 1 (useless) to 10 (perfect). \
Their order must not matter. The first line of your reply holds two numbers and nothing else: the rating of answer 1, \
a space, and the rating of answer 2. Then explain the ratings."""
_LABEL = re.compile(r"(?:answer|assistant)\s*[12]\b|/\s*10\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Rating:
    """What a judge makes of an answer.

    Attributes:
        reference: of the reference answer.
        answer: of the model's answer.
        fault: why these are the worst that there are; "" where the judge gave them.
    """

    reference: float = HIGHEST
    answer: float = LOWEST
    fault: str = ""


class RatedQuestions(JudgedQuestions):
    """Predictions have a "group", a "question" and a "reference"."""

    @abstractmethod
    def seen(self, prediction: Prediction) -> tuple[str, list[Picture]]:
        """What the judge gets to know of the picture: words in front of the question, and pictures."""

    def rate(self, prediction: Prediction) -> Rating:
        """Ask for both ratings. Without an answer, or a usable reply, they are the worst: 10 and 1."""
        answer = said_of(prediction)
        if not answer:
            return Rating()
        context, pictures = self.seen(prediction)
        known = {key: prediction[key] for key in ("question", "reference")}
        try:
            reply = self.judge.ask(_TASK.format(context=context, answer=answer, **known), pictures, max_tokens=1024)
        except JudgeError as error:
            return Rating(fault=str(error))
        return read_ratings(reply) or Rating(fault=f"the judge gives no ratings: {reply[:80]!r}")

    def score(self, predictions: list[Prediction]) -> Scores:
        """Ratios by group, and their mean."""
        pairs = list(zip(predictions, self.judge.map(self.rate, predictions), strict=True))
        names = list(dict.fromkeys(prediction["group"] for prediction in predictions))
        groups = {name: ratio([rating for p, rating in pairs if p["group"] == name]) for name in names}
        if len(groups) > 1:
            groups["mean of all"] = {"score": mean([group["score"] for group in groups.values()])}
        ranks = [
            [(r.answer / r.reference, f"{p['question']}\ntruth: {p['reference']}\nanswer: {said_of(p)}")]
            for p, r in pairs
        ]
        faults = [f"{p['id']}: {rating.fault}" for p, rating in pairs if rating.fault]
        return self.scores({self.judge.label(): groups}, predictions, ranks, faults)


def read_ratings(reply: str) -> Rating | None:
    """The two numbers of the first line that has any; None where they are not two, or not from 1 to 10."""
    lines = [_NUMBER.findall(_LABEL.sub(" ", line)) for line in reply.splitlines()]
    numbers = [float(number) for number in next(filter(None, lines), [])]
    if len(numbers) != 2 or not all(LOWEST <= number <= HIGHEST for number in numbers):
        return None
    return Rating(numbers[0], numbers[1])


def ratio(ratings: Sequence[Rating]) -> dict[str, Any]:
    """`score`, 100 times the mean rating of the answers over that of the references, and both means."""
    answer, reference = mean([r.answer for r in ratings]), mean([r.reference for r in ratings])
    return {"questions": len(ratings), "score": 100 * answer / reference, "answer": answer, "reference": reference}
