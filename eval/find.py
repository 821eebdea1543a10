"""Finding things by text on composed scenes: half of the queries name what is there, the others what is not.

    python -m eval.find --out find.json                                # bundled models, pictograms and drawn shapes
    python -m eval.find --ablations --count 30 --out ablations.json    # the paper's ablations, one line each
    python -m eval.find --sprites emoji grocery --backgrounds photos --no-recurrence --refine crf --out first.json

Needs no download. The queries of a scene are the names of its objects, and as many names of the scenes that follow,
which share no word with those. Seeds start at 1000000000, which training never reaches.

    present_miou      mean IoU over queries that name something; 0 where nothing is found
    all_miou          mean over all queries, where an absent one counts 1 if nothing is found, and else 0
    class_miou        one confusion matrix over all scenes, mean over the names that occur, as for VOC: wherever a name
                      is found in vain, the pixels count against it
    present_kept      share of present queries for which anything is found
    absent_rejected   share of absent queries for which nothing is found

Published for CaR on VOC, mIoU: 67.6; without recurrence 15.2; with plain Grad-CAM 41.1; single prompts circle 66.9,
contour 66.0, blur 66.4, gray 66.1, black 61.8; with masks of HQ-SAM 70.2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tap_llm.clip_as_rnn import CarPipeline
from tap_llm.clip_as_rnn.configuration_car import PROMPTS
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle
from training.sources import DataConfig, make_composers

from .base import Benchmark, Prediction, Run, Scores
from .cases import embedded
from .command import benchmark_parser, cli, evaluate, finish, parse, positive
from .find_scenes import FindScene, FindScenes
from .find_scores import find_cases, find_metrics, variants_table
from .scenes import FIRST_SEED
from .segmenters import CarSegmenter, car_arguments, describe_car, load_car

Options = Mapping[str, Any]
_CRF: Options = {"refine": "crf"}
ABLATIONS: dict[str, Options] = {
    "CRF and TAP": {"refine": "tap"},
    "CRF": _CRF,
    "no refinement": {"refine": "none"},
    "CRF, no recurrence": {**_CRF, "max_steps": 1},
    "CRF, plain Grad-CAM": {**_CRF, "cam": "grad_cam"},
    **{f"CRF, {prompt} alone": {**_CRF, "prompts": (prompt,)} for prompt in PROMPTS},
}


class Find(Benchmark):
    """See the module's head.

    Args:
        car: model under test.
        scenes: what to look for, and where.
        variants: settings of CaR by the name of their results; the picture is encoded once for all.
    """

    protocol = "find-v1"
    unit = "queries"

    def __init__(self, car: CarPipeline, scenes: FindScenes, variants: Mapping[str, Options]) -> None:
        self.car, self.scenes, self.variants = car, scenes, dict(variants)

    def examples(self) -> FindScenes:
        return self.scenes

    def settings(self) -> dict[str, Any]:
        return {**CarSegmenter(self.car).settings(), "variants": self.variants}

    def count(self, prediction: Prediction) -> int:
        return len(prediction["queries"]) * len(self.variants)

    def truth(self, example: FindScene) -> Prediction:
        """Queries and true masks."""
        masks = [encode_rle(mask) if mask.any() else None for mask in example.masks]
        pixels = example.masks.sum(axis=(1, 2)).tolist()
        return {"queries": example.queries, "true_masks": masks, "pixels": pixels, "image": embedded(example.image)}

    def predict(self, example: FindScene) -> Prediction:
        """What each variant finds for each query."""
        encoded = self.car.encode(example.image)
        found = {}
        for name, options in self.variants.items():
            answer = self.car(encoded, example.queries, mode="semantic", progress=False, **options)
            rows = zip(answer.masks, example.masks, answer.scores.tolist(), strict=True)
            found[name] = {"steps": answer.steps, "queries": [_answer(*row) for row in rows]}
        return {"found": found}

    def score(self, predictions: list[Prediction]) -> Scores:
        """Metrics of each variant, and cases of the first."""
        metrics = {name: find_metrics(predictions, name) for name in self.variants}
        return Scores(metrics, cases=find_cases(predictions, next(iter(self.variants))))


def _answer(mask: Any, true: Any, score: float) -> dict[str, Any]:
    return {
        "score": round(score, 4),
        "found": int(mask.sum()),
        "shared": int((mask & true).sum()),
        "mask": encode_rle(mask) if mask.any() else None,
    }


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    args = parse(_parser(), arguments)
    scenes = FindScenes(_composer(args), args.count, args.seed, tuple(args.size), args.distractors)
    car = load_car(args)
    variants = ABLATIONS if args.ablations else {"find": _switches(args)}
    with_tap = any(options.get("refine", args.refine) == "tap" for options in variants.values())
    finished = evaluate(Find(car, scenes, variants), args, describe_car(car, args.model, with_tap))
    return finish(finished, args, variants_table(finished.results["metrics"]))


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("find", __doc__)
    car_arguments(parser, refine="tap")
    add = parser.add_argument
    add("--ablations", action="store_true", help="a line for each of the paper's ablations, in place of one result")
    add("--no-recurrence", action="store_true", help="the first step only: nothing is dropped")
    add("--plain-cam", action="store_true", help="Grad-CAM without competing texts and affinity")
    add("--prompts", nargs="+", choices=PROMPTS, help="visual prompts, in place of the preset's")
    add("--sprites", nargs="+", default=[], metavar="DIR", help="named cut-outs; by default the bundled pictograms")
    add("--backgrounds", nargs="+", default=[], metavar="DIR", help="pictures behind them; drawn ones by default")
    add(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="data.hold_out of the training: held-out names only",
    )
    add("--count", type=positive, default=100, help="scenes [100]")
    add("--seed", type=int, default=FIRST_SEED, help="of the first scene")
    add("--size", type=positive, nargs=2, default=(400, 300), metavar=("W", "H"), help="of the scenes [400 300]")
    add("--distractors", type=float, default=1.0, metavar="RATIO", help="absent names for each present one [1]")
    return parser


def _switches(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of CaR that the switches stand for."""
    return {
        **({"max_steps": 1} if args.no_recurrence else {}),
        **({"cam": "grad_cam"} if args.plain_cam else {}),
        **({"prompts": tuple(args.prompts)} if args.prompts else {}),
    }


def _composer(args: argparse.Namespace) -> SceneComposer:
    if args.ablations and (args.no_recurrence or args.plain_cam or args.prompts):
        raise InputError("--ablations tries all switches: leave out --no-recurrence, --plain-cam and --prompts")
    if not args.sprites:
        if args.hold_out:
            raise InputError("--hold-out splits the names of --sprites DIR …, which is missing")
        return SceneComposer(SpriteLibrary.bundled(), args.backgrounds)
    known, novel = make_composers(
        DataConfig(sprites=args.sprites, backgrounds=args.backgrounds, hold_out=args.hold_out)
    )
    return known if novel is None else novel


if __name__ == "__main__":
    sys.exit(cli(main))
