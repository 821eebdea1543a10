"""Command line of data files: `tap-llm data ...`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_quiet import quiet_datasets
from .errors import InputError

if TYPE_CHECKING:
    from .data import SampleReader, Validation

app = typer.Typer(help="Check files of pictures with regions.", rich_markup_mode=None)


@app.callback()
def _commands() -> None:
    """Keeps `validate` a sub-command however few there are."""


@app.command()
def validate(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="File, or folder of SA-1B or parquet.", show_default=False)
    ],
    image_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the pictures. [default: that of the file]")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Check the first N samples only.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="coco, lvis, visual_genome, grit, refcoco, sa1b, jsonl, parquet, flickr30k, osprey, llava, shikra, "
            "vcr or gar. [default: by the content]",
        ),
    ] = None,
) -> None:
    """Read every sample and list what is broken: the place, and what is wrong with it.

    Example: tap-llm data validate train.jsonl --image-root photos
    """
    quiet_datasets()
    from .data import Validation, open_samples
    from .data import validate as validated

    reader = open_samples(path, format, image_root)
    for note in reader.notes:
        print(f"tap-llm: {note}", file=sys.stderr)
    for fault in reader.faults:
        print(fault)
    if not len(reader):
        raise InputError(f"{path}: there are no samples in it")
    result = Validation()
    total = len(reader) if limit is None else min(limit, len(reader))
    missing = _print_problems(validated(reader, result, limit), total)
    summary = _summary(path, reader, result)
    if result.broken or reader.faults:
        hint = f"; pictures are looked for in {reader.root}, choose another folder with --image-root" if missing else ""
        raise InputError(summary + hint)
    print(f"tap-llm: {summary}", file=sys.stderr)


def _print_problems(found: Iterable[list[str]], total: int) -> bool:
    """Print faults as they are found, with a progress bar on a terminal; whether a picture file was missing."""
    from tqdm import tqdm

    missing = False
    with tqdm(found, total=total, unit=" samples", disable=None, leave=False, file=sys.stderr) as bar:
        for problems in bar:
            for problem in problems:
                bar.write(problem, file=sys.stdout)
                missing |= "image: there is no file" in problem
    return missing


def _summary(path: Path, reader: SampleReader, result: Validation) -> str:
    checked = result.good + result.broken
    text = (
        f"{path}: {checked} samples checked, {result.good} good with {result.regions} regions, {result.broken} broken"
    )
    return text + (f", {len(reader.faults)} faults of the file as a whole" if reader.faults else "")
