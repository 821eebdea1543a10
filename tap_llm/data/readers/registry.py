"""Which reader reads what, and how a format is recognised by its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import InputError, MissingFileError
from .base import SampleReader, read_json
from .coco import CocoSamples
from .flickr30k import Flickr30kSamples
from .gar import GarSamples
from .jsonl import JsonlSamples
from .llava import LlavaSamples
from .osprey import OspreySamples
from .parquet import ParquetSamples, parquet_files
from .refcoco import RefCocoSamples
from .sa1b import Sa1bSamples
from .shikra import ShikraSamples
from .vcr import VcrSamples
from .visual_genome import GritSamples, VisualGenomeSamples

FORMATS: dict[str, type[SampleReader]] = {
    "coco": CocoSamples,
    "lvis": CocoSamples,
    "visual_genome": VisualGenomeSamples,
    "grit": GritSamples,
    "refcoco": RefCocoSamples,
    "sa1b": Sa1bSamples,
    "jsonl": JsonlSamples,
    "parquet": ParquetSamples,
    "flickr30k": Flickr30kSamples,
    "osprey": OspreySamples,
    "llava": LlavaSamples,
    "shikra": ShikraSamples,
    "vcr": VcrSamples,
    "gar": GarSamples,
}
_LINE_KEYS = {"shikra": ("img_path", "boxes_seq"), "vcr": ("img_fn",), "gar": ("mask_rle",)}  # any of them tells
_FIRST_LINE = 1 << 20  # a longer first line is taken for a whole document
_ABOUT = (
    "known formats: coco and lvis (JSON with images and annotations), visual_genome (region_descriptions.json), grit "
    "(Visual Genome in COCO form), refcoco (MDETR's finetune_refcoco*.json), sa1b (folder of sa_*.json), jsonl (one "
    "JSON object per line), parquet (a file or folder written by write_parquet); with conversations: flickr30k "
    "(MDETR's final_flickr_*.json), osprey, llava (JSON lists), shikra, vcr (JSON lines), gar (folder of arrow files, "
    "parquet or JSON lines)"
)


def open_samples(path: str | Path, format: str | None = None, image_root: str | Path | None = None) -> SampleReader:
    """Open a file or folder of samples for random access.

    Args:
        path: a JSON, JSON-lines or parquet file, or a folder of SA-1B, parquet or arrow files.
        format: a key of `FORMATS`; by default recognised by the content.
        image_root: folder of the pictures, where it is not that of the file. Parquet files hold their pictures.

    Raises:
        MissingFileError: there is nothing at `path`.
        InputError: an unknown format, or one that cannot be recognised; a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"samples: there is no file or folder {path}")
    if format is not None and format not in FORMATS:
        raise InputError(f"unknown format {format!r}; {_ABOUT}")
    options: dict[str, Any] = {}
    if format is None:
        format = _format_of_folder(path) if path.is_dir() else _format_of_file(path)
    if format is None:
        options["document"] = read_json(path)
        format = _format_of_document(options["document"], path)
    if format != "parquet":
        options["image_root"] = image_root
    try:
        return FORMATS[format](path, **options)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not have the form of {format} ({error!r})") from error


def _format_of_folder(path: Path) -> str:
    if next(path.glob("*.parquet"), None) is not None:
        return _format_of_parquet(path)
    if (path / "dataset_info.json").is_file():
        return "gar"
    if next(path.rglob("sa_*.json"), None) is not None:
        return "sa1b"
    raise InputError(f"{path}: neither sa_*.json nor *.parquet in this folder; {_ABOUT}")


def _format_of_file(path: Path) -> str | None:
    """The format where the first line tells it; None for what must be read as one JSON document."""
    with open(path, "rb") as stream:
        line = stream.readline(_FIRST_LINE).strip()
    if line.startswith(b"PAR1"):
        return _format_of_parquet(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _format_of_line(line) or "jsonl"
    if line[:1] not in (b"{", b"[", b""):
        raise InputError(f"{path}: the format is not recognised; {_ABOUT}")
    return _format_of_line(line)


def _format_of_line(line: bytes) -> str | None:
    """The format of JSON lines by the keys of the first; None where it is no record of a known one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    for format, keys in _LINE_KEYS.items():
        if not record.keys().isdisjoint(keys):
            return format
    if "from" in _first(record.get("conversations")):
        return "llava"
    return "jsonl" if "image" in record else None


def _format_of_parquet(path: Path) -> str:
    """GAR's rows have masks of their own; all others are taken for ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return "gar" if "mask_rle" in pq.read_schema(parquet_files(path)[0]).names else "parquet"
    except pa.ArrowInvalid:
        return "parquet"  # whose reader says what is wrong


def _format_of_document(document: Any, path: Path) -> str:
    if isinstance(document, list) and all(isinstance(item, dict) and "regions" in item for item in document[:5]):
        return "visual_genome"
    if isinstance(document, list) and {"annotation", "conversations"} & _first(document).keys():
        return "osprey" if "annotation" in document[0] else "llava"
    if not isinstance(document, dict) or not {"images", "annotations"} <= document.keys():
        raise InputError(f"{path}: the format is not recognised; {_ABOUT}")
    image, annotation = (_first(document[key]) for key in ("images", "annotations"))
    if "caption" in image and ("sentence_id" in image or str(image.get("dataset_name")).startswith("flickr")):
        return "flickr30k"
    if "caption" in image and ("tokens_negative" in image or "tokens_positive" in annotation):
        return "refcoco"
    return "grit" if _looks_like_grit(image, annotation, document.get("categories")) else "coco"


def _first(records: Any) -> dict[str, Any]:
    first = records[0] if isinstance(records, list) and records else None
    return first if isinstance(first, dict) else {}


def _looks_like_grit(image: dict[str, Any], annotation: dict[str, Any], categories: Any) -> bool:
    """Boxes with captions, no masks, at most the class "object", pictures called by Visual Genome's numbers."""
    single = isinstance(categories, list) and len(categories) == 1
    classless = not categories or (single and _first(categories).get("name") == "object")
    numbered = Path(str(image.get("file_name"))).stem.isdigit()
    return classless and numbered and {"caption", "bbox"} <= annotation.keys() and not annotation.get("segmentation")
