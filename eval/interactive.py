"""Interactive segmentation: how good the mask of a region is after 1, 3, 5, 7 and 9 clicks (TAP, section 4).

    python -m eval.interactive --model tap_vit_l_v1_1 --data instances_val2017.json --images coco --out clicks.json
    python -m eval.interactive --data coco_open/instances_train.json --every 5 --out clicks.json

Needs any file of samples with masks: COCO's `instances_val2017.json` with val2017, `lvis_v1_val.json`, SA-1B, our JSON
lines … Nothing is published for TAP; one click on COCO and LVIS is a cheap check of a port against the original.

The first click lies deepest inside the mask, each further one deepest inside the largest connected part that is still
wrong, as foreground or background. The mask is that of the slot (1 to 3) with the highest predicted IoU; its IoU is
measured at the picture's own resolution, the mean is over all regions that have a mask. A region without any error gets
no further click. Regions that cannot be asked for count as 0, as does each fault of the file as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tap_llm.data.readers import open_samples
from tap_llm.data.samples import RegionSample, encode_image
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle
from tap_llm.pipelines import RegionPipeline
from tap_llm.regions import read_mask, region_to_json

from .annotations import annotation_arguments
from .base import Benchmark, Case, Example, Prediction, Run, Scores, describe_model, fingerprint
from .cases import embedded
from .clicks import Clicks
from .command import benchmark_parser, cli, common_arguments, evaluate, finish, load_pipeline, parse
from .overlap import Mask, iou
from .prompting import EncodedPictures
from .region_cases import ends

CLICKS = 9
SHOWN = (1, 3, 5, 7, 9)


@dataclass(frozen=True, eq=False)
class Masked(Example):
    """A sample to click on.

    Attributes:
        place: in the file's list of pictures that are evaluated.
        sample: what the file says, nothing of it read yet.
        problem: why it cannot be used; "" where it can.
    """

    place: int
    sample: RegionSample
    problem: str = ""

    def load(self) -> tuple[Image.Image, dict[int, Mask], list[str]]:
        """Picture, (H, W) masks by the number of their region, and what is wrong with others.

        Raises:
            InputError: the picture or the whole sample cannot be used.
        """
        if self.problem:
            raise InputError(self.problem)
        image = self.sample.load_image()
        masks, faults = {}, []
        for place in np.flatnonzero(self.sample.has_mask).tolist():
            region = self.sample.regions[place]
            try:
                masks[place] = read_mask(region["mask"], image.height, image.width)
            except InputError as error:
                faults.append(f"{self.id}: region {region.get('id', place)}: {error}")
        return image, masks, faults


class MaskedSamples(Sequence[Masked]):
    """The samples of a file, in any form that `open_samples` reads; what cannot be read has a problem.

    Args:
        path: the file.
        image_root: folder of the pictures, where it is not that of the file.
        every: take every so many-th sample, starting with the first.

    Attributes:
        faults: of the file as a whole.

    Raises:
        InputError: missing, damaged, of an unknown form, or empty.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, every: int = 1) -> None:
        self._samples = open_samples(path, image_root=image_root)
        self._picks = range(len(self._samples))[::every]
        self.faults = self._samples.faults
        if not self._picks:
            raise InputError(f"{path} holds no samples")

    def __len__(self) -> int:
        return len(self._picks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._samples.where(self._picks[index])
        try:
            sample = self._samples[self._picks[index]]
            seal = fingerprint(_pixels(sample), [region_to_json(region) for region in sample.regions])
        except InputError as error:
            return Masked(name, "", index, RegionSample(None), str(error))
        return Masked(name, seal, index, sample)


def _pixels(sample: RegionSample) -> Any:
    """The picture's file as an array; None where it is missing, which `load` will say."""
    try:
        return np.frombuffer(encode_image(sample.image), dtype=np.uint8)
    except InputError:
        return None


class Interactive(Benchmark):
    """See the module's head.

    Args:
        pipe: model under test.
        samples: pictures with masks.
        batch_size: regions decoded at once.
    """

    protocol = "interactive-v1"
    unit = "regions"

    def __init__(self, pipe: RegionPipeline, samples: MaskedSamples, batch_size: int = 64) -> None:
        self.pipe, self.samples, self.batch_size = pipe, samples, batch_size

    def examples(self) -> MaskedSamples:
        return self.samples

    def settings(self) -> dict[str, Any]:
        return {"clicks": CLICKS}

    def count(self, prediction: Prediction) -> int:
        return len(prediction["regions"])

    def truth(self, example: Masked) -> Prediction:
        """Regions with a mask; a sample that cannot be read counts as one."""
        regions = 1 if example.problem else int(example.sample.has_mask.sum())
        return {"place": example.place, "true_regions": regions}

    def predict(self, example: Masked) -> Prediction:
        return next(iter(self.predict_batch([example])))

    def predict_batch(self, examples: list[Masked]) -> Iterable[Prediction]:
        """For each region the IoU after 1, 2, … clicks, the clicks, and the last mask; all pictures click together."""
        images, masks, faults = zip(*(example.load() for example in examples), strict=True)
        clicked = [place for place, of_one in enumerate(masks) if of_one]
        regions: list[list[dict[str, Any]]] = [[] for _ in examples]
        if clicked:
            encoded = EncodedPictures(self.pipe, [images[place] for place in clicked], self.batch_size)
            for place, found in zip(clicked, _click(encoded, [masks[place] for place in clicked]), strict=True):
                regions[place] = found
        return [{"regions": found, "faults": wrong} for found, wrong in zip(regions, faults, strict=True)]

    def score(self, predictions: list[Prediction]) -> Scores:
        """Mean IoU after so many clicks, over all regions."""
        ious = [region["ious"] for prediction in predictions for region in prediction.get("regions", [])]
        regions = sum(prediction["true_regions"] for prediction in predictions) + len(self.samples.faults)
        broken = [fault for prediction in predictions for fault in prediction.get("faults", [])]
        means = {
            f"clicks_{count}_miou": sum(row[count - 1] for row in ious) / regions if regions else None
            for count in SHOWN
        }
        faults = [*self.samples.faults, *broken]
        return Scores({"true_regions": regions, **means}, cases=self._cases(predictions), faults=faults)

    def _cases(self, predictions: list[Prediction]) -> list[Case]:
        rows = [(one["place"], region) for one in predictions for region in one.get("regions", [])]
        return [self._case(*row) for row in ends(rows, key=lambda row: float(np.mean(row[1]["ious"])))]

    def _case(self, place: int, region: dict[str, Any]) -> Case:
        """The last mask beside the true one."""
        example = self.samples[place]
        sample, (height, width) = example.sample, region["mask"]["size"]
        is_file = isinstance(sample.image, (str, Path))
        true = read_mask(sample.regions[region["place"]]["mask"], height, width)
        return {
            "score": float(np.mean(region["ious"])),
            "title": f"{example.id}: region {region['place']}",
            "text": "IoU after 1, 2, … clicks: " + ", ".join(f"{value:.2f}" for value in region["ious"]),
            "image": str(Path(sample.image).absolute()) if is_file else embedded(sample.load_image()),
            "truth": [{"mask": encode_rle(true)}],
            "answer": [{"mask": region["mask"], "region": region["prompt"]}],
        }


def _click(encoded: EncodedPictures, masks: Sequence[dict[int, Mask]]) -> list[list[dict[str, Any]]]:
    """What becomes of each region of each picture."""
    users = [Clicks(np.stack([*of_one.values()])) for of_one in masks]
    found: list[list[dict[str, Any]]] = [[{"place": place, "ious": []} for place in of_one] for of_one in masks]
    for count in range(CLICKS):
        prompts = [user.prompts() for user in users]
        answers = encoded.ask(prompts)
        predicted = [[answer.mask for answer in of_one] for of_one in answers]
        for user, shown, wanted, regions in zip(users, predicted, masks, found, strict=True):
            for region, mask, true in zip(regions, shown, wanted.values(), strict=True):
                region["ious"].append(iou(mask, true))
            if count + 1 < CLICKS:
                user.correct(shown)
    for regions, of_one, asked in zip(found, answers, prompts, strict=True):
        for region, answer, prompt in zip(regions, of_one, asked, strict=True):
            region |= {"prompt": prompt, "mask": answer.rle()}
    return found


def main(arguments: Sequence[str] | None = None) -> Run | None:
    """Run the command; returns what it found.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser("interactive", __doc__)
    common_arguments(parser, batch="regions decoded at once")
    annotation_arguments(parser, "samples with masks, such as COCO annotations")
    args = parse(parser, arguments)
    samples = MaskedSamples(args.data, args.images, args.every)
    pipe = load_pipeline(args)
    benchmark = Interactive(pipe, samples, args.batch_size)
    return finish(evaluate(benchmark, args, describe_model(pipe, args.model), args.pictures), args)


if __name__ == "__main__":
    sys.exit(cli(main))
