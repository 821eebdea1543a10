"""Command line of export: `tap-llm export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_quiet import quiet


def export(
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="TAP to write: bundled or official name, folder, hub id.")
    ] = "tap-tiny",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="SentencePiece file to write along, where the model has none.")
    ] = None,
    concepts: Annotated[
        str | None, typer.Option(metavar="NAME", help="Concept space to write: file, folder or name.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a model as ONNX files that run without torch, checked against torch.

    Example: tap-llm export tap-onnx --model tap_vit_b_v1_1
    """
    from .export.exporting import check_target

    check_target(out, overwrite)
    quiet()
    from .export import export_onnx

    about = export_onnx(model, out, tokenizer=tokenizer, concepts=concepts, overwrite=overwrite, progress=_note)
    if about["tokenizer"] is None:
        _note("no captions without a tokenizer: export again with --tokenizer FILE to have them")
    largest = max(max(graph["largest_difference"].values()) for graph in about["graphs"].values())
    print(f"wrote {out}: {', '.join(graph['file'] for graph in about['graphs'].values())}")
    print(f"largest difference from torch: {largest:.1g}")


def _note(message: str) -> None:
    print(f"tap-llm: {message}", file=sys.stderr)
