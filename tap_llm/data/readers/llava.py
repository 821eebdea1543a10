"""LLaVA's instruction files: conversations about whole pictures, which keep a model able to chat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..samples import RegionSample
from .base import find_image
from .records import RecordSamples, messages_from_turns

FOLDERS = ("train2017", "val2017", "train2014", "val2014")
_NO_MARKER = re.compile(r"(?!)()")  # there are no regions


class LlavaSamples(RecordSamples):
    """One sample per record `{"id", "image", "conversations": [{"from", "value"}]}` of a list or of lines; no regions.

    "<image>" in the turns falls away. Records without a picture are left out and counted in `notes`. Ids are left out
    too: the mixes use many of them twice.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, document: Any = None) -> None:
        super().__init__(path, image_root, document)
        self._leave_out(lambda record: not record.get("image"), "without a picture")

    def _sample(self, record: dict[str, Any]) -> RegionSample:
        return RegionSample(
            find_image(self.root, record["image"], FOLDERS),
            conversations=messages_from_turns(record["conversations"], 0, _NO_MARKER, 0),
            source="llava",
        )
