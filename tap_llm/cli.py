"""Command line: `tap-llm`, the same as `python -m tap_llm.cli`.

Exit status 0 on success, 2 on bad input (one message on stderr), 130 on Ctrl-C. Results go to stdout, everything
else to stderr. Picture, regions and output are checked before a model is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_chat import chat
from .cli_data import app as data_app
from .cli_export import export
from .cli_find import find
from .cli_merge import merge
from .cli_picture import picture_path, save_picture
from .cli_quiet import quiet
from .cli_regions import (
    BoxOption,
    MaskOption,
    OrderedCommand,
    PointOption,
    RegionsOption,
    check_inputs,
    given_regions,
)
from .cli_scene import scene
from .cli_table import Cell, box_text, table, terminal_width
from .cli_tokenize import Stopped, tokenize
from .errors import InputError

INTERRUPTED = 130  # as the shell counts it: 128 + SIGINT
# Base of all usage errors; newer typer has its own copy of click and does not export it.
_ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="tap-llm",
    help="Point at anything in an image: get its mask, its name and a caption.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")


@app.callback()
def _commands() -> None:
    """Keeps `describe` a sub-command however few there are."""


@app.command(cls=OrderedCommand)
def describe(
    ctx: typer.Context,
    image: Annotated[Path, typer.Argument(help="Picture file.", show_default=False)],
    box: BoxOption = None,
    point: PointOption = None,
    mask: MaskOption = None,
    regions: RegionsOption = None,
    everything: Annotated[bool, typer.Option("--everything", help="Find all regions instead.")] = False,
    points_per_side: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="--everything: grid of N x N points. Repeatable. [default: 32]"),
    ] = None,
    crop_layers: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=4, help="--everything: also search N layers of crops, for small objects."),
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON only, masks as COCO RLE; a picture only with --out.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to write. [default: photo.jpg gives photo.tap.png]")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Bundled name, folder, hub id, or official name (tap_vit_b_v1_1).")
    ] = "tap-tiny",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="SentencePiece file tokenizer.model, where the model lacks one.")
    ] = None,
    concepts: Annotated[
        str | None, typer.Option(metavar="NAME", help="Concept space to name with: file, folder or name.")
    ] = None,
    captions: Annotated[bool, typer.Option("--captions/--no-captions", help="Caption the regions.")] = True,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. [default: the first accelerator]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    top_k: Annotated[int, typer.Option(metavar="N", min=1, help="Names per region.")] = 1,
) -> None:
    """Masks, names and captions of the regions you point at.

    Example: tap-llm describe photo.jpg --box 40,30,300,280 --point '120,80 200,90,0' --out photo.png
    """
    settings: dict[str, Any] = {"points_per_side": tuple(points_per_side)} if points_per_side else {}
    settings |= {"crop_layers": crop_layers} if crop_layers else {}
    if settings and not everything:
        raise InputError("--points-per-side and --crop-layers go with --everything")
    given = given_regions(ctx, box, point, mask, regions)
    _check_choice(given, everything)
    target = picture_path(image, out, as_json, ".tap.png")
    picture = check_inputs(image, given)
    pipe = _load_pipeline(model, tokenizer, concepts, device, dtype)
    if captions and not pipe.can_caption:
        _note("no captions: this model has no tokenizer; pass its SentencePiece file with --tokenizer FILE")
    options = {"everything": settings or True, "progress": sys.stderr.isatty()} if everything else {"regions": given}
    results = pipe(picture, captions=captions and pipe.can_caption, top_k=top_k, **options)
    print(_to_json(results) if as_json else _table(results, terminal_width()))
    if target is not None:
        from .visualize import draw_regions

        save_picture(draw_regions(picture, results), target, "choose another --out")
        _note(f"picture: {target}")


app.command(cls=OrderedCommand)(chat)
app.command()(export)
app.command()(find)
app.command()(merge)
app.command()(scene)
app.command()(tokenize)


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Official weights, such as tap_vit_b_v1_1.pkl.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    concepts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Official concept weights, such as merged_2560.pkl.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SentencePiece file tokenizer.model, for captions.")
    ] = None,
) -> None:
    """Turn official weights into a folder for Transformers.

    Example: tap-llm convert tap_vit_b_v1_1.pkl tap-base --concepts merged_2560.pkl
    """
    quiet()
    from .tap.conversion import convert_checkpoint

    report = convert_checkpoint(checkpoint, out, concepts=concepts, tokenizer=tokenizer)
    print(f"wrote {out}: {str(report) or 'every tensor has its place'}")
    if tokenizer is None:
        _note("no captions without a tokenizer: convert again with --tokenizer FILE to have them")


def _check_choice(regions: Sequence[Any], everything: bool) -> None:
    if regions and everything:
        raise InputError(
            "--everything finds the regions itself: give it, or --box, --point, --mask and --regions, not both"
        )
    if not regions and not everything:
        raise InputError(
            "no region given: use --box x0,y0,x1,y1, --point x,y or --mask FILE (each repeatable), --regions FILE, "
            "or --everything"
        )


def _load_pipeline(model: str, tokenizer: str | None, concepts: str | None, device: str | None, dtype: str) -> Any:
    quiet()
    from .hub import OFFICIAL_MODELS
    from .pipelines import RegionPipeline

    if model in OFFICIAL_MODELS:
        _note(f"looking for {model}; the first use downloads and converts it")
    pipe = RegionPipeline.from_pretrained(model, tokenizer, concepts, device, dtype)
    if pipe.model.config.provisional:
        _note(f"{model} is provisional: a small model for trying things out, not for its accuracy")
    return pipe


def _to_json(results: Sequence[dict[str, Any]]) -> str:
    """The pipeline's list, masks as COCO RLE; one region per line."""
    from .masks import encode_rle
    from .regions import region_to_json

    ready = [{**r, "region": region_to_json(r["region"]), "mask": encode_rle(r["mask"])} for r in results]
    return "[" + ",\n ".join(json.dumps(result, ensure_ascii=False) for result in ready) + "]"


def _table(results: Sequence[dict[str, Any]], width: int | None) -> str:
    """Numbered rows; captions wrap so that lines fit `width` columns."""
    if not results:
        return "no regions found"
    header = ["concept", "score", "IoU", "box", "caption"]
    return table(header, [_cells(result) for result in results], width)


def _cells(result: dict[str, Any]) -> list[Cell]:
    names = result.get("concepts") or [[result["concept"], result["concept_score"]]]
    shown = [(name, score) for name, score in names if name] or [("-", None)]
    return [
        [name for name, _ in shown],
        ["" if score is None else f"{score:.2f}" for _, score in shown],
        [f"{result['iou']:.2f}"],
        [box_text(result["box"])],
        [" ".join(result["caption"].split())],
    ]


def _note(message: str) -> None:
    print(f"tap-llm: {message}", file=sys.stderr)


def _fail(error: BaseException | str) -> int:
    _note(" ".join(str(error).split()) or type(error).__name__)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0 done, 2 bad input, 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        status = app(args=args, prog_name="tap-llm", standalone_mode=False) or 0
        if status == INTERRUPTED:  # how typer passes Ctrl-C on
            _note("interrupted")
        return status
    except Stopped as stop:
        _note(str(stop))
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        _note("interrupted")
        return INTERRUPTED
    except _ClickException as error:
        return _fail(f"{error.format_message()} (see tap-llm --help)")
    except (InputError, OSError) as error:
        return _fail(error)


if __name__ == "__main__":
    sys.exit(main())
