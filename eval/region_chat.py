"""Questions about regions of unseen scenes to a region language model, and what it says when the regions are wrong.

    python -m eval.region_chat --model runs/chat/final --sprites emoji grocery --backgrounds photos --out r.json
    python -m eval.region_chat --model runs/chat/final --shapes --count 300 --out r.json      # drawn shapes only

Scenes are composed from consecutive seeds, which training never draws; each is talked about in several conversations of
one to four questions. Every question is asked for itself, with the earlier questions of its conversation and their true
answers before it (protocol: teacher-forced history), and answered greedily. An answer is right if its words are those
expected; case, a full stop and a leading article do not count.

Controls ask the same with other features in the place of the regions: those of other regions of the picture (none stays
in its place), those of regions of another picture, and, for "no region", the mean over the other picture's regions for
all of them, which leaves the text alone to go by. Another region of the picture is often the very one that a wrong
answer is about, so the first control may fall below chance.

For several projectors, run it for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from tap_llm.data.instructions import Conversation, Question
from tap_llm.data.messages import Message
from tap_llm.data.scenes import Scene, SceneComposer
from tap_llm.errors import InputError
from tap_llm.region_llm.features import RegionFeatures
from training.sources import DataConfig, make_composers

from .base import Benchmark, Case, Examples, Prediction, Run, Scores, describe_model
from .cases import embedded
from .chat_model import ChatModel, Reading
from .chat_scores import CONDITIONS, is_right, score_answers
from .command import benchmark_parser, cli, common_arguments, evaluate, finish, parse, positive
from .tables import aligned, cell
from .talk_sources import Talk, TalkSource, picture_of, shuffled

FIRST_SEED = 2**31  # training draws its scenes below
_SHAPE_KEYS = ("shape", "texture", "size")


class RegionChat(Benchmark):
    """See the module's head.

    Args:
        chat: model under test.
        sources: scenes.
    """

    protocol = "region-chat-teacher-forced-history-v1"
    unit = "regions"

    def __init__(self, chat: ChatModel, sources: Sequence[TalkSource]) -> None:
        self.chat, self.sources = chat, sources
        self._readings: dict[str, Reading] = {}  # of the last two pictures

    def examples(self) -> Examples:
        return ConcatDataset(self.sources)

    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.chat.max_new_tokens, "talks": [source.talks for source in self.sources]}

    def count(self, prediction: Prediction) -> int:
        return prediction["regions"]

    def truth(self, example: Talk) -> Prediction:
        """All questions, as if each had been answered with nothing."""
        nameless = None if self.chat.concepts is None else [""] * len(example.scene.things)
        questions = [
            {**_about(question, example.scene, nameless), "said": dict.fromkeys(CONDITIONS, "")}
            for _, question in questions_of(example.conversations)
        ]
        return {
            "source": example.source,
            "regions": len(example.scene.things),
            "names": [thing.name for thing in example.scene.things],
            "questions": questions,
        }

    def predict(self, example: Talk) -> Prediction:
        """Answers to all questions, with the regions and with each control."""
        asked = list(questions_of(example.conversations))
        if not asked:
            return {"questions": []}
        own = self._read(example.id, example.scene)
        other = self._read(*example.other)
        versions = controls(own.features, other.features, np.random.default_rng(example.seed))
        rows = [(messages, features) for features in versions.values() for messages, _ in asked]
        answers = self.chat.answer([messages for messages, _ in rows], [features for _, features in rows])
        said = {
            condition: answers[place * len(asked) : (place + 1) * len(asked)]
            for place, condition in enumerate(versions)
        }
        questions = [
            {
                **_about(question, example.scene, own.names),
                "said": {key: said[key][number] if key in said else None for key in CONDITIONS},
            }
            for number, (_, question) in enumerate(asked)
        ]
        image, boxes = picture_of(example.scene)
        return {"image": embedded(image), "boxes": boxes, "questions": questions}

    def score(self, predictions: list[Prediction]) -> Scores:
        """Metrics by source."""
        found = {
            source.name: [q for p in predictions if p["source"] == source.name for q in p["questions"]]
            for source in self.sources
        }
        metrics = {name: score_answers(questions) for name, questions in found.items()}
        unnamed = any(q["concept"] is None for questions in found.values() for q in questions)
        reason = "the TAP below has no concept space at hand; name one with --concepts"
        return Scores(metrics, {"names/concept_accuracy": reason} if unnamed else {}, chat_cases(predictions))

    def _read(self, name: str, scene: Scene) -> Reading:
        """What TAP knows of a scene. Every picture is the other one first and then itself, and is read once."""
        reading = self._readings.pop(name, None)
        if reading is None:
            reading = self.chat.read(*picture_of(scene))
        self._readings = dict([*self._readings.items(), (name, reading)][-2:])
        return reading


def questions_of(conversations: Sequence[Conversation]) -> Iterator[tuple[list[Message], Question]]:
    """Each question with all that is said up to it, earlier answers being the true ones."""
    for conversation in conversations:
        for number, question in enumerate(conversation.questions):
            yield conversation.messages[: 2 * number + 1], question


def controls(own: RegionFeatures, other: RegionFeatures, rng: np.random.Generator) -> dict[str, RegionFeatures]:
    """Features of N regions and what takes their place, by the names in `CONDITIONS`.

    Args:
        own: of the regions asked about, on one picture.
        other: of regions on another picture.
        rng: chooses.
    """
    versions = {"true": own}
    if order := shuffled(rng, len(own)):
        versions["same picture"] = own.select(order)
    versions["other picture"] = other.select(rng.integers(0, len(other), len(own)).tolist())
    versions["no region"] = _all_alike(other, len(own))
    return versions


def _all_alike(features: RegionFeatures, count: int) -> RegionFeatures:
    """So many regions that are all the mean of the given ones; where the image has tokens, these are alike too."""

    def mean(tensor: Tensor, axis: int, length: int) -> Tensor:
        return tensor.mean(axis, keepdim=True).expand(*(length if i == axis else -1 for i in range(tensor.ndim)))

    return RegionFeatures(
        semantic_tokens=mean(features.semantic_tokens, 0, count),
        boxes=mean(features.boxes, 0, count),
        roi=mean(features.roi, 0, count),
        global_tokens=mean(features.global_tokens, 1, features.global_tokens.shape[1]),
        region_image_index=torch.zeros(count, dtype=torch.long, device=features.boxes.device),
    )


def _about(question: Question, scene: Scene, names: list[str] | None) -> dict[str, Any]:
    """What scoring needs to know of a question; truth and TAP's own name are those of its first region."""
    first = question.regions[0]
    thing, drawn = scene.things[first], scene.attributes[first]
    numbers = [f"region {region + 1}" for region in question.regions]
    return {
        "kind": question.kind,
        "asked": question.form.format(*numbers, list="all regions", v=question.value),
        "answer": question.answer,
        "choices": list(question.choices),
        "concept": None if names is None else names[first],
        "truth": {
            "name": thing.name,
            "colours": list(thing.colours),
            "shape": {key: drawn[key] for key in _SHAPE_KEYS if key in drawn},
        },
    }


