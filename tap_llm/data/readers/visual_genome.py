"""Visual Genome region descriptions: the original file, and GRiT's train.json and test.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from ..samples import RegionSample
from .base import PackedRecords, SampleReader, find_image, read_json
from .coco import CocoSamples

LICENSE = "CC BY 4.0"
FOLDERS = ("VG_100K", "VG_100K_2", "images")  # the pictures come in two archives; many people merge them


class VisualGenomeSamples(SampleReader):
    """One sample per picture of `region_descriptions.json`; every description is a region with one caption.

    The file is a list of `{"id", "regions": [{"region_id", "x", "y", "width", "height", "phrase"}]}`. Pictures are
    `<id>.jpg`, in `image_root` or its folders VG_100K and VG_100K_2.

    Args:
        path: the JSON file.
        image_root: folder of the pictures; see [`SampleReader`].
        document: the parsed file, where it was read already.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, document: Any = None) -> None:
        super().__init__(path, image_root)
        document = read_json(self.path) if document is None else document
        if not isinstance(document, list):
            raise InputError(f"{self.path}: expected a list of pictures, each with its regions")
        self._records = PackedRecords(document)

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        record = self._records[index]
        return f"image {record['id']}" if isinstance(record, dict) and "id" in record else f"record {index}"

    def _read(self, index: int) -> RegionSample:
        record = self._records[index]
        image = find_image(self.root, f"{record['id']}.jpg", FOLDERS)
        regions = [_region(item) for item in record["regions"]]
        return RegionSample(image, regions, id=str(record["id"]), source="visual_genome", license=LICENSE)


class GritSamples(CocoSamples):
    """GRiT's form of Visual Genome: a COCO file whose annotations have a caption and one class "object" for all."""

    folders = FOLDERS

    def _read(self, index: int) -> RegionSample:
        sample = super()._read(index)
        for region in sample.regions:
            region.pop("category", None)
        sample.source, sample.license = "visual_genome", LICENSE
        return sample


def _region(record: dict[str, Any]) -> dict[str, Any]:
    x, y = record["x"], record["y"]
    box = [x, y, x + record["width"], y + record["height"]]
    return {"id": record.get("region_id"), "box": box, "captions": [record["phrase"]]}
