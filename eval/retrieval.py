"""Image–text retrieval by any CLIP: which caption belongs to a picture, and which picture to a caption.

    python -m eval.retrieval --model openai/clip-vit-base-patch16 --data dataset_coco.json --images coco/val2014 \\
        --split test --out coco.json
    python -m eval.retrieval --data coco_open/captions_val.json --out coco_open.json

--data is a file of Karpathy's splits (dataset_coco.json: 5,000 pictures of split test, in COCO's val2014;
dataset_flickr30k.json: 1,000), or a COCO caption file such as captions_val2017.json. Pictures have one or more
captions. A caption is embedded as it is, or in --template; CLIP's own numbers prepend "a photo of".

Recall at k: a picture is found again if one of its captions is among the k that fit best, of all captions of all
pictures; a caption if its picture is. Equal similarities count against the model. Pictures that cannot be read are not
found, nor are their captions, which still compete with the others.
Published for CLIP ViT-L/14 at 336 pixels, R@1/5/10: COCO picture to text 58.4/81.5/88.1, text to picture
37.8/62.4/72.2; Flickr30k 88.0/98.7/99.4 and 68.7/90.6/95.2.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tap_llm.errors import InputError
from tap_llm.images import load_image

from .base import Benchmark, Case, Prediction, Run, Scores
from .captioned_pictures import CaptionedPicture, CaptionedPictures
from .clips import ClipEncoder, clip_arguments, load_encoder
from .command import benchmark_parser, cli, evaluate, finish, parse
from .region_cases import ends

RECALLS = (1, 5, 10)
MISSED = 10**9  # rank of what was not found
_ROWS = 1024  # compared at once
_EQUAL = 1e-6  # cosines so near each other are equal but for rounding


class Retrieval(Benchmark):
    """See the module's head.

    Args:
        encoder: model under test.
        pictures: with their captions.
        template: text with "{}" in the place of the caption.
    """

    protocol = "retrieval-v1"
    unit = "pictures"

    def __init__(self, encoder: ClipEncoder, pictures: CaptionedPictures, template: str = "{}") -> None:
        self.encoder, self.pictures, self.template = encoder, pictures, template
        if "{}" not in template:
            raise InputError(f"a template must have {{}} in the place of the caption, got {template!r}")

    def examples(self) -> CaptionedPictures:
        return self.pictures

    def settings(self) -> dict[str, Any]:
        return {**self.encoder.settings(), "template": self.template}

    def truth(self, example: CaptionedPicture) -> Prediction:
        return {"image": str(example.path.absolute()), "captions": example.captions}

    def predict(self, example: CaptionedPicture) -> Prediction:
        return next(iter(self.predict_batch([example])))

    def predict_batch(self, examples: list[CaptionedPicture]) -> Iterable[Prediction]:
        """Embeddings; of a picture that cannot be read those of its captions alone, and why."""
        images, problems = [], []
        for example in examples:
            try:
                images.append(load_image(example.path))
                problems.append("")
            except InputError as error:
                problems.append(str(error))
        pictures = iter(self.encoder.pictures(images))
        said = [caption for example in examples for caption in example.captions]
        texts = self.encoder.texts(said, [self.template])
        parts = texts.split([len(example.captions) for example in examples])
        for problem, rows in zip(problems, parts, strict=True):
            yield {"picture": None if problem else _pack(next(pictures)), "texts": _pack(rows), "problem": problem}

    def score(self, predictions: list[Prediction]) -> Scores:
        """Recall both ways."""
        texts, owners = _unpack_texts(predictions)
        seen = [place for place, prediction in enumerate(predictions) if prediction.get("picture")]
        pictures = torch.cat([texts[:0], *(_unpack(predictions[place]["picture"], 1) for place in seen)])
        places = torch.tensor(seen, dtype=torch.int64)
        of_pictures = [MISSED] * len(predictions)
        for place, rank in zip(seen, ranks_of_own(pictures, texts, places, owners), strict=True):
            of_pictures[place] = rank
        of_texts = ranks_of_own(texts, pictures, owners, places)
        unread = sum(len(prediction["captions"]) for prediction in predictions) - len(texts)
        missed = unread + len(self.pictures.strays)
        metrics = {
            "picture_to_text": _recalls([*of_pictures, *[MISSED] * len(self.pictures.bare)]),
            "text_to_picture": _recalls([*of_texts, *[MISSED] * missed]),
        }
        problems = [f"{one['id']}: {one['problem']}" for one in predictions if one.get("problem")]
        cases = [_case(*row) for row in ends(zip(predictions, of_pictures, strict=True), lambda row: -row[1])]
        return Scores(metrics, cases=cases, faults=[*self.pictures.bare, *self.pictures.strays, *problems])


def ranks_of_own(queries: Tensor, items: Tensor, wanted: Tensor, owners: Tensor) -> list[int]:
    """For each query, how many items of others are at least as near as the nearest of its own.

    Args:
        queries: (N, E) unit vectors.
        items: (M, E) unit vectors.
        wanted: (N,) number of the picture that each query belongs to.
        owners: (M,) likewise of each item.

    Returns:
        N ranks from 0; `MISSED` where no item is the query's own.
    """
    ranks: list[int] = []
    for rows, numbers in zip(queries.split(_ROWS), wanted.split(_ROWS), strict=True):
        cosines, own = rows @ items.T, numbers[:, None] == owners
        best = torch.where(own, cosines, -torch.inf).amax(dim=1, keepdim=True) if len(items) else cosines
        nearer = ((cosines >= best - _EQUAL) & ~own).sum(dim=1)
        ranks += torch.where(own.any(dim=1), nearer, MISSED).tolist()
    return ranks


def _recalls(ranks: Sequence[int]) -> dict[str, float | int | None]:
    shares = {f"r{k}": sum(rank < k for rank in ranks) / len(ranks) if ranks else None for k in RECALLS}
    return {"asked": len(ranks), **shares}


def _pack(vectors: Tensor) -> str:
    """float32 as base64."""
    return base64.b64encode(vectors.numpy().astype("<f4").tobytes()).decode()


def _unpack(text: str, count: int) -> Tensor:
    """(count, E)."""
    values = np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
    return torch.from_numpy(values.reshape(count, -1))


def _unpack_texts(predictions: Sequence[Prediction]) -> tuple[Tensor, Tensor]:
    """(T, E) captions, and (T,) the place of the picture that each belongs to."""
    answered = [(place, one) for place, one in enumerate(predictions) if "texts" in one]
    texts = torch.cat([_unpack(one["texts"], len(one["captions"])) for _, one in answered])
    owners = [place for place, one in answered for _ in one["captions"]]
    return texts, torch.tensor(owners)


def _case(prediction: Prediction, rank: int) -> Case:
    problem = prediction.get("fault") or prediction.get("problem")
    note = problem or f"captions of other pictures that are nearer: {rank}"
    return {
        "score": float(-rank),
        "title": prediction["id"],
        "text": "\n".join([note, *prediction["captions"]]),
        "image": prediction["image"],
    }


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser("retrieval", __doc__)
    clip_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="captions")
    add("--images", type=Path, metavar="DIR", help="folder of the pictures, or the one above")
    add("--split", default="test", metavar="NAME", help="of Karpathy's files [test]")
    add("--template", default="{}", metavar="TEXT", help="what captions are put in, such as 'a photo of {}' [{}]")
    args = parse(parser, arguments)
    pictures = CaptionedPictures(args.data, args.images, args.split)
    encoder, model = load_encoder(args)
    return finish(evaluate(Retrieval(encoder, pictures, args.template), args, model, args.batch_size), args)


if __name__ == "__main__":
    sys.exit(cli(main))
