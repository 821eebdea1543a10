"""Data sets whose pixels have labels: which classes, what they are asked for with, and where the files lie."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tap_llm.clip_as_rnn.vocabulary import COCO_QUERIES, VOC_QUERIES
from tap_llm.data.readers.base import read_json
from tap_llm.errors import InputError, MissingFileError


@dataclass(frozen=True)
class LabelSet:
    """Classes and their labels in files.

    Attributes:
        queries: what each class is asked for with, in the order of the labels.
        first: label of the first class.
        background: what is none of the classes (label 0) is a class of its own, which the model must leave empty; else
            it is void.
        labels: folder of the label maps, below that of the data set; one for all splits if without "{}".
        pictures: folder of the pictures.
        listed: file with one picture's name a line; "": all label maps.
        split: default for "{}".
        suffix: end of a label map's name after that of its picture.
        classes: file of the data set that names its classes, where `queries` are empty.
    """

    queries: tuple[str, ...] = ()
    first: int = 1
    background: bool = True
    labels: str = ""
    pictures: str = ""
    listed: str = ""
    split: str = "val"
    suffix: str = ".png"
    classes: str = ""

    def of_split(self, split: str | None) -> LabelSet:
        """With the folders of a split filled in."""
        name = split or self.split
        return replace(
            self, labels=self.labels.format(name), pictures=self.pictures.format(name), listed=self.listed.format(name)
        )


CONTEXT_QUERIES = (
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle", "building", "bus",
    "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain", "dog", "door", "fence",
    "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse",
    "person", "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky",
    "snow", "sofa", "table", "track", "train", "tree", "truck", "tvmonitor", "wall", "water", "window", "wood",
)  # fmt: skip

LABEL_SETS: dict[str, LabelSet] = {
    "voc": LabelSet(
        VOC_QUERIES, labels="SegmentationClass", pictures="JPEGImages", listed="ImageSets/Segmentation/{}.txt"
    ),
    "context": LabelSet(
        CONTEXT_QUERIES,
        labels="SegmentationClassContext",
        pictures="JPEGImages",
        listed="ImageSets/SegmentationContext/{}.txt",
    ),
    "coco_object": LabelSet(
        COCO_QUERIES,
        labels="annotations/{}",
        pictures="images/{}",
        split="val2017",
        suffix="_instanceTrainIds.png",
    ),
    "ade": LabelSet(
        background=False,
        labels="annotations/{}",
        pictures="images/{}",
        split="validation",
        classes="objectInfo150.txt",
    ),
    "own": LabelSet(background=False),
}


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of classes in the order of their labels.

    Args:
        path: a JSON list, or a text file with one name a line. "3: name" and table lines like those of ADE's
            objectInfo150.txt (fields separated by tabs, the last one the names, the first of which counts) are known.

    Raises:
        InputError: the file cannot be read or holds no names.
        MissingFileError: there is none.
    """
    if not path.is_file():
        raise MissingFileError(f"classes: there is no file {path}")
    try:
        names = read_json(path) if path.suffix == ".json" else _lines(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the classes in {path}: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{path} must hold a list of names")
    return tuple(name.strip() for name in names)


def _lines(text: str) -> list[str]:
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    if rows and len(rows[0]) > 1:
        table = rows[1:] if not rows[0][0].strip().isdigit() else rows
        return [row[-1].split(",")[0] for row in table]
    return [re.sub(r"^\d+:\s*", "", row[0]) for row in rows]
