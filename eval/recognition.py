"""Open-vocabulary recognition of regions, LVIS and PACO (Osprey's protocol): what is this, in one word or phrase?

    python -m eval.recognition --model runs/chat/final --data lvis_val_1k_category.json --images coco2017 \\
        --embedding-model all-MiniLM-L6-v2 --out lvis.json
    python -m eval.recognition --model tap_vit_l_v1_1 --data LVIS_box.json --images coco2017 --out lvis.json

Download lvis_val_1k_category.json (4,004 objects) and paco_val_1k_category.json (4,263) from
sunshine-lwt/Osprey-ValData, or LVIS_box.json, LVIS_point.json, PACO_box.json and PACO_point.json from
Afeng-x/Draw-and-Understand; pictures are those of COCO 2017, train and val. A model that chats is asked one question
per region and answers greedily; a TAP alone says the name of its concept space that fits best.

Semantic IoU is the Jaccard index of the words. Semantic similarity is the cosine of sentence embeddings and needs an
embedding model, whose name is part of the metric's. Regions without an answer count 0 in both.
Published (similarity / IoU): DAM-8B 89.0/77.7 on LVIS, 84.2/73.2 on PACO; Osprey-7B 65.2/38.2 and 73.1/52.7.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tap_llm.errors import InputError

from .answerers import chat_arguments, load_answerer
from .base import Examples, Prediction, Run, Scores
from .command import benchmark_parser, cli, common_arguments, evaluate, finish, parse
from .inquiries import Inquiries, Record, read_records
from .questions import Answerer, Question, RegionQuestions, answers_of, mean
from .region_records import names_of, regions_of
from .sentence_similarity import SentenceEncoder

ASKED = ("What is the category of ", "? Using only one word or phrase.")


class Recognition(RegionQuestions):
    """See the module's head.

    Args:
        examples: records `{"file_name", "categories": [...], "annotations": [{"segmentation"}]}`.
        answerer: model under test.
        encoder: for semantic similarity.
    """

    protocol = "osprey-recognition-v1"
    unit = "regions"

    def __init__(self, examples: Examples, answerer: Answerer, encoder: SentenceEncoder | None = None) -> None:
        super().__init__(examples, answerer)
        self.encoder = encoder

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "question": "<region>".join(ASKED)}

    def facts(self, record: Record) -> Prediction:
        return {"names": names_of(record)}

    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        regions, names = regions_of(record), names_of(record)
        if len(regions) != len(names):
            raise InputError(f"there are {len(regions)} regions, but {len(names)} categories")
        return [Question([region], [ASKED[0], 0, ASKED[1]]) for region in regions]

    def score(self, predictions: list[Prediction]) -> Scores:
        """Means over all regions."""
        said = [list(zip(p["names"], answers_of(p, len(p["names"])), strict=True)) for p in predictions]
        known = [[(clean_name(name), clean_answer(answer)) for name, answer in pairs] for pairs in said]
        flat = [pair for pairs in known for pair in pairs]
        metrics: dict[str, Any] = {
            "regions": len(flat),
            "answered": mean([float(bool(answer)) for _, answer in flat]),
            "semantic_iou": mean([word_iou(*pair) for pair in flat]),
        }
        ranks = [
            [
                (word_iou(*clean), f"truth: {name}\nanswer: {answer or '-'}")
                for clean, (name, answer) in zip(*rows, strict=True)
            ]
            for rows in zip(known, said, strict=True)
        ]
        if self.encoder is None:
            reason = "name a sentence encoder with --embedding-model, such as all-MiniLM-L6-v2"
            return self.scores(metrics, predictions, ranks, not_measured={"semantic_similarity": reason})
        return self.scores({**metrics, **self._similarity(flat, metrics["semantic_iou"])}, predictions, ranks)

    def _similarity(self, known: list[tuple[str, str]], overlap: float) -> dict[str, float]:
        """Under the encoder's name; regions without an answer count 0."""
        assert self.encoder is not None
        answered = [(name, answer) for name, answer in known if answer]
        cosines = self.encoder.similarity([name for name, _ in answered], [answer for _, answer in answered])
        value = sum(cosines) / len(known) if known else 0.0
        names = (f"semantic_similarity {self.encoder.name}", f"mean_of_both {self.encoder.name}")
        return dict(zip(names, (value, (value + overlap) / 2), strict=True))


# Words


def clean_name(text: str) -> str:
    """A category as it is compared: without "_" and ":"."""
    return " ".join(re.sub(r"[_:]", " ", text).split())


def clean_answer(text: str) -> str:
    """An answer as it is compared: what follows the first ":", without punctuation."""
    said = text.strip()
    said = said.split(":", 1)[1] if ":" in said else said
    return " ".join(re.sub(r"[.:,]", " ", said).split())


def word_iou(first: str, second: str) -> float:
    """Jaccard index of the sets of words; case does not count. 0 where both are empty."""
    a, b = set(first.lower().split()), set(second.lower().split())
    return len(a & b) / len(a | b) if a | b else 0.0


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser("recognition", __doc__)
    common_arguments(parser, model_help="a TAP, or a model that chats", batch="pictures, and questions, at once")
    chat_arguments(parser, max_new_tokens=20)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="such as lvis_val_1k_category.json")
    parser.add_argument("--embedding-model", metavar="NAME", help="for semantic similarity, such as all-MiniLM-L6-v2")
    args = parse(parser, arguments)
    records = read_records(args.data)
    key = "image_name" if any(isinstance(r, dict) and "image_name" in r for r in records) else "file_name"
    examples = Inquiries(records, args.images or args.data.parent, key, ("id", "question_id"))
    encoder = SentenceEncoder.from_pretrained(args.embedding_model) if args.embedding_model else None
    answerer, model = load_answerer(args)
    return finish(evaluate(Recognition(examples, answerer, encoder), args, model, args.batch_size), args)


if __name__ == "__main__":
    sys.exit(cli(main))
