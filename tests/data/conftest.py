"""Small made-up files, one of every format, with the same two pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

SQUARE = [[3.0, 4.0, 8.0, 4.0, 8.0, 10.0, 3.0, 10.0]]  # columns 3..7, rows 4..9


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real sets."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not here")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` unpacks goes away with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


class Folder:
    """Writes small files below a folder of the test; sub-folders are made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def picture(self, name: str, seed: int = 0) -> Path:
        """Random pixels, 20 rows of 30."""
        path = self._place(name)
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def json(self, name: str, document: Any) -> Path:
        path = self._place(name)
        path.write_text(json.dumps(document))
        return path

    def lines(self, name: str, records: list[Any]) -> Path:
        """One line each: dicts as JSON, text as it is."""
        path = self._place(name)
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return path

    def _place(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder to write made-up files into."""
    return Folder(tmp_path)


@pytest.fixture
def coco_document() -> dict[str, Any]:
    """Two pictures; polygons, run lengths, a crowd, captions, a question."""
    rle = {"size": [20, 30], "counts": [40, 5, 555]}  # column 2, rows 0..4
    crowd = {"size": [20, 30], "counts": [0, 600]}
    annotations = [
        {"id": 10, "image_id": 1, "category_id": 2, "bbox": [3, 4, 5, 6], "segmentation": SQUARE, "area": 30},
        {"id": 11, "image_id": 1, "category_id": 1, "bbox": [2, 0, 1, 5], "segmentation": rle, "depth": 3},
        {"id": 12, "image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 20], "segmentation": crowd, "iscrowd": 1},
        {
            "id": 13,
            "image_id": 2,
            "category_id": 1,
            "bbox": [1, 1, 4, 4],
            "caption": "a cat",
            "captions": ["a cat", "it"],
        },
    ]
    return {
        "images": [
            {"id": 1, "file_name": "pictures/1.png", "height": 20, "width": 30, "license": 4},
            {"id": 2, "file_name": "pictures/2.png", "height": 20, "width": 30, "license": 4},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "red dog"}],
        "licenses": [{"id": 4, "name": "CC BY"}],
        "annotations": annotations,
        "captions": [{"id": 1, "image_id": 1, "caption": "two animals"}],
        "qa": [
            {"id": 5, "image_id": 1, "regions": [11, 10], "question": "Left?", "answer": "yes", "topic": "relation"}
        ],
    }


@pytest.fixture
def coco_file(folder: Folder, coco_document: dict[str, Any]) -> Path:
    """The document with its pictures."""
    for number in (1, 2):
        folder.picture(f"pictures/{number}.png", seed=number)
    return folder.json("coco.json", coco_document)
