"""What the commands of all benchmarks share: arguments, models, the run, and what is printed at its end.

def main(arguments: Sequence[str] | None = None) -> Run:
    parser = benchmark_parser("mine", __doc__)
    common_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="annotations.json")
    args = parse(parser, arguments)
    pipe = load_pipeline(args)
    return finish(evaluate(Mine(pipe, args.data), args, describe_model(pipe, args.model)), args)

if __name__ == "__main__":
    sys.exit(cli(main))
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tap_llm.errors import InputError
from tap_llm.pipelines import DEFAULT_MODEL, RegionPipeline

from .base import Benchmark, Run, predictions_path, run
from .processes import own_device
from .tables import metrics_text

DEFAULT_FOLDER = Path("runs/eval")
SHOWN_FAULTS = 20


def benchmark_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m eval.<name>`; `doc` is the module's head."""
    return argparse.ArgumentParser(
        prog=f"python -m eval.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def common_arguments(
    parser: argparse.ArgumentParser,
    *,
    model: str = DEFAULT_MODEL,
    model_help: str = "bundled name, folder, hub id or official name",
    batch: str = "examples predicted at once",
    pipeline: bool = True,
    limit: bool = True,
) -> None:
    """Add --model, --out, --batch-size, --fresh, --device, --dtype, and by default --tokenizer, --concepts, --limit.

    Args:
        parser: to add to.
        model: default model.
        model_help: what --model takes.
        batch: what --batch-size counts.
        pipeline: the model is a [`RegionPipeline`]; False leaves out --tokenizer and --concepts.
        limit: False leaves out --limit.
    """
    add = parser.add_argument
    add("--model", default=model, help=f"{model_help} [{model}]")
    if pipeline:
        add("--concepts", help="concept space in place of the model's own")
        add("--tokenizer", help="tokenizer in place of the model's own")
    add("--out", type=Path, help="results file; predictions are kept beside it [runs/eval/BENCHMARK-MODEL.json]")
    if limit:
        add("--limit", type=positive, metavar="N", help="the first N examples only")
    add("--batch-size", type=positive, default=64, help=f"{batch} [64]")
    add("--fresh", action="store_true", help="discard stored predictions")
    add("--device", help="such as cpu or cuda:0")
    add("--dtype", help="such as bfloat16")


def positive(text: str) -> int:
    """An argument of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed, and that itself as `command`.

    Raises:
        InputError: --out is a folder.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(typed)
    args.command = typed
    if args.out is None:
        args.out = DEFAULT_FOLDER / f"{parser.prog.split('.')[-1]}-{Path(args.model).name}.json"
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder; name a file")
    args.device = own_device(args.device)
    return args


def load_pipeline(args: argparse.Namespace) -> RegionPipeline:
    """The model of `common_arguments`.

    Raises:
        InputError: it cannot be used.
    """
    return RegionPipeline.from_pretrained(
        args.model, args.tokenizer, args.concepts, device=args.device, dtype=args.dtype
    )


def evaluate(benchmark: Benchmark, args: argparse.Namespace, model: dict[str, Any], batch_size: int = 1) -> Run:
    """`run` as the command line wants it.

    Args:
        benchmark: what to run.
        args: of `parse`.
        model: of `describe_model` or `describe_modules`.
        batch_size: examples given to `predict_batch` at once; `args.batch_size` for benchmarks that have their own.

    Returns:
        What was found, in the first process; the others end here.

    Raises:
        InputError: as `run`.
    """
    finished = run(
        benchmark,
        args.out,
        model,
        args.fresh,
        command=args.command,
        batch_size=batch_size,
        limit=getattr(args, "limit", None),
    )
    return finished if finished is not None else sys.exit(0)


def finish(finished: Run, args: argparse.Namespace, text: str | None = None, notes: Iterable[str] = ()) -> Run:
    """Print tables, faults, speed, and where all that was written.

    Args:
        finished: of `evaluate`.
        args: of `parse`.
        text: tables; by default of all metrics.
        notes: lines to add.

    Returns:
        `finished`.
    """
    results = finished.results
    faults, more = results["faults"][:SHOWN_FAULTS], len(results["faults"]) - SHOWN_FAULTS
    lines = [
        metrics_text(results["metrics"]) if text is None else text,
        "",
        *(f"NOT EVALUATED: {fault}" for fault in faults),
        *([f"NOT EVALUATED: {more} more, all named in {args.out}"] if more > 0 else []),
        *(f"not measured: {metric}: {reason}" for metric, reason in results["not_measured"].items()),
        *notes,
        *speed_lines(results["speed"], results["processes"]),
        f"wrote {args.out} and {predictions_path(args.out)}",
    ]
    print("\n".join(lines))
    return finished


def speed_lines(speed: dict[str, Any], processes: int) -> list[str]:
    """One line, or none where nothing was predicted in this run."""
    if speed["examples_per_second"] is None:
        return []

    def rates(values: dict[str, Any]) -> str:
        named = {key.removesuffix("_per_second"): value for key, value in values.items()}
        return ", ".join(f"{value} {name}/s" for name, value in named.items() if name != "per_process")

    each = f" in all; {rates(speed['per_process'])} in each of {processes} processes" if processes > 1 else ""
    return [rates(speed) + each]


def cli(main: Callable[[], Any]) -> int:
    """A command with its errors as messages; returns the exit status."""
    try:
        main()
    except (InputError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        print("interrupted; the same command goes on from here" if stopped else error, file=sys.stderr)
        return 130 if stopped else 2
    return 0
