"""Zero-shot classification of whole pictures by any CLIP: the class whose name fits best.

    python -m eval.zero_shot --model openai/clip-vit-base-patch16 --data imagenet/val --classes names.json \\
        --templates templates.txt --out imagenet.json
    python -m eval.zero_shot --data grocery/val.json --out grocery.json

--data is a folder with one folder of pictures per class, or a COCO-style file whose pictures have one category each.
Classes are called by their folders ("_" becomes a space) or categories; --classes names them anew: a JSON object
{folder: name}, or lines "n01440764 tench, Tinca tinca" (of which the first name counts). A class is the mean of its
name in all templates, made a unit vector again. ImageNet's validation pictures must lie in folders by class.

`top1` and `top5` count pictures, `class_top1` is the mean over classes; a picture that cannot be read counts as wrong.
Known of OpenAI's weights with their 80 templates, top-1 on ImageNet: ViT-B/16 68.3, ViT-L/14 75.5.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tap_llm.errors import InputError, MissingFileError

from .base import Benchmark, Case, Prediction, Run, Scores
from .classed_pictures import ClassedPicture, ClassedPictures, open_classed, read_names
from .clips import ClipEncoder, clip_arguments, load_encoder
from .command import benchmark_parser, cli, evaluate, finish, parse
from .region_cases import ends

TEMPLATES = ("a photo of a {}.",)
TOP = 5


class ZeroShot(Benchmark):
    """See the module's head.

    Args:
        encoder: model under test.
        pictures: with their classes.
        templates: texts with "{}".
    """

    protocol = "zero-shot-v1"
    unit = "pictures"

    def __init__(self, encoder: ClipEncoder, pictures: ClassedPictures, templates: Sequence[str] = TEMPLATES) -> None:
        self.encoder, self.pictures, self.templates = encoder, pictures, list(templates)
        self.labels = list(pictures.classes)

    def examples(self) -> ClassedPictures:
        return self.pictures

    def settings(self) -> dict[str, Any]:
        return {**self.encoder.settings(), "templates": self.templates, "classes": self.pictures.classes}

    @cached_property
    def _class_texts(self) -> Tensor:
        """(C, E)."""
        return self.encoder.texts(list(self.pictures.classes.values()), self.templates)

    def truth(self, example: ClassedPicture) -> Prediction:
        return {"label": example.label, "image": str(example.path.absolute())}

    def predict(self, example: ClassedPicture) -> Prediction:
        return next(iter(self.predict_batch([example])))

    def predict_batch(self, examples: list[ClassedPicture]) -> Iterable[Prediction]:
        """The best classes with their cosines."""
        embedded = self.encoder.pictures([example.load() for example in examples])
        cosines, places = (embedded @ self._class_texts.T).topk(min(TOP, len(self.labels)))
        for row, values in zip(places.tolist(), cosines.tolist(), strict=True):
            best = [[self.labels[place], round(value, 5)] for place, value in zip(row, values, strict=True)]
            yield {"best": best}

    def score(self, predictions: list[Prediction]) -> Scores:
        """Shares of pictures, and the mean over the classes that occur."""
        ranks = [_rank(prediction) for prediction in predictions]
        labels = [prediction["label"] for prediction in predictions]
        total = Counter(labels)
        right = Counter(label for label, rank in zip(labels, ranks, strict=True) if rank == 0)
        pictures = len(ranks) + len(self.pictures.strays)
        metrics = {
            "pictures": pictures,
            "classes": len(self.labels),
            "top1": sum(rank == 0 for rank in ranks) / pictures,
            f"top{TOP}": sum(rank < TOP for rank in ranks) / pictures,
            "class_top1": sum(right[label] / count for label, count in total.items()) / len(total),
        }
        cases = [self._case(row) for row in ends(predictions, _margin)]
        return Scores(metrics, cases=cases, faults=self.pictures.strays)

    def _case(self, prediction: Prediction) -> Case:
        names = self.pictures.classes
        said = "\n".join(f"{cosine:.3f} {names[label]}" for label, cosine in prediction.get("best", []))
        return {
            "score": _margin(prediction),
            "title": prediction["id"],
            "text": f"truth: {names.get(prediction['label'], '-')}\n{prediction.get('fault', said)}",
            "image": prediction["image"],
        }


def _rank(prediction: Prediction) -> int:
    """Place of the right class among the best; `TOP` where it is not among them."""
    labels = [label for label, _ in prediction.get("best", [])]
    return labels.index(prediction["label"]) if prediction["label"] in labels else TOP


def _margin(prediction: Prediction) -> float:
    """By how much the right class is ahead of the next, or behind the first; -1 where it is not among the best."""
    rank, best = _rank(prediction), prediction.get("best", [])
    if rank == TOP:
        return -1.0
    rival = best[1 if rank == 0 else 0][1] if len(best) > 1 else 0.0
    return float(best[rank][1] - rival)


# The command


def read_templates(path: Path | None) -> Sequence[str]:
    """Templates of a file, one a line; by default one.

    Raises:
        InputError: the file is missing or empty, or a line has no {} for the name.
    """
    if path is None:
        return TEMPLATES
    if not path.is_file():
        raise MissingFileError(f"templates: there is no file {path}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or not all("{}" in line for line in lines):
        raise InputError(f"{path} must hold one template a line, each with {{}} in the place of the name")
    return lines


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser("zero_shot", __doc__)
    clip_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="folder of folders, or COCO-style file")
    add("--images", type=Path, metavar="DIR", help="of a file: folder of the pictures")
    add("--classes", type=Path, metavar="FILE", help="names of the classes")
    add("--templates", type=Path, metavar="FILE", help=f"one a line, with {{}} for the name [{TEMPLATES[0]}]")
    args = parse(parser, arguments)
    pictures = open_classed(args.data, args.images, None if args.classes is None else read_names(args.classes))
    templates = read_templates(args.templates)
    encoder, model = load_encoder(args)
    return finish(evaluate(ZeroShot(encoder, pictures, templates), args, model, args.batch_size), args)


if __name__ == "__main__":
    sys.exit(cli(main))