def chat_cases(predictions: Sequence[Prediction]) -> list[Case]:
    """Every scene that was asked about, by the share of right answers."""
    return [
        {
            "score": sum(map(_is_right, questions)) / len(questions),
            "title": prediction["id"],
            "text": prediction.get("fault") or "\n".join(map(_told, questions)),
            "image": prediction.get("image"),
            "group": prediction["source"],
            "truth": [
                {"region": box, "concept": name}
                for box, name in zip(prediction.get("boxes", []), prediction["names"], strict=False)
            ],
        }
        for prediction in predictions
        if (questions := prediction["questions"])
    ]


def _is_right(question: dict[str, Any]) -> bool:
    return bool(is_right(question, "true"))


def _told(question: dict[str, Any]) -> str:
    said = f"{question['asked']} {question['said']['true']}"
    return f"right: {said}" if _is_right(question) else f"WRONG: {said} (expected: {question['answer']})"


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    args = parse(_parser(), arguments)
    sources = _sources(args)
    chat = ChatModel.from_pretrained(
        args.model, args.concepts, args.device, args.dtype,
        max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
    )  # fmt: skip
    finished = evaluate(RegionChat(chat, sources), args, describe_model(chat, args.model))
    asked = sum(len(prediction["questions"]) for prediction in finished.predictions)
    counts = f"{finished.results['examples']} scenes, {finished.results['regions']} regions, {asked} questions"
    return finish(finished, args, _tables(finished), [f"{counts}, each answered {len(CONDITIONS)} times"])


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("region_chat", __doc__)
    common_arguments(
        parser,
        model="tap-tiny-chat",
        model_help="adapter, folder or hub id of a whole model, or bundled name",
        batch="questions answered at once",
        pipeline=False,
    )
    add = parser.add_argument
    add("--concepts", help="concept space for TAP's own names, in place of that of the model's TAP")
    add("--sprites", nargs="+", default=[], metavar="DIR", help="scenes of these named cut-outs and drawn shapes")
    add("--backgrounds", nargs="+", default=[], metavar="DIR", help="pictures behind them; drawn ones by default")
    add("--shape-share", type=float, default=0.4, metavar="SHARE", help="of drawn shapes beside --sprites [0.4]")
    add("--shapes", action="store_true", help="scenes of drawn shapes only, beside those of --sprites")
    add("--count", type=positive, default=200, help="scenes of each kind [200]")
    add("--talks", type=positive, default=4, help="conversations about each scene [4]")
    add("--seed", type=int, default=FIRST_SEED, help="of the first scene")
    add("--size", type=int, nargs=2, default=(400, 300), metavar=("W", "H"), help="of the scenes [400 300]")
    add("--max-new-tokens", type=positive, default=48, help="longest answer [48]")
    return parser


def _sources(args: argparse.Namespace) -> list[TalkSource]:
    composers: dict[str, SceneComposer] = {}
    if args.sprites:
        data = DataConfig(sprites=args.sprites, backgrounds=args.backgrounds, shape_share=args.shape_share)
        composers["scenes"] = make_composers(data)[0]
    if args.shapes:
        composers["shapes"] = SceneComposer(None, args.backgrounds)
    if not composers:
        raise InputError("nothing to ask about: give --sprites DIR …, --shapes, or both")
    return [
        TalkSource(name, composer, args.count, args.seed, tuple(args.size), args.talks)
        for name, composer in composers.items()
    ]


def _tables(finished: Run) -> str:
    return "\n".join(
        f"\n{source}, {title}\n{chat_table(rows)}"
        for source, found in finished.results["metrics"].items()
        for title, rows in found.items()
    )


def chat_table(rows: dict[str, dict[str, Any]]) -> str:
    """One line per group or kind of questions, then a line for each that has more to tell."""
    columns = ("questions", "exact", "chance", *CONDITIONS[1:])
    lines = [[name, *(cell(metrics[key]) for key in columns)] for name, metrics in rows.items()]
    more = {
        name: [f"{key} {cell(value)}" for key, value in metrics.items() if key not in columns]
        for name, metrics in rows.items()
    }
    notes = [f"{name}: {', '.join(texts)}" for name, texts in more.items() if texts]
    return "\n".join([aligned([["", *columns], *lines]), *notes])


if __name__ == "__main__":
    sys.exit(cli(main))
