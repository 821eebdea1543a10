"""Samples to files that our readers read; a file appears only when it is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..regions import Region, region_to_json
from .samples import RegionSample, encode_image

ROWS_PER_GROUP = 100  # of a parquet file: what a reader holds at a time


def write_jsonl(samples: Iterable[RegionSample], path: str | Path) -> int:
    """Write one JSON object per line, masks as they are (arrays become RLE).

    Pictures that are files stay where they are: below the folder of `path` they are named relative to it, else by
    their full path. All others are written as PNG into `<name>_images` beside the file.

    Returns:
        Number of samples written.

    Raises:
        InputError: a picture cannot be read, or a value that JSON cannot hold.
    """
    path = Path(path)
    count = 0
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as stream:
        for count, sample in enumerate(samples, 1):
            record = _record(sample, _image_name(sample, path, count - 1))
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


def write_parquet(samples: Iterable[RegionSample], path: str | Path, shards: int = 1) -> list[Path]:
    """Write parquet with the pictures inside, readable by `open_samples`, `stream_samples` and `datasets`.

    Args:
        samples: with `shards` above 1 their number must be known (a sequence).
        path: the file; with `shards` above 1, "name.parquet" becomes name-00000-of-00008.parquet and so on.
        shards: files to spread over, in order; for streaming, a multiple of processes times loader workers.

    Returns:
        The files written. All of them appear at the end.

    Raises:
        InputError: a picture or mask that cannot be read, or too few samples for the shards.
    """
    path = Path(path)
    if shards == 1:
        with whole_file(path) as part:
            _write_rows(samples, part)
        return [path]
    if not isinstance(samples, Sequence) or not 1 <= shards <= len(samples):
        raise InputError(f"write_parquet: {shards} shards need a sequence of at least that many samples")
    targets = [path.with_name(f"{path.stem}-{i:05d}-of-{shards:05d}{path.suffix}") for i in range(shards)]
    borders = [len(samples) * i // shards for i in range(shards + 1)]
    parts = [_part_of(target) for target in targets]
    try:
        for part, start, stop in zip(parts, borders, borders[1:], strict=False):
            _write_rows((samples[i] for i in range(start, stop)), part)
        for part, target in zip(parts, targets, strict=True):
            os.replace(part, target)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return targets


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` if the block ends well, else it is removed."""
    part = _part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it first")
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _write_rows(samples: Iterable[RegionSample], path: Path) -> None:
    from datasets.arrow_writer import ParquetWriter

    from .features import FEATURES

    # rows hold the bytes already: `Dataset.to_parquet` would store the path of a picture that is a file
    with ParquetWriter(features=FEATURES, path=str(path), writer_batch_size=ROWS_PER_GROUP) as writer:
        for sample in samples:
            writer.write(FEATURES.encode_example(sample.to_row()))
        writer.finalize()


def _image_name(sample: RegionSample, path: Path, index: int) -> str:
    """The picture as the file will name it, written beside it where it is no file yet."""
    folder = path.absolute().parent
    if isinstance(sample.image, (str, Path)):
        image = Path(sample.image).absolute()
        return str(image.relative_to(folder)) if image.is_relative_to(folder) else str(image)
    name = f"{path.stem}_images/{index:08d}.png"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(encode_image(sample.image))
    return name


def _record(sample: RegionSample, image: str) -> dict[str, Any]:
    """The sample as one JSON object; what is empty is left out."""
    chat = bool(sample.conversations) and all("role" in turn for turn in sample.conversations)
    record = {
        "id": sample.id,
        "image": image,
        "size": sample.size and list(sample.size),
        "regions": [_region(region) for region in sample.regions],
        "captions": sample.captions,
        "messages" if chat else "conversations": sample.conversations,
        "source": sample.source,
        "license": sample.license,
    }
    return {key: value for key, value in record.items() if value}


def _region(region: Region) -> Region:
    """JSON-ready; the path of a mask in full, since readers take relative ones from the file's folder."""
    mask = region.get("mask")
    path = {"mask": str(Path(mask).absolute())} if isinstance(mask, (str, Path)) else {}
    return region_to_json(region | path)
