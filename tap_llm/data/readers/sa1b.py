"""SA-1B: a folder of sa_*.jpg, each with its masks in sa_*.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..samples import RegionSample
from .base import SampleReader, box_from_xywh, read_json, size_of

LICENSE = "SA-1B Dataset Research License"
_SCORES = ("predicted_iou", "stability_score", "point_coords", "crop_box")


class Sa1bSamples(SampleReader):
    """One sample per sa_*.json below a folder, by name; opening lists the files and reads none.

    Args:
        path: the folder; archives unpacked into folders of their own may lie below it.
        image_root: folder of the pictures; by default each lies beside its JSON file.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        super().__init__(path, image_root)
        self._beside = image_root is None
        self._names = sorted(
            os.path.relpath(os.path.join(folder, name), self.path)
            for folder, _, names in os.walk(self.path)
            for name in names
            if name.startswith("sa_") and name.endswith(".json")
        )
        if not self._names:
            raise InputError(f"{path}: there is no sa_*.json in this folder or below it")

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        return self._names[index]

    def _read(self, index: int) -> RegionSample:
        file = self.path / self._names[index]
        document = read_json(file)
        image = document["image"]
        return RegionSample(
            (file.parent if self._beside else self.root) / image["file_name"],
            [_region(record) for record in document["annotations"]],
            id=str(image["image_id"]),
            source="sa1b",
            license=LICENSE,
            size=size_of(image),
        )


def _region(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": record["id"],
        "box": box_from_xywh(record["bbox"]),
        "mask": record["segmentation"],
        "attributes": {key: record[key] for key in _SCORES if key in record},
    }
