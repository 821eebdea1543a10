"""Regions on the command line: `--box`, `--point`, `--mask` and `--regions`, in the order in which they were given."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .errors import InputError

REGION_OPTIONS = ("box", "point", "mask")

BoxOption = Annotated[list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Region: box in pixels. Repeatable.")]
PointOption = Annotated[
    list[str] | None,
    typer.Option(metavar="'X,Y ...'", help="Region: point, or several; X,Y,0 lies outside. Repeatable."),
]
MaskOption = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="Region: mask image of the picture's size. Repeatable.")
]
RegionsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Regions: JSON of find or describe, or a list; - reads it from stdin."),
]
_OPTIONS = (*REGION_OPTIONS, "regions")
_FORMS = ("box", "points", "sketch", "mask")


class OrderedCommand(TyperCommand):
    """Remembers in which order region options of different kinds were given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by typer."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["regions"] = [param.name for param in order if param.name in _OPTIONS]
        return super().parse_args(ctx, args)


def given_regions(
    ctx: typer.Context,
    box: Sequence[str] | None,
    point: Sequence[str] | None,
    mask: Sequence[str] | None,
    regions: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Region dicts in the order of the command line, whatever their kind; needs an [`OrderedCommand`].

    Raises:
        InputError: an option that cannot be read.
    """
    values = {"box": box, "point": point, "mask": mask, "regions": regions}
    queues = {kind: iter(given or []) for kind, given in values.items()}
    found: list[dict[str, Any]] = []
    for kind in ctx.meta["regions"]:
        text = next(queues[kind])
        found += read_regions(text) if kind == "regions" else [parse_option(kind, text)]
    return found


def read_regions(file: str) -> list[Any]:
    """Regions of a JSON file: a list of regions or of the results of `describe --json`, or what `find --json` prints.

    They are not checked yet.

    Args:
        file: its name; "-" for the standard input.

    Raises:
        InputError: there is no such file, it holds something else, or no region.
    """
    name = f"--regions {file}"
    try:
        value = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{name}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: this is no JSON file ({error})") from None
    rows = value.get("regions") if isinstance(value, Mapping) else value
    if not isinstance(rows, list):
        raise InputError(f'{name}: expected a list of regions such as [{{"box": [x0, y0, x1, y1]}}]')
    if not rows:
        raise InputError(f"{name}: there is no region in it; was anything found?")
    return [row["region"] if isinstance(row, Mapping) and "region" in row else row for row in rows]


def region_text(region: Mapping[str, Any]) -> str:
    """A region in a few characters, such as `box 40,30,300,280` or `mask a dog`."""
    kind = next(key for key in _FORMS if region.get(key) is not None)
    value = region[kind]
    if kind == "box":
        text = ",".join(map(str, value))
    elif kind == "mask":
        text = value if isinstance(value, str) else str(region.get("category") or "")
    else:
        labels = region.get("labels") or [1] * len(value)
        rows = [[*point, *([] if label else [0])] for point, label in zip(value, labels, strict=True)]
        text = " ".join(",".join(map(str, row)) for row in rows)
    return f"{kind.removesuffix('s')} {text}".rstrip()


def parse_option(kind: str, text: str) -> dict[str, Any]:
    """One region of the command line.

    Args:
        kind: "box", "point" or "mask".
        text: its value.

    Raises:
        InputError: it cannot be read.
    """
    if kind == "mask":
        return {"mask": text}
    return _parse_box(text) if kind == "box" else _parse_points(text)


def check_inputs(image: Path, regions: list[dict[str, Any]]) -> Any:
    """Read the picture and check its regions before a model is loaded.

    Raises:
        InputError: either cannot be used.
    """
    from .images import load_image
    from .regions import parse_regions

    picture = load_image(image)
    parse_regions(regions, [(picture.height, picture.width)])
    return picture


def _parse_box(text: str) -> dict[str, Any]:
    return {"box": _numbers(text, (4,), f"--box {text}: expected four numbers x0,y0,x1,y1 in pixels")}


def _parse_points(text: str) -> dict[str, Any]:
    """'x,y[,0|1] x,y[,0|1]' -> one region."""
    message = f"--point {text}: expected x,y or x,y,1 (inside) or x,y,0 (outside), points separated by spaces"
    points = [_numbers(item, (2, 3), message) for item in text.split()]
    labels = [item[2] if len(item) == 3 else 1 for item in points]
    if not points or not set(labels) <= {0, 1}:
        raise InputError(message)
    return {"points": [item[:2] for item in points], "labels": [int(label) for label in labels]}


def _numbers(text: str, counts: tuple[int, ...], message: str) -> list[float]:
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError:
        raise InputError(message) from None
    if len(values) not in counts:
        raise InputError(message)
    return [int(value) if value.is_integer() else value for value in values]
