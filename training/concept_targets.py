"""Concept targets of a data set: embed every region once with a CLIP image tower (TAP, arXiv:2312.09128, section 3).

    python -m training.concept_targets --data instances.json --model path/to/clip --out targets/instances
    accelerate launch -m training.concept_targets ...          # the same on all GPUs

Run it again after an interruption, with any number of processes: finished shards stay, the rest is made.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from tap_llm.data.crops import ConceptTeacher
from tap_llm.data.readers import open_samples
from tap_llm.data.target_cache import SHARD_SIZE, TargetCache, build_target_cache
from tap_llm.errors import InputError
from tap_llm.loading import parse_dtype

PATIENCE = timedelta(days=30)  # processes that are done wait so long for the others


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="file or folder of samples, in any known format")
    parser.add_argument("--image-root", type=Path, help="folder of the pictures, if not that of the data")
    parser.add_argument("--model", required=True, help="folder or hub id of a CLIP or SigLIP model (safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the target cache; continued if it exists")
    parser.add_argument("--batch-size", type=int, default=64, help="crops embedded at a time")
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="samples per file of the cache")
    parser.add_argument("--workers", type=int, default=2, help="per process, load and crop pictures; 0: none")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--dtype", default="float32", help="of the teacher: float32, bfloat16, float16 or auto")
    parser.add_argument("--broken-share", type=float, default=0.01, help="stop if more samples are broken")
    args = parser.parse_args(arguments)
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size must be at least 1 and --workers at least 0")
    return args


def make_targets(args: argparse.Namespace) -> None:
    """Embed this process's share, then wait for the others and report.

    Raises:
        InputError: data, model or folder cannot be used.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device: choose --device cpu")
    use_cpu = args.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=use_cpu, timeout=PATIENCE)  # each process has a GPU of its own
    samples = open_samples(args.data, image_root=args.image_root)
    teacher = ConceptTeacher.from_pretrained(args.model, device=state.device, dtype=parse_dtype(args.dtype))
    state.print(f"{len(samples)} samples of {args.data}, {teacher.name}, {state.num_processes} processes")
    problems = build_target_cache(
        samples, teacher, args.out, args.shard_size, state.process_index, state.num_processes,
        batch_size=args.batch_size, workers=args.workers, broken_share=args.broken_share,
        data_name=str(args.data), progress=state.is_main_process,
    )  # fmt: skip
    for problem in problems:
        print(f"no targets (delete this file to try again): {problem}", file=sys.stderr)
    state.wait_for_everyone()
    if state.is_main_process:
        cache = TargetCache.open(args.out)
        print(f"{args.out}: {cache.index.shards} shards, embeddings of width {cache.width}")


def main() -> None:
    """Run it; what the user can mend is one line and exit status 2."""
    args = parse_args()
    try:
        make_targets(args)
    except (InputError, OSError) as error:
        print(f"concept_targets: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
