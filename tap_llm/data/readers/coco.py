"""COCO and LVIS JSON, and every file of that shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlparse

from ..samples import RegionSample
from .base import PackedRecords, SampleReader, box_from_xywh, find_image, list_of, read_json, size_of

# What becomes a field of the region; all other keys of an annotation go to its "attributes".
_FIELDS = ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd", "caption", "captions")


class CocoSamples(SampleReader):
    """One sample per picture of a COCO or LVIS file.

    Regions hold the box, the segmentation (polygons or RLE), the category's name, "caption" or "captions" where an
    annotation has some, and any further keys as "attributes". Captions of the whole picture come from a list
    "captions" beside the annotations, or from annotations without a place (COCO's caption files). A list "qa" of
    `{"image_id", "regions", "question", "answer"}` becomes conversations. LVIS names pictures by "coco_url".

    Args:
        path: the JSON file.
        image_root: folder of the pictures, or of COCO's train2017 and so on; see [`SampleReader`].
        document: the parsed file, where it was read already.
        keep_crowds: keep regions that stand for a crowd ("iscrowd"); else they are left out and counted in `notes`.
    """

    folders: ClassVar[tuple[str, ...]] = ("train2017", "val2017", "train2014", "val2014")

    def __init__(
        self, path: str | Path, image_root: str | Path | None = None, document: Any = None, keep_crowds: bool = False
    ) -> None:
        super().__init__(path, image_root)
        document = read_json(self.path) if document is None else document
        images = list_of(document, "images", self.path)
        regions, captions = _split_captions(list_of(document, "annotations", self.path), document.get("captions"))
        if not keep_crowds:
            regions = self._without_crowds(regions)
        self._check_ids(images, regions)
        self._categories = {record.get("id"): record.get("name") for record in document.get("categories") or []}
        self._licenses = {record.get("id"): record.get("name", "") for record in document.get("licenses") or []}
        grouped = [_by_image(records) for records in (regions, captions, document.get("qa") or [])]
        self._records = PackedRecords(
            [image, *(group.get(image.get("id"), []) for group in grouped)] for image in images
        )

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        return f"image {self._records[index][0].get('id', index)}"

    def _read(self, index: int) -> RegionSample:
        image, regions, captions, questions = self._records[index]
        places = {record.get("id"): place for place, record in enumerate(regions)}
        return RegionSample(
            find_image(self.root, _image_name(image), self.folders),
            [self._region(record) for record in regions],
            captions=[record["caption"] for record in captions],
            conversations=[_question(record, places) for record in questions],
            id=str(image["id"]),
            source=self.path.stem,
            license=str(self._licenses.get(image.get("license"), "")),
            size=size_of(image),
        )

    def _region(self, record: dict[str, Any]) -> dict[str, Any]:
        region = {
            "id": record.get("id"),
            "box": box_from_xywh(record.get("bbox")),
            "mask": record.get("segmentation") or None,  # some files write [] where there is none
            "category": self._categories.get(record.get("category_id")),
            "caption": record.get("caption") if "captions" not in record else None,
            "captions": record.get("captions"),
            "attributes": {key: value for key, value in record.items() if key not in _FIELDS} or None,
        }
        return {key: value for key, value in region.items() if value is not None}

    def _without_crowds(self, regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [record for record in regions if not record.get("iscrowd")]
        if len(kept) < len(regions):
            self.notes.append(f"left out {len(regions) - len(kept)} crowd regions")
        return kept

    def _check_ids(self, images: list[dict[str, Any]], regions: list[dict[str, Any]]) -> None:
        known = {image.get("id") for image in images}
        self.faults += [
            f"annotation {record.get('id')}: there is no image {record.get('image_id')}"
            for record in regions
            if record.get("image_id") not in known
        ]
        for name, records in (("image", images), ("annotation", regions)):
            ids = [record["id"] for record in records if "id" in record]
            self.faults += [f"{name} {number}: this id is used twice" for number in _repeated(ids)]


def _split_captions(annotations: list[dict[str, Any]], captions: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Regions, and captions of whole pictures (annotations that have a caption and no place)."""
    regions: list[dict[str, Any]] = []
    of_picture = list(captions or [])
    for record in annotations:
        placeless = "caption" in record and "bbox" not in record and "segmentation" not in record
        (of_picture if placeless else regions).append(record)
    return regions, of_picture


def _by_image(records: Iterable[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record.get("image_id")].append(record)
    return groups


def _repeated(values: list[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def _image_name(image: dict[str, Any]) -> str:
    """`file_name`, or in LVIS the end of `coco_url`: folder and file."""
    name = image.get("file_name")
    if name:
        return str(name)
    return "/".join(urlparse(image["coco_url"]).path.split("/")[-2:])


def _question(record: dict[str, Any], places: dict[Any, int]) -> dict[str, Any]:
    """A question about regions: ids become places in the sample's list."""
    turn = {key: value for key, value in record.items() if key not in ("id", "image_id")}
    return turn | {"regions": [places.get(number, number) for number in record.get("regions", [])]}
