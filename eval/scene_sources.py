"""Pictures with regions whose masks and words are known: files of samples, and scenes composed on the fly."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from tap_llm.data.colours import words_in
from tap_llm.data.readers import open_samples
from tap_llm.data.samples import RegionSample
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.wording import split_article
from tap_llm.errors import InputError

from .base import Example, fingerprint

_SHAPE_KEYS = ("shape", "texture", "size")


@dataclass(frozen=True)
class Truth:
    """What is known of a region in words.

    Attributes:
        id: within the picture.
        name: lower-case; None where unknown.
        kind: "shape", "emoji", "grocery", "garment" or "object".
        phrase: name with article, lower-case; "" where unknown.
        colours: colour words; empty where unknown.
        captions: references; may be empty.
        shape: of drawn shapes `shape`, `texture` and, where it has a word, `size`.
    """

    id: str
    name: str | None
    kind: str
    phrase: str = ""
    colours: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    shape: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture(Example):
    """A picture to evaluate on.

    Attributes:
        source: name of the source.
        image: RGB; None where it cannot be read.
        masks: (N, H, W) bool, none empty.
        truths: N.
        left_out: regions of the picture that are too small.
        path: of the picture, if it is in a file.
        fault: why it cannot be read.
    """

    source: str
    image: Image.Image | None
    masks: NDArray[np.bool_]
    truths: list[Truth]
    left_out: int
    path: str | None = None
    fault: str = ""

    def load(self) -> Image.Image:
        """The picture; raises [`InputError`] where it cannot be read."""
        if self.image is None:
            raise InputError(self.fault)
        return self.image


class Source(Dataset[Picture]):
    """Pictures by number.

    Args:
        name: what results are grouped by; two sources may share one.
        least_area: share of the picture below which regions are left out.

    Attributes:
        ids: of all pictures, without reading any.
    """

    def __init__(self, name: str, ids: list[str], least_area: float) -> None:
        self.name, self.ids, self.least_area = name, ids, least_area

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def sample(self, index: int) -> RegionSample:
        """Picture and regions."""

    def __getitem__(self, index: int) -> Picture:
        try:
            return self._picture(self.ids[index], self.sample(index))
        except InputError as error:
            raise type(error)(f"{self.ids[index]}: {error}") from error

    def _picture(self, name: str, sample: RegionSample) -> Picture:
        image, fault = _image_of(sample)
        masked = [region for region, has in zip(sample.regions, sample.has_mask, strict=True) if has]
        masks = sample.masks()
        large = np.flatnonzero(masks.mean((1, 2)) >= self.least_area) if len(masks) else np.zeros(0, dtype=np.int64)
        truths = [truth_of(masked[index], int(index)) for index in large]
        pixels = np.zeros(0) if image is None else np.asarray(image)
        known = fingerprint(pixels, masks[large], [asdict(truth) for truth in truths])
        path = str(sample.image) if isinstance(sample.image, (str, Path)) else None
        return Picture(name, known, self.name, image, masks[large], truths, len(masks) - len(large), path, fault)


class FileSource(Source):
    """A file or folder of samples, in any form that `open_samples` reads; crowds are left out.

    Args:
        path: the file.
        every: take every so many-th sample, starting with the first: what training with `sample_hold_out` never saw.
        limit: most samples.
        least_area: share of the picture below which regions are left out.

    Raises:
        InputError: missing, damaged, of an unknown form, or empty.
    """

    def __init__(self, path: str | Path, every: int = 1, limit: int | None = None, least_area: float = 0.01) -> None:
        self.samples = open_samples(path)
        self.picks = range(len(self.samples))[::every][:limit]
        if not self.picks:
            raise InputError(f"{path} holds no samples")
        name = "/".join(Path(path).parts[-2:]).removesuffix(Path(path).suffix)
        super().__init__(name, [f"{name}/{self.samples.where(pick)}" for pick in self.picks], least_area)

    def sample(self, index: int) -> RegionSample:
        return self.samples[self.picks[index]]


class SceneSource(Source):
    """Composed scenes of consecutive seeds.

    Args:
        name: what results are grouped by.
        part: tells sources of one name apart.
        composer: makes the scenes.
        count: number of scenes.
        seed: of the first.
        size: (width, height).
        least_area: share of the picture below which regions are left out.
    """

    def __init__(
        self,
        name: str,
        part: str,
        composer: SceneComposer,
        count: int,
        seed: int,
        size: tuple[int, int] = (400, 300),
        least_area: float = 0.0,
    ) -> None:
        self.composer, self.seed, self.size = composer, seed, size
        super().__init__(name, [f"{name}/{part}/{seed + index}" for index in range(count)], least_area)

    def sample(self, index: int) -> RegionSample:
        return self.composer.scene(self.seed + index, self.size).to_sample()


def _image_of(sample: RegionSample) -> tuple[Image.Image | None, str]:
    """The picture, or why there is none."""
    try:
        return sample.load_image(), ""
    except InputError as error:
        return None, str(error)


def truth_of(region: dict[str, Any], index: int) -> Truth:
    """What a sample's region says in words; its keys are those of `Scene.to_sample` and of COCO-style files."""
    about = region.get("attributes") or {}
    phrase = str(about.get("phrase") or "").lower()
    kind = _kind(str(about.get("kind") or ""))
    captions = [*region.get("captions", []), about.get("caption_long")]
    return Truth(
        id=str(region.get("id", index)),
        name=_name(region.get("category"), phrase, kind),
        kind=kind,
        phrase=phrase,
        colours=list(about.get("colours") or words_in(phrase)),
        captions=[str(caption).lower() for caption in captions if caption],
        shape={key: about[key] for key in _SHAPE_KEYS if key in about} if kind == "shape" else {},
    )


def _kind(word: str) -> str:
    if word.startswith("pictogram"):
        return "emoji"
    return word if word in ("shape", "emoji", "grocery", "garment") else "object"


def _name(category: str | None, phrase: str, kind: str) -> str | None:
    """As concept spaces have it: lower-case; products go by their phrase, which says more than the name."""
    if kind == "grocery" and phrase:
        return split_article(phrase)[1]
    return category.lower() if category else None
