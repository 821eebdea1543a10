"""Files of region captions as records, one per picture, in which nothing is lost that is broken.

COCO's form is read, and lists of records that hold picture, region and caption at once. An annotation that cannot be
used stays, with its "problem": it counts as a region whose caption is empty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from tap_llm.data.readers.base import box_from_xywh, find_image, list_of, read_json
from tap_llm.errors import InputError, MissingFileError

from .inquiries import Inquiry, Record, file_digest
from .provenance import fingerprint

_NAME_KEYS = ("file_name", "image", "image_name")


@dataclass(frozen=True)
class CaptionProtocol:
    """How a file of region captions is read and asked.

    Attributes:
        name: with version.
        question: put to models that chat; the region comes between the two texts.
        prompt: what points at a region.
        folders: further places for pictures, below their folder.
        together: all captions of one image record are references for one region.
        regions: how many an image record has.
    """

    name: str
    question: tuple[str, str]
    prompt: Literal["box", "mask"] = "box"
    folders: Sequence[str] = ()
    together: bool = False
    regions: Literal["one", "several", "any"] = "any"


class CaptionPictures(Dataset[Inquiry]):
    """The pictures of a file of region captions; see `caption_records` for what is known of each.

    Args:
        path: the file.
        images: folder of the pictures; by default that of the file.
        protocol: how to read it.

    Raises:
        InputError: the file is damaged, empty, or that of another protocol.
        MissingFileError: the file or the folder is not there.
    """

    def __init__(self, path: Path, images: Path | None, protocol: CaptionProtocol) -> None:
        self.images, self.folders = images or path.parent, protocol.folders
        for what, there in ((f"file {path}", path.is_file()), (f"folder {self.images}", self.images.is_dir())):
            if not there:
                raise MissingFileError(f"captions: there is no {what}")
        self.records = caption_records(read_json(path), path, protocol)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Inquiry:
        record = self.records[index]
        image = find_image(self.images, record["file_name"], self.folders)
        digest = file_digest(image)
        known = fingerprint(record, digest)
        return Inquiry(record["id"], known, record, image, digest, problem=record["problem"])


def caption_records(document: Any, path: Path, protocol: CaptionProtocol) -> list[Record]:
    """One record per picture that has regions.

    Args:
        document: parsed.
        path: for messages.
        protocol: how to read it.

    Returns:
        Dicts of "id", "file_name", "height" and "width" (None where unknown), "problem" (of the picture) and "items",
        dicts of "key" (unique), "where" (for messages), "region" (a region dict), "references" and "problem".

    Raises:
        InputError: another form, no captions, or the file of another protocol.
    """
    images, annotations = _from_list(document, path) if isinstance(document, list) else _from_coco(document, path)
    known, members = _grouped(images, "id"), _grouped(annotations, "image_id")
    if not members:
        raise InputError(f"{path} holds no captions")
    _check_protocol(members, path, protocol)
    again = _used_again(annotations)
    pictures: dict[str, Record] = {}
    for number, group in members.items():
        items = [_item(number, place, one, known[number], again, protocol) for place, one in enumerate(group)]
        picture = _picture(number, known[number])
        pictures.setdefault(picture["id"], picture)["items"] += [_joined(items)] if protocol.together else items
    return list(pictures.values())


def _from_coco(document: Any, path: Path) -> tuple[list[Record], list[Record]]:
    return list_of(document, "images", path), list_of(document, "annotations", path)


def _from_list(document: list[Any], path: Path) -> tuple[list[Record], list[Record]]:
    """Image and annotation of each record; the region may lie in a list of its own, "annotation"."""
    images, annotations = [], []
    for place, record in enumerate(list_of({"records": document}, "records", path)):
        name = next((record[key] for key in _NAME_KEYS if record.get(key)), None)
        regions = record.get("annotation")
        region = regions[0] if isinstance(regions, list) and regions and isinstance(regions[0], dict) else {}
        images.append({**record, "id": place, "file_name": name})
        annotations.append({"id": place, **record, **region, "image_id": place})
    return images, annotations


def _grouped(records: Sequence[Record], key: str) -> defaultdict[str, list[Record]]:
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[str(record.get(key))].append(record)
    return groups


def _check_protocol(members: Mapping[str, list[Record]], path: Path, protocol: CaptionProtocol) -> None:
    """Results of different files are not comparable: one that is clearly another protocol's is refused."""
    several = sum(len(group) > 1 for group in members.values())
    own = all(str(group[0].get("id")) == number for number, group in members.items())
    strange = {"one": several > 0.1 * len(members), "several": own and not several and len(members) > 1, "any": False}
    if strange[protocol.regions]:
        raise InputError(
            f"{path} is not for {protocol.name}: there, images have {protocol.regions} region(s) each, but here "
            f"{several} of {len(members)} have several; name another --protocol"
        )


def _used_again(annotations: Sequence[Record]) -> set[int]:
    """Which annotations, by `id()`, have a number that an earlier one has."""
    numbered = [group for number, group in _grouped(annotations, "id").items() if number != "None"]
    return {id(record) for group in numbered for record in group[1:]}


def _picture(number: str, images: Sequence[Record]) -> Record:
    """A record without items. Named after its file, a picture is encoded once however often it is listed."""
    image = images[0] if images else {}
    name = image.get("file_name")
    problem = ""
    if not images:
        problem = f"the file lists no image {number}"
    elif len(images) > 1:
        problem = f"image {number}: this id is used twice"
    elif not isinstance(name, str) or not name:
        problem = f'image {number}: "file_name" is missing'
    return {
        "id": f"image {number}" if problem else name,
        "file_name": "" if problem else name,
        "height": image.get("height"),
        "width": image.get("width"),
        "problem": problem,
        "items": [],
    }


def _item(
    number: str, place: int, annotation: Record, images: Sequence[Record], again: set[int], protocol: CaptionProtocol
) -> Record:
    where = f"annotation {annotation.get('id', place)} of image {number}"
    caption = annotation.get("caption", images[0].get("caption") if images else None)
    said = isinstance(caption, str) and any(letter.isalnum() for letter in caption)
    problems = {
        "its id is used twice": id(annotation) in again,
        "the image has a region already": protocol.regions == "one" and place > 0,
        "its caption is empty": not said,
    }
    return {
        "key": f"{number}_region_{place}",
        "where": where,
        "region": _region(annotation, protocol),
        "references": [caption] if said else [],
        "problem": next((f"{where}: {problem}" for problem, found in problems.items() if found), ""),
    }


def _region(annotation: Record, protocol: CaptionProtocol) -> Record:
    """What points at it; a mask stands in for a box that the file does not state."""
    box, mask = annotation.get("bbox"), annotation.get("segmentation", annotation.get("mask"))
    return {"mask": mask} if protocol.prompt == "mask" or (box is None and mask) else {"box": box_from_xywh(box)}


def _joined(items: Sequence[Record]) -> Record:
    """One region of all of an image record's, which must be the same."""
    first = items[0]
    differ = any(item["region"] != first["region"] for item in items)
    problems = [item["problem"] for item in items if item["problem"]]
    problems += [f"{first['where']}: another annotation of it points elsewhere"] if differ else []
    references = list(dict.fromkeys(text for item in items for text in item["references"]))
    return {**first, "references": references, "problem": "; ".join(problems)}
