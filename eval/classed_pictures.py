"""Pictures with one class each: folders of folders, and COCO-style files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from tap_llm.data.readers.base import find_image, list_of, read_json
from tap_llm.errors import InputError, MissingFileError
from tap_llm.images import load_image

from .base import Example, fingerprint
from .inquiries import COCO_FOLDERS, file_digest

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True, eq=False)
class ClassedPicture(Example):
    """A picture and what it shows.

    Attributes:
        path: of the picture.
        label: its class; "" where there is none.
        problem: why it cannot be used; "" where it can.
    """

    path: Path
    label: str
    problem: str = ""

    def load(self) -> Image.Image:
        """The picture, RGB; raises [`InputError`] where it cannot be used."""
        if self.problem:
            raise InputError(self.problem)
        return load_image(self.path)


class ClassedPictures(Dataset[ClassedPicture]):
    """Pictures with one class each.

    Args:
        pictures: (id, path, class); without a class ("") a picture counts as wrong.
        names: what classes are called, by class; by default as they are, with spaces for "_".
        strays: what is wrong with annotations of no picture, one message each; each counts as wrong.

    Attributes:
        classes: names by class.
        strays: as given.

    Raises:
        InputError: no picture, or a class without a name.
    """

    def __init__(
        self, pictures: Sequence[tuple[str, Path, str]], names: dict[str, str] | None = None, strays: Sequence[str] = ()
    ) -> None:
        self.pictures, self.strays = pictures, list(strays)
        labels = sorted({label for _, _, label in pictures if label})
        if not labels:
            raise InputError("there are no pictures with a class")
        missing = [label for label in labels if names is not None and label not in names]
        if missing:
            raise InputError(f"--classes has no name for {missing[0]!r}")
        self.classes = dict(names) if names else {label: label.replace("_", " ") for label in labels}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> ClassedPicture:
        name, path, label = self.pictures[index]
        problem = "" if label else "it must have a file_name, and exactly one of the categories"
        return ClassedPicture(name, fingerprint(label, file_digest(path)), path, label, problem)


def open_classed(path: Path, images: Path | None = None, names: dict[str, str] | None = None) -> ClassedPictures:
    """Pictures of a folder of folders, or of a COCO-style file.

    Args:
        path: folder or file.
        images: of a file: folder of the pictures, where it is not that of the file.
        names: of the classes.

    Raises:
        InputError: nothing that can be used.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS and file.parent != path)
        parts = [file.relative_to(path) for file in found]
        return ClassedPictures([(str(part), path / part, part.parts[0]) for part in parts], names)
    if not path.is_file():
        raise MissingFileError(f"there is no file or folder {path}")
    document = read_json(path)
    categories = {str(record.get("id")): str(record.get("name")) for record in list_of(document, "categories", path)}
    pictures, strays = _of_records(path, document, categories, images or path.parent)
    return ClassedPictures(pictures, names or {name: name for name in categories.values()}, strays)


def _of_records(
    path: Path, document: Any, categories: dict[str, str], images: Path
) -> tuple[list[tuple[str, Path, str]], list[str]]:
    """Pictures of a COCO-style file, with category names by id, and messages about annotations of none of them."""
    labels: dict[str, set[str]] = {}
    for record in list_of(document, "annotations", path):
        labels.setdefault(str(record.get("image_id")), set()).add(categories.get(str(record.get("category_id")), ""))
    pictures = []
    for image in list_of(document, "images", path):
        number, file_name = str(image.get("id")), image.get("file_name")
        known = labels.get(number, set())
        label = min(known) if len(known) == 1 and isinstance(file_name, str) else ""
        pictures.append((f"image {number}", find_image(images, str(file_name), COCO_FOLDERS), label))
    unlisted = labels.keys() - {str(image.get("id")) for image in document["images"]}
    return pictures, [f"annotations: there is no image {number}" for number in sorted(unlisted)]


def read_names(path: Path) -> dict[str, str]:
    """Names by class, of a JSON object, or of lines "class name, other name".

    Raises:
        InputError: the file cannot be read.
    """
    if not path.is_file():
        raise MissingFileError(f"classes: there is no file {path}")
    if path.suffix == ".json":
        names = read_json(path)
    else:
        lines = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        names = {label: said.split(",")[0].strip() for label, _, said in lines}
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise InputError(f"{path} must hold a name for each class")
    return names
