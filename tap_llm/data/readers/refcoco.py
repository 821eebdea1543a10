"""RefCOCO, RefCOCO+ and RefCOCOg as MDETR lays them out: finetune_refcoco*.json."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..samples import RegionSample
from .base import PackedRecords, SampleReader, box_from_xywh, find_image, list_of, read_json, size_of

FOLDERS = ("train2014",)


class RefCocoSamples(SampleReader):
    """One sample per picture; its regions are the objects spoken of, with all expressions for each as captions.

    The file is a COCO dict in which each *image record* is one expression ("caption"), so a picture occurs as often
    as it has expressions, and its annotation repeats for every expression of the same object. Here they are brought
    together by "file_name" and the annotation's "original_id" (else its box). The spans of the expression that name
    the object, "tokens_positive", are kept in the attributes: one list of spans per caption.

    Args:
        path: the JSON file.
        image_root: folder of the pictures (COCO train2014), or the one above; see [`SampleReader`].
        document: the parsed file, where it was read already.
        per_expression: one sample per expression instead, in the file's order, as some evaluations count.
    """

    def __init__(
        self, path: str | Path, image_root: str | Path | None = None, document: Any = None, per_expression: bool = False
    ) -> None:
        super().__init__(path, image_root)
        document = read_json(self.path) if document is None else document
        objects: dict[Any, list[Any]] = defaultdict(list)
        for record in list_of(document, "annotations", self.path):
            objects[record.get("image_id")].append(record)
        groups: dict[Any, list[Any]] = defaultdict(list)
        for image in list_of(document, "images", self.path):
            key = image.get("id") if per_expression else image.get("file_name")
            groups[key].append([image, objects.pop(image.get("id"), [])])
        self.faults += [f"annotation {record[0].get('id')}: there is no image {key}" for key, record in objects.items()]
        self._records = PackedRecords(groups.values())

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        return f"image {self._records[index][0][0].get('id', index)}"

    def _read(self, index: int) -> RegionSample:
        group = self._records[index]
        first = group[0][0]
        regions: dict[Any, dict[str, Any]] = {}
        for image, objects in group:
            for record in objects:
                key = record.get("original_id", str(record.get("bbox")))
                region = regions.setdefault(key, _region(record))
                region["captions"].append(image["caption"])
                region["attributes"]["tokens_positive"].append(record.get("tokens_positive", []))
        return RegionSample(
            find_image(self.root, first["file_name"], FOLDERS),
            list(regions.values()),
            id=str(first["id"]),
            source=first.get("dataset_name", self.path.stem),
            size=size_of(first),
        )


def _region(record: dict[str, Any]) -> dict[str, Any]:
    region = {
        "id": record.get("original_id", record.get("id")),
        "box": box_from_xywh(record.get("bbox")),
        "captions": [],
        "attributes": {"tokens_positive": []},
    }
    return region | ({"mask": record["segmentation"]} if record.get("segmentation") else {})
