"""Command line of CaR: `tap-llm find`, from texts to masks."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_picture import picture_path, save_picture
from .cli_quiet import quiet
from .cli_table import Cell, box_text, table, terminal_width
from .errors import InputError

if TYPE_CHECKING:
    from .clip_as_rnn import CarOutput, CarPipeline

_LABEL_LENGTH = 60  # characters of a query in the table and on the picture


def find(
    image: Annotated[Path, typer.Argument(help="Picture file.", show_default=False)],
    queries: Annotated[
        list[str] | None, typer.Argument(metavar="QUERY...", help="What to look for.", show_default=False)
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Preset (default, voc, refcoco, ...), folder, or a CLIP model.")
    ] = "tiny",
    f: Annotated[
        str | None, typer.Option("--f", metavar="NAME", help="CLIP model that proposes, in place of the preset's.")
    ] = None,
    g: Annotated[
        str | None, typer.Option("--g", metavar="NAME", help="CLIP model that judges, in place of the preset's.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="semantic: the queries compete; referring: all mean one thing."),
    ] = None,
    refine: Annotated[
        str, typer.Option(metavar="HOW", help="Edges by none, by a dense crf, or by the crf and tap.")
    ] = "tap",
    tap: Annotated[
        str, typer.Option(metavar="NAME", help="TAP model that refines and describes, as in describe --model.")
    ] = "tap-tiny",
    background: Annotated[
        str | None, typer.Option(metavar="WORDS", help="What else may be there: 'grass, sky'; '' for nothing else.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, as keep_threshold=0.4. Repeatable."),
    ] = None,
    describe: Annotated[bool, typer.Option("--describe", help="Also name and caption what is found.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON only, masks as COCO RLE; a picture only with --out.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to write. [default: photo.jpg gives photo.find.png]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. [default: the first accelerator]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Masks of what you name; no training, any words.

    Example: tap-llm find photo.jpg 'the red kite' 'a dog' --out found.png
    """
    from .clip_as_rnn.notes import checked_queries
    from .images import load_image

    options = _options({"f": f, "g": g, "mode": mode, "refine": refine}, background, setting or [])
    texts = checked_queries(queries or [])
    target = picture_path(image, out, as_json, ".find.png")
    picture = load_image(image)
    pipe = _load(model, tap, device, None if dtype == "auto" else dtype, options)
    source = pipe.tap.encode(picture) if describe or pipe.config.refine == "tap" else picture
    with _told_warnings():
        found = pipe(source, texts, progress=None if sys.stderr.isatty() else False)
    for note in found.notes:
        _note(note)
    results = _described(pipe, source, found) if describe else []
    print(_to_json(image, found, results) if as_json else _to_table(found, results))
    if target is not None:
        from .visualize import draw_regions

        save_picture(draw_regions(picture, _labelled(found, results)), target, "choose another --out")
        _note(f"picture: {target}")


def _options(given: dict[str, str | None], background: str | None, settings: Sequence[str]) -> dict[str, Any]:
    """Settings of CaR that the command line names, checked."""
    import yaml

    from .clip_as_rnn import CarConfig

    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if background is not None:
        options["background"] = [word.strip() for word in background.split(",") if word.strip()]
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected NAME=VALUE, such as keep_threshold=0.4")
        try:
            options[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {setting}: the value cannot be read; quote it as in YAML") from None
    CarConfig().updated(**options)
    return options


def _load(model: str, tap: str, device: str | None, dtype: str | None, options: dict[str, Any]) -> CarPipeline:
    quiet()
    from .clip_as_rnn import CarPipeline
    from .clip_as_rnn.presets import BUNDLED_CLIP

    pipe = CarPipeline.from_pretrained(model, device, dtype, tap=tap, **options)
    if BUNDLED_CLIP in (pipe.config.f, pipe.config.g):
        _note(f"{BUNDLED_CLIP} is a small model for drawn scenes, to try things out; for photos: --model default")
    return pipe


@contextmanager
def _told_warnings() -> Iterator[None]:
    """Warnings meant for users, such as of a query that is too long, become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        _note(message)


def _described(pipe: CarPipeline, source: Any, found: CarOutput) -> list[dict[str, Any]]:
    """What TAP says of each region found; the masks stay those found."""
    regions = found.regions()
    results: Any = pipe.tap(source, regions=regions) if regions else []
    return [{**result, "mask": region["mask"]} for result, region in zip(results, regions, strict=True)]


def _to_json(image: Path, found: CarOutput, results: Sequence[dict[str, Any]]) -> str:
    """One JSON object; its regions are what `describe --regions` and `chat --regions` take."""
    from .regions import region_to_json

    said = ("iou", "concept", "concept_score", "caption")
    present = set(found.found)
    record: dict[str, Any] = {
        "image": str(image),
        "size": list(found.size),
        "mode": found.mode,
        "queries": [
            {"id": index, "query": query, "found": index in present, "score": float(score)}
            for index, (query, score) in enumerate(zip(found.queries, found.scores, strict=True))
        ],
        "regions": [region_to_json(region) for region in found.regions()],
        "trace": [vars(step) for step in found.trace],
        "notes": found.notes,
    }
    if results:
        record["described"] = [{key: result[key] for key in said} for result in results]
    return json.dumps(record, ensure_ascii=False)


def _to_table(found: CarOutput, results: Sequence[dict[str, Any]]) -> str:
    """One row per query, and where they are merged a line below; a query without a pixel is not found."""
    masks = {region["id"]: region["mask"] for region in found.regions(merged=False)}
    merged = found.merged_mask is not None
    said = {} if merged else {result["region"]["id"]: result for result in results}
    rows = [_row(found, index, masks.get(index), said.get(index)) for index in range(len(found.queries))]
    header = ["query", "score", "box", *(["concept", "caption"] if said else [])]
    lines = [table(header, [row[: len(header)] for row in rows], terminal_width())]
    if merged:
        texts = [f"{result['concept']}: {result['caption']}" for result in results]
        boxes = [_box_of(region["mask"]) for region in found.regions()] or ["not found"]
        lines.append("  ".join(["together:", *boxes, *texts]))
    return "\n".join(lines)


def _row(found: CarOutput, index: int, mask: Any, result: dict[str, Any] | None) -> list[Cell]:
    place = ["", "not found"] if mask is None else [f"{found.scores[index]:.2f}", _box_of(mask)]
    text = ["", ""] if result is None else [result["concept"], result["caption"]]
    return [[part] for part in (_brief(found.queries[index]), *place, *text)]


def _box_of(mask: Any) -> str:
    from .masks import mask_to_box

    return box_text(mask_to_box(mask))


def _labelled(found: CarOutput, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `draw_regions` draws: masks with query, score and caption."""
    captions = [result["caption"] for result in results] or [""] * len(found.regions())
    return [
        {
            "mask": region["mask"],
            "concept": _brief(region["category"]),
            "concept_score": float(found.scores[region["id"]]),
            "caption": caption,
        }
        for region, caption in zip(found.regions(), captions, strict=True)
    ]


def _brief(query: str) -> str:
    from .clip_as_rnn.text import shorten

    return shorten(" ".join(query.split()), _LABEL_LENGTH)


def _note(message: str) -> None:
    print(f"tap-llm: {message}", file=sys.stderr)
