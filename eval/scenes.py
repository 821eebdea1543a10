"""Masks, names and captions on composed scenes and real photos.

    python -m eval.scenes --data composed_sample/sample.json coco_open/instances_train.json --out r.json
    python -m eval.scenes --compose --sprites emoji grocery --backgrounds photos --hold-out 0.12 \\
        --count 200 --seed 1000000000 --out r.json                     # unseen scenes, of known and of held-out names
    python -m eval.scenes --model my-folder --compose --shapes --out r.json        # drawn shapes on drawn backgrounds

Both kinds of sources may be given at once. Every region with a mask is prompted with the tight box of that mask, and
with clicks: the first deepest inside the mask, each further one deepest inside the largest connected part that is
still wrong. Masks are compared at the picture's own resolution, in the slot that the model routes the prompt to.
Captions are greedy, for the box. A name is known if it is in the concept space and was not held out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from tap_llm.data.scenes import SceneComposer
from tap_llm.encoded import EncodedImage
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle, mask_to_box
from tap_llm.pipelines import RegionPipeline
from training.examples import DataConfig, make_composers

from .base import Benchmark, Case, Examples, Prediction, Run, Scores, describe_model
from .cases import CaseRegion, picture_of_case
from .clicks import Clicks
from .command import benchmark_parser, cli, common_arguments, evaluate, finish, load_pipeline, parse, positive
from .overlap import ellipse_in_box, filled_box, iou
from .scene_scores import SceneScores
from .scene_sources import FileSource, Picture, SceneSource, Source
from .sheets import write_sheets
from .tables import metric_table

CLICKS, NAMES = 5, 5
FIRST_SEED = 10**9  # training stays below

Result = dict[str, Any]


class Scenes(Benchmark):
    """See the module's head.

    Args:
        pipe: model under test.
        sources: pictures.
        scorer: turns predictions into metrics.
        batch_size: regions decoded at once; the first pass of a picture encodes it for all.
    """

    protocol = "scenes-v1"
    unit = "regions"

    def __init__(
        self, pipe: RegionPipeline, sources: Sequence[Source], scorer: SceneScores, batch_size: int = 64
    ) -> None:
        self.pipe, self.sources, self.scorer, self.batch_size = pipe, sources, scorer, batch_size

    def examples(self) -> Examples:
        return ConcatDataset(self.sources)

    def count(self, prediction: Prediction) -> int:
        return len(prediction["regions"])

    def score(self, predictions: list[Prediction]) -> Scores:
        scores = self.scorer(predictions)
        scores.cases = scene_cases(predictions)
        return scores

    def settings(self) -> dict[str, Any]:
        return {"clicks": CLICKS, "names": NAMES}

    def truth(self, example: Picture) -> Prediction:
        """The regions, as if each had been answered with nothing."""
        nothing = {"prompt": {}, "iou": 0.0, "predicted_iou": 0.0, "caption": "", "mask": None}
        nothing["concepts"] = [] if self.scorer.concepts is None else [["", 0.0]]
        wrong = {"box": nothing, "click": nothing, "click_ious": [0.0] * CLICKS}
        regions = [region | wrong for region in self._regions(example)]
        return {"source": example.source, "left_out": example.left_out, "image": example.path, "regions": regions}

    def _regions(self, example: Picture) -> list[dict[str, Any]]:
        """What is known of the regions."""
        return [
            {
                "truth": asdict(truth),
                "mask": encode_rle(mask),
                "captioned": self.pipe.can_caption,
                "baselines": _baselines(mask),
            }
            for truth, mask in zip(example.truths, example.masks, strict=True)
        ]

    def predict(self, example: Picture) -> Prediction:
        """Answers to the box and to the clicks of each region; masks as RLE."""
        if not example.truths:
            return {"regions": []}
        image = example.load()
        encoded = self.pipe.encode(image)
        boxes = [mask_to_box(mask) for mask in example.masks]
        by_box = self._ask(encoded, [{"box": box} for box in boxes], captions=self.pipe.can_caption)
        rounds = self._click(encoded, example.masks)
        regions = [
            {
                **known,
                "box": _answer(by_box[row], mask),
                "click": _answer(rounds[0][row], mask),
                "click_ious": [iou(results[row]["mask"], mask) for results in rounds],
            }
            for row, (known, mask) in enumerate(zip(self._regions(example), example.masks, strict=True))
        ]
        return {"image": picture_of_case(image, example.path), "regions": regions}

    def _ask(self, encoded: EncodedImage, prompts: list[dict[str, Any]], captions: bool = False) -> list[Result]:
        answers: Any = self.pipe(encoded, prompts, captions=captions, top_k=NAMES, batch_size=self.batch_size)
        return answers

    def _click(self, encoded: EncodedImage, masks: NDArray[np.bool_]) -> list[list[Result]]:
        """Results after 1, 2, … clicks; a mask without any error gets no further click."""
        clicks = Clicks(masks)
        rounds = [self._ask(encoded, clicks.prompts())]
        while len(rounds) < CLICKS:
            clicks.correct([result["mask"] for result in rounds[-1]])
            rounds.append(self._ask(encoded, clicks.prompts()))
        return rounds


def _answer(result: Result, truth: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "prompt": result["region"],
        "iou": iou(result["mask"], truth),
        "predicted_iou": result["iou"],
        "concepts": result["concepts"],
        "caption": result["caption"],
        "mask": encode_rle(result["mask"]),
    }


def _baselines(mask: NDArray[np.bool_]) -> dict[str, float]:
    """What needs no model: the box filled, and the ellipse within it."""
    box = mask_to_box(mask)
    assert box is not None
    shapes = {"ellipse": ellipse_in_box, "filled_box": filled_box}
    return {name: iou(draw(box, mask.shape), mask) for name, draw in shapes.items()}


def scene_cases(predictions: Sequence[Prediction]) -> list[Case]:
    """Every answer to a box and to a click, by IoU; grouped by source and prompt."""
    return [
        {
            "score": region[prompt]["iou"],
            "title": f"{prediction['id']}: {region['truth']['name'] or 'a region without a name'}",
            "text": _told(region["truth"]["captions"], region[prompt], prediction.get("fault")),
            "image": prediction["image"],
            "group": f"{prediction['source']}, {prompt}",
            "truth": [{"mask": region["mask"], "concept": region["truth"]["name"] or ""}],
            "answer": [_shown(region[prompt])],
        }
        for prediction in predictions
        for region in prediction["regions"]
        for prompt in ("box", "click")
    ]


def _told(captions: Sequence[str], answer: dict[str, Any], fault: str | None) -> str:
    if fault:
        return f"no answer: {fault}"
    lines = {
        "expected": captions[0] if captions else "",
        "said": answer["caption"],
        "named": answer["concepts"][0][0] if answer["concepts"] else "",
    }
    return "\n".join(f"{key}: {text}" for key, text in lines.items() if text)


def _shown(answer: dict[str, Any]) -> CaseRegion:
    concept, score = answer["concepts"][0] if answer["concepts"] else ("", 0.0)
    known = CaseRegion(region=answer["prompt"], concept=concept, concept_score=score, caption=answer["caption"])
    return known if answer["mask"] is None else {**known, "mask": answer["mask"]}


# The command


def main(arguments: Sequence[str] | None = None) -> Run:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    args = parse(_parser(), arguments)
    known, novel = _composers(args)
    sources = [*_file_sources(args), *(_scene_sources(args, known, novel) if args.compose else [])]
    if not sources:
        raise InputError("nothing to evaluate: give --data FILE …, or --compose with --sprites DIR … or --shapes")
    pipe = load_pipeline(args)
    scorer = SceneScores(
        None if pipe.concepts is None else [name.lower() for name in pipe.concepts.names],
        novel.sprites.names if novel is not None and novel.sprites is not None else (),
        None if args.known_names is None else read_names(args.known_names),
        references=not args.no_references,
    )
    benchmark = Scenes(pipe, sources, scorer, args.batch_size)
    finished = evaluate(benchmark, args, describe_model(pipe, args.model))
    small = sum(prediction["left_out"] for prediction in finished.predictions)
    counts = f"{finished.results['examples']} images, {finished.results['regions']} regions"
    finish(finished, args, _tables(finished), [f"{counts}; {small} regions left out as too small"])
    if args.pictures is not None:
        for path in write_sheets(args.pictures, scene_cases(finished.predictions)):
            print(f"wrote {path}")
    return finished


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("scenes", __doc__)
    common_arguments(parser, batch="regions decoded at once", limit=False)
    add = parser.add_argument
    add("--data", nargs="+", type=Path, default=[], metavar="FILE", help="samples with masks, such as COCO files")
    add("--every", type=positive, default=1, metavar="K", help="of --data: every K-th sample, starting with the first")
    add("--limit", type=positive, dest="most", metavar="N", help="of --data: at most N samples of each file")
    add("--min-area", type=float, metavar="SHARE", help="of --data: least share of the picture [0.01]")
    add("--compose", action="store_true", help="compose scenes")
    add("--sprites", nargs="+", default=[], metavar="DIR", help="named cut-outs for --compose and --hold-out")
    add("--backgrounds", nargs="+", default=[], metavar="DIR", help="pictures behind them; drawn ones by default")
    add("--hold-out", type=float, default=0.0, metavar="SHARE", help="data.hold_out of the training: novel names")
    add("--shapes", action="store_true", help="with --compose: scenes of drawn shapes only, beside those of --sprites")
    add("--count", type=positive, default=200, help="scenes of known names, of novel names, of drawn shapes, each")
    add("--seed", type=int, default=FIRST_SEED, help="of the first scene")
    add("--size", type=_size, default=(400, 300), metavar="WxH", help="of the scenes [400x300]")
    add("--known-names", type=Path, metavar="FILE", help="names seen in training: JSON list, or one a line")
    add("--pictures", type=Path, metavar="DIR", help="write contact sheets of the worst and best cases")
    add("--no-references", action="store_true", help="leave out CIDEr-D and METEOR, which start Java")
    return parser


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def _file_sources(args: argparse.Namespace) -> list[FileSource]:
    least = 0.01 if args.min_area is None else args.min_area
    return [FileSource(path, args.every, args.most, least) for path in args.data]


def _composers(args: argparse.Namespace) -> tuple[SceneComposer | None, SceneComposer | None]:
    """Composers of known and of held-out names, split as training splits them; None without sprites."""
    if not args.sprites:
        if args.hold_out:
            raise InputError("--hold-out splits the names of --sprites DIR …, which is missing")
        return None, None
    config = DataConfig(sprites=args.sprites, backgrounds=args.backgrounds, hold_out=args.hold_out)
    return make_composers(config)


def _scene_sources(
    args: argparse.Namespace, known: SceneComposer | None, novel: SceneComposer | None
) -> list[SceneSource]:
    if known is None and not args.shapes:
        raise InputError("--compose needs --sprites DIR …, --shapes, or both")
    shapes = SceneComposer(None, args.backgrounds) if args.shapes else None
    parts = [("scenes", "known", known), ("scenes", "novel", novel), ("shapes", "drawn", shapes)]
    return [
        SceneSource(name, part, composer, args.count, args.seed, args.size)
        for name, part, composer in parts
        if composer is not None
    ]


def read_names(path: Path) -> list[str]:
    """Names, lower-case, of a JSON list or of a text file with one a line.

    Raises:
        InputError: the file cannot be read, or is JSON of another kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the names in {path}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} must hold a list of names")
    return [name.strip().lower() for name in names if name.strip()]


def _tables(finished: Run) -> str:
    return "\n".join(
        f"\n{source}{title}\n{metric_table(shown)}"
        for source, groups in finished.results["metrics"].items()
        for title, shown in _columns(groups).items()
    )


def _columns(groups: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups as tables that fit a screen: all, known and novel; then the kinds of each (of all, without names)."""
    tables = {"": {name: metrics for name, metrics in groups.items() if "/" not in name}}
    splits = [name for name in tables[""] if name != "all"] or ["all"]
    for split in splits:
        kinds = {name: metrics for name, metrics in groups.items() if name.startswith(f"{split}/")}
        if kinds:
            tables[f", {split} by kind"] = {name.partition("/")[2]: metrics for name, metrics in kinds.items()}
    return tables


if __name__ == "__main__":
    sys.exit(cli(main))
