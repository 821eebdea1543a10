"""Pictures whose pixels have labels: folders of label maps, and COCO-style files with a mask per class or object."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from tap_llm.data.readers.base import list_of, read_json
from tap_llm.data.readers.coco import CocoSamples
from tap_llm.errors import InputError, MissingFileError
from tap_llm.images import load_image, open_image
from tap_llm.regions import read_mask

from .base import Example, fingerprint
from .inquiries import file_digest
from .label_sets import LabelSet, read_classes

VOID = -1
_PICTURES = (".jpg", ".jpeg", ".png", ".JPEG", ".JPG", ".bmp")


@dataclass(frozen=True, eq=False)
class LabelledPicture(Example):
    """A picture with the label of each pixel.

    Attributes:
        place: among the pictures of the data set.
        path: of the picture, which may be missing.
        labels: (H, W) int32: 0 background, 1 … n the classes, -1 void.
        problem: what is wrong with some of the labels, so that all others count as wrong; "" where nothing is.
    """

    place: int
    path: Path
    labels: NDArray[np.int32]
    problem: str = ""

    def load(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            InputError: it has a problem, is missing, damaged, or of another size than its labels.
        """
        if self.problem:
            raise InputError(self.problem)
        image = load_image(self.path)
        height, width = self.labels.shape
        if (image.height, image.width) != (height, width):
            raise InputError(f"the picture is {image.width}x{image.height}, but its labels are {width}x{height}")
        return image


class LabelledPictures(Dataset[LabelledPicture]):
    """Pictures by number; access raises [`InputError`] where the labels cannot be read.

    Args:
        queries: what the classes are asked for with.
        ids: of all pictures, without reading any.
        faults: what is wrong with the files as a whole, one line each.
    """

    def __init__(self, queries: Sequence[str], ids: Sequence[str], faults: Sequence[str] = ()) -> None:
        self.queries, self.ids, self.faults = tuple(queries), list(ids), list(faults)
        if not self.ids:
            raise InputError("there are no pictures with labels")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> LabelledPicture:
        try:
            labels, problem = self.labels(index)
        except InputError as error:
            raise type(error)(f"{self.ids[index]}: {error}") from error
        path = self.picture(index)
        seal = fingerprint(labels, file_digest(path), problem)
        return LabelledPicture(self.ids[index], seal, index, path, labels, problem)

    @abstractmethod
    def labels(self, index: int) -> tuple[NDArray[np.int32], str]:
        """Labels and problem, as in `LabelledPicture`."""

    @abstractmethod
    def picture(self, index: int) -> Path:
        """Where the picture should be."""


class LabelFolder(LabelledPictures):
    """Label maps as pictures of grey values or palette indices, one per picture.

    255 (of 16 bits 65535) is void, as is every label without a class.

    Args:
        root: folder of the data set, or of the label maps themselves.
        layout: what the labels mean, and where things lie below `root`.
        images: folder of the pictures, where it is not that of the layout.
        queries: in place of those of the layout.

    Raises:
        InputError: folders or files that are missing, or no class names.
    """

    def __init__(
        self, root: Path, layout: LabelSet, images: Path | None = None, queries: Sequence[str] | None = None
    ) -> None:
        below = bool(layout.labels) and (root / layout.labels).is_dir()
        self.layout, self.folder = layout, root / layout.labels if below else root
        if images is None and not below:
            wanted = f"has no folder {layout.labels}; " if layout.labels else "holds label maps; "
            raise InputError(f"{root} {wanted}name the folder of the pictures with --images DIR")
        self.images = images or root / layout.pictures
        for folder in (self.folder, self.images):
            if not folder.is_dir():
                raise MissingFileError(f"there is no folder {folder}")
        named = queries or layout.queries
        if not named and not layout.classes:
            raise InputError("the classes have no names: give --classes FILE with one a line")
        listed = root / layout.listed if layout.listed and below else None
        super().__init__(named or read_classes(root / layout.classes), self._names(listed))

    def _names(self, listed: Path | None) -> list[str]:
        if listed is None:
            end = self.layout.suffix
            return sorted(path.name.removesuffix(end) for path in self.folder.iterdir() if path.name.endswith(end))
        if not listed.is_file():
            raise MissingFileError(f"there is no list of pictures {listed}")
        return listed.read_text(encoding="utf-8").split()

    def labels(self, index: int) -> tuple[NDArray[np.int32], str]:
        with open_image(self.folder / f"{self.ids[index]}{self.layout.suffix}", "labels") as image:
            values = np.asarray(image)
        if values.ndim != 2 or values.dtype == bool:
            raise InputError("labels: expected grey values or palette indices, one per pixel")
        labels = values.astype(np.int32) - self.layout.first + 1
        known = (labels <= len(self.queries)) & (values != (255 if values.dtype == np.uint8 else 65535))
        return np.where(known & (labels > 0 if not self.layout.background else labels >= 0), labels, VOID), ""

    def picture(self, index: int) -> Path:
        candidates = [self.images / f"{self.ids[index]}{end}" for end in _PICTURES]
        return next((path for path in candidates if path.is_file()), candidates[0])


class LabelRecords(LabelledPictures):
    """A COCO-style file; of masks that overlap, the one that comes last in the file counts. Crowds count too.

    Args:
        path: the file.
        images: folder of the pictures, where it is not that of the file.
        queries: one for each category in the file's order, where they are not its names.
        background: what no mask covers is background; else it is void.

    Raises:
        InputError: the file is missing, damaged, or has another number of categories.
    """

    def __init__(
        self, path: Path, images: Path | None = None, queries: Sequence[str] | None = None, background: bool = False
    ) -> None:
        if not path.is_file():
            raise MissingFileError(f"there is no file {path}")
        document = read_json(path)
        names = [str(record.get("name")) for record in list_of(document, "categories", path)]
        if queries and len(queries) != len(names):
            raise InputError(f"{path} has {len(names)} categories, but {len(queries)} classes are asked for")
        self._label = {name: place for place, name in enumerate(names, start=1)}
        self._samples = CocoSamples(path, images, document, keep_crowds=True)
        self._empty = 0 if background else VOID
        ids = [self._samples.where(place) for place in range(len(self._samples))]
        super().__init__(queries or names, ids, self._samples.faults)

    def labels(self, index: int) -> tuple[NDArray[np.int32], str]:
        sample = self._samples[index]
        labels = np.full(sample.image_size(), self._empty, dtype=np.int32)
        problems = []
        for region in sample.regions:
            try:
                if "mask" not in region or region.get("category") not in self._label:
                    raise InputError("there is no mask, or no category of the file")
                labels[read_mask(region["mask"], *labels.shape)] = self._label[region["category"]]
            except InputError as error:
                problems.append(f"region {region.get('id')}: {error}")
        return labels, "; ".join(problems)

    def picture(self, index: int) -> Path:
        return Path(self._samples[index].image)
