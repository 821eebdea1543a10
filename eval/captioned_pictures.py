"""Pictures with captions: COCO caption files and Karpathy's splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch.utils.data import Dataset

from tap_llm.data.readers.base import find_image, list_of, read_json
from tap_llm.errors import InputError, MissingFileError

from .base import Example, fingerprint
from .inquiries import COCO_FOLDERS, file_digest

_Listed = tuple[str, str, list[str]]  # id, file name and captions of a picture


@dataclass(frozen=True, eq=False)
class CaptionedPicture(Example):
    """A picture and what is said of it.

    Attributes:
        path: of the picture.
        captions: at least one.
    """

    path: Path
    captions: list[str]


class CaptionedPictures(Dataset[CaptionedPicture]):
    """Pictures with captions, of a COCO caption file or of Karpathy's.

    Args:
        path: the file.
        images: folder of the pictures, where it is not that of the file.
        split: of Karpathy's files.

    Attributes:
        strays: captions that are empty, or of pictures that are not listed, one message each.
        bare: pictures without captions, likewise.

    Raises:
        InputError: the file is missing, damaged or of another form, or holds no captions.
    """

    def __init__(self, path: Path, images: Path | None = None, split: str = "test") -> None:
        if not path.is_file():
            raise MissingFileError(f"there is no file {path}")
        self.root = images or path.parent
        if not self.root.is_dir():
            raise MissingFileError(f"there is no folder {self.root} with pictures")
        self.strays: list[str] = []
        document = read_json(path)
        records = list_of(document, "images", path)
        if records and "sentences" in records[0]:
            listed = self._of_split(records, split)
        else:
            key = "captions" if "captions" in document else "annotations"
            listed = self._of_annotations(records, list_of(document, key, path))
        self.pictures = [one for one in listed if one[2]]
        self.bare = [f"{name}: there are no captions" for name, _, captions in listed if not captions]
        if not self.pictures:
            raise InputError(f"{path} holds no pictures with captions, or none of the split {split!r}")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> CaptionedPicture:
        name, file_name, captions = self.pictures[index]
        path = find_image(self.root, file_name, COCO_FOLDERS)
        return CaptionedPicture(name, fingerprint(captions, file_digest(path)), path, captions)

    def _of_annotations(self, records: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> list[_Listed]:
        named = [(str(record.get("id")), str(record.get("file_name"))) for record in records]
        captions: dict[str, list[str]] = {number: [] for number, _ in named}
        for annotation in annotations:
            number, said = str(annotation.get("image_id")), annotation.get("caption")
            if number not in captions:
                self.strays.append(f"caption {annotation.get('id')}: there is no image {number}")
            elif not _says(said):
                self.strays.append(f"caption {annotation.get('id')} of image {number}: it has no words")
            else:
                captions[number].append(said)
        return [(f"image {number}", file_name, captions[number]) for number, file_name in named]

    def _of_split(self, records: list[dict[str, Any]], split: str) -> list[_Listed]:
        listed = []
        for record in records:
            if record.get("split") == split:
                name, sentences = str(record.get("filename")), record.get("sentences") or []
                said = [one.get("raw") if isinstance(one, dict) else None for one in sentences]
                captions = [caption for caption in said if _says(caption)]
                self.strays += [f"{name}: a caption has no words"] * (len(said) - len(captions))
                listed.append((name, name, captions))
        return listed


def _says(caption: Any) -> TypeGuard[str]:
    return isinstance(caption, str) and bool(caption.strip())
