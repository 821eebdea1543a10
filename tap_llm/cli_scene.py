"""Command line of procedural scenes: `tap-llm scene`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_picture import check_target, save_picture
from .errors import InputError

if TYPE_CHECKING:
    from .data import RegionSample


def scene(
    out: Annotated[Path, typer.Argument(help="Picture to write.", show_default=False)],
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="The same seed gives the same scene.")] = 0,
    size: Annotated[str, typer.Option(metavar="WxH", help="Width and height in pixels.")] = "400x300",
    sprites: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of named cut-outs. Repeatable. [default: bundled pictograms]"),
    ] = None,
    backgrounds: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Background pictures, folder or file. Repeatable. [default: drawn ones]"),
    ] = None,
    mosaic: Annotated[bool, typer.Option("--mosaic", help="A grid of single objects instead.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON with masks, as `data validate` reads it.")
    ] = False,
) -> None:
    """Compose a picture whose objects, masks, names and captions are known.

    Example: tap-llm scene scene.png --seed 7 --json >> scenes.jsonl
    """
    check_target(out, str(out))
    width, height = _parse_size(size)
    from .data.instructions import converse
    from .data.scenes import SceneComposer
    from .data.sprites import SpriteLibrary

    library = SpriteLibrary.from_folders(sprites) if sprites else SpriteLibrary.bundled()
    composer = SceneComposer(library, backgrounds or ())
    composed = (composer.mosaic if mosaic else composer.scene)(seed, (width, height))
    sample = composed.to_sample()
    sample.conversations = converse(composed, seed).messages
    save_picture(sample.load_image(), out)
    print(_json_line(sample, out) if as_json else _captions(sample))


def _parse_size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(f"--size {text}: expected width and height in pixels, such as 400x300") from None
    return width, height


def _captions(sample: RegionSample) -> str:
    """One line per object, back to front: its long caption, or its name where it has none."""
    return "\n".join((region["captions"] or [region["category"]] * 2)[1] for region in sample.regions)


def _json_line(sample: RegionSample, image: Path) -> str:
    from .regions import region_to_json

    record = {
        "image": str(image),
        "size": sample.size,
        "regions": [region_to_json(region) for region in sample.regions],
        "messages": sample.conversations,
        "source": sample.source,
    }
    return json.dumps(record, ensure_ascii=False)
