"""Command line of merging: `tap-llm merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_quiet import quiet
from .folders import check_free, new_folder


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, from training.chat.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    tap: Annotated[str | None, typer.Option(metavar="NAME", help="Its TAP, if it lies elsewhere now.")] = None,
    llm: Annotated[str | None, typer.Option(metavar="NAME", help="Its LLM, if it lies elsewhere now.")] = None,
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Merge into the LLM as 4 bits had rounded it, as in training.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of the weights: auto (as they are), float32, bfloat16 or float16.")
    ] = "auto",
) -> None:
    """Make an adapter, its TAP and its LLM one plain model.

    Example: tap-llm merge runs/chat/final whole-model
    """
    check_free(out)
    quiet()
    from .loading import parse_dtype
    from .region_llm.adapters import load_adapter
    from .region_llm.adapters import merge as merged

    wanted = parse_dtype(dtype)
    model, processor = load_adapter(adapter, tap, llm, dtype="auto" if four_bit else wanted, four_bit=four_bit)
    whole = merged(model, wanted)
    with new_folder(out) as folder:
        whole.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"wrote {out}")
