"""Regions on the command line: `--box`, `--point` and `--mask`, in the order in which they were given."""

from __future__ import annotations

from collections.abc import Sequence
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


class OrderedCommand(TyperCommand):
    """Remembers in which order region options of different kinds were given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by typer."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["regions"] = [param.name for param in order if param.name in REGION_OPTIONS]
        return super().parse_args(ctx, args)


def given_regions(
    ctx: typer.Context, box: Sequence[str] | None, point: Sequence[str] | None, mask: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Region dicts in the order of the command line, whatever their kind; needs an [`OrderedCommand`].

    Raises:
        InputError: an option that cannot be read.
    """
    queues = {"box": iter(box or []), "point": iter(point or []), "mask": iter(mask or [])}
    return [parse_option(kind, next(queues[kind])) for kind in ctx.meta["regions"]]


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
