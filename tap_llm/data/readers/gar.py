"""GAR's data set: captions and questions about one or several masks, relations among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..samples import RegionSample
from .jsonl import Lines
from .parquet import parquet_files
from .records import RecordSamples, messages_from_turns

_MARKER = re.compile(r"<Prompt(\d+)>")


class GarSamples(RecordSamples):
    """One sample per row `{"image", "mask_rle": RLE or [RLE, ...], "conversations": [{"from", "value"}]}`.

    Rows come from a folder that `datasets.Dataset.save_to_disk` wrote (the published form, which holds the pictures),
    from parquet, or from JSON lines, which name picture files. "<Prompt0>" in the turns stands for the first mask; a
    mask that no turn speaks of is introduced with the first question.
    """

    def _open(self, document: Any) -> Any:
        if not self.path.is_dir() and self.path.suffix != ".parquet":
            return super()._open(document)
        from datasets import Dataset, load_from_disk

        try:
            if self.path.is_dir() and not any(self.path.glob("*.parquet")):
                return _undecoded(load_from_disk(str(self.path)))
            return _undecoded(Dataset.from_parquet([str(file) for file in parquet_files(self.path)]))
        except Exception as error:  # damaged tables surface as nearly any exception type
            raise InputError(f"{self.path} does not hold rows that `datasets` can read ({error})") from error

    def where(self, index: int) -> str:
        return super().where(index) if isinstance(self._records, Lines) else f"row {index}"

    def _sample(self, record: dict[str, Any]) -> RegionSample:
        masks = record["mask_rle"]
        regions = [{"mask": mask} for mask in ([masks] if isinstance(masks, Mapping) else masks)]
        return RegionSample(
            self._image(record["image"]),
            regions,
            conversations=messages_from_turns(record["conversations"], len(regions), _MARKER, 0),
            source="gar",
        )

    def _image(self, image: Any) -> bytes | Path:
        """The bytes of an embedded picture, or the path of a file."""
        if isinstance(image, Mapping):
            if image.get("bytes") is not None:
                return bytes(image["bytes"])
            image = image["path"]
        return self.root / image


def _undecoded(table: Any) -> Any:
    """Pictures as their bytes: a damaged one is for us to name."""
    from datasets import Image

    embedded = isinstance(table.features.get("image"), Image)
    return table.cast_column("image", Image(decode=False)) if embedded else table
