"""Command line of the token cache: `tap-llm tokenize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_quiet import quiet, quiet_datasets
from .errors import InputError

if TYPE_CHECKING:
    from .data import SampleReader
    from .region_llm.token_builder import TokenReport


class Stopped(Exception):
    """Ctrl-C where work can go on later; the message says how."""


def tokenize(
    dataset: Annotated[
        Path, typer.Argument(help="File or folder of samples, as `data validate` reads it.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; continued if it exists.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="TAP: bundled name, folder, hub id, or official name (tap_vit_b_v1_1).")
    ] = "tap-tiny",
    projector: Annotated[
        str, typer.Option(metavar="NAME", help="Store what lite, base or full reads; full stores the whole image too.")
    ] = "base",
    roi_grid: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Grid over each box; 0: none. [default: as the projector]")
    ] = None,
    global_grid: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Grid of image tokens; 0: none. [default: as the projector]")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="What tokens are stored in: float32, float16 or bfloat16.")
    ] = "float16",
    compute_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="What TAP runs in: float32, bfloat16, float16; auto: as its weights.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures encoded at a time.")] = 4,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Processes that load pictures.")] = 2,
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples per file.")] = 256,
    image_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the pictures. [default: that of the file]")
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="As in `data validate`. [default: by the content]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1. [default: an accelerator of its own]")
    ] = None,
    broken_share: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Stop if a larger share of samples is broken.")
    ] = 0.01,
    rank: Annotated[int, typer.Option(metavar="N", min=0, envvar="RANK", help="Number of this process.")] = 0,
    world_size: Annotated[
        int, typer.Option(metavar="N", min=1, envvar="WORLD_SIZE", help="Processes that share the work.")
    ] = 1,
    local_rank: Annotated[int, typer.Option(min=0, envvar="LOCAL_RANK", hidden=True)] = 0,
) -> None:
    """Run TAP over a data set once, so that region chat trains without images.

    Interrupted, or killed: run it again, it goes on where it stopped. Several processes share the work, on one machine
    or many that see the same folder: start each with its --rank and the same --world-size, or one per GPU with
    accelerate launch (or torchrun) -m tap_llm.cli tokenize ..., which sets both.

    Example: tap-llm tokenize osprey.json tokens --image-root coco --model tap_vit_b_v1_1 --projector full
    """
    quiet_datasets()
    grids = _grids(projector, roi_grid, global_grid)
    samples = _open(dataset, format, image_root)
    tap, processor = _load(model, compute_dtype, _device(device, local_rank))
    from .region_llm.token_builder import build_token_cache

    try:
        report = build_token_cache(
            samples, tap, processor, out, *grids, dtype, shard_size, rank, world_size,
            batch_size=batch_size, workers=workers, broken_share=broken_share, data_name=str(dataset),
            model_name=model, progress=sys.stderr.isatty() and rank == 0,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; {_state(out)}: run the same command again to go on") from None
    for problem in report.problems:
        print(f"tap-llm: no tokens (delete this file to try again): {problem}", file=sys.stderr)
    print(f"{_said(report)}; {_state(out)}")


def _grids(projector: str, roi_grid: int | None, global_grid: int | None) -> tuple[int, int]:
    """Given grids, else the default ones of what the projector reads."""
    from .region_llm.configuration_tap_llm import TapLlmConfig
    from .region_llm.projectors import find_projector

    reads = find_projector(projector)
    roi = TapLlmConfig.roi_grid if reads.uses_roi else 0
    image = TapLlmConfig.global_grid if reads.uses_global else 0
    return (roi if roi_grid is None else roi_grid), (image if global_grid is None else global_grid)


def _open(dataset: Path, format: str | None, image_root: Path | None) -> SampleReader:
    """The samples; what is left out or wrong with the file is told."""
    from .data import open_samples

    samples = open_samples(dataset, format, image_root)
    for note in (*samples.notes, *samples.faults):
        print(f"tap-llm: {note}", file=sys.stderr)
    if not len(samples):
        raise InputError(f"{dataset}: there are no samples in it")
    return samples


def _load(model: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """TAP on its device, and its processor."""
    quiet()
    from .loading import load_tap

    tap, processor, _ = load_tap(model, dtype=dtype)
    return tap.to(device), processor


def _device(name: str | None, local_rank: int) -> Any:
    """The device that was asked for; processes of a machine take its accelerators in turn."""
    import torch

    from .loading import parse_device

    device = parse_device(name)
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, local_rank % torch.accelerator.device_count())


def _said(report: TokenReport) -> str:
    if not report.samples:
        return "nothing was left to do"
    speed = report.regions / report.seconds
    return f"{report.samples} samples with {report.regions} regions in {report.seconds:.0f} s, {speed:.1f} regions/s"


def _state(out: Path) -> str:
    """How far the whole cache is, all processes together."""
    from .data.shards import ShardFolder
    from .region_llm.token_cache import TOKENS

    try:
        shards = ShardFolder.read(out, TOKENS)
    except (InputError, OSError):
        return f"{out} is not begun"
    total = shards.index.shards
    done = total - len(shards.missing())
    return f"{out} is complete, {total} shards" if done == total else f"{out} has {done} of {total} shards"
