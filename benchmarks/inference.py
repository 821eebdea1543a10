"""Speed and memory of inference as ratios in one run, beside Transformers' SamModel.

    python benchmarks/inference.py [--rounds 5] [--only encoder boxes captions reuse memory]

Random weights, ViT-B size, 1024 px, two threads. What is compared runs in turns, A B A B, so that a drifting machine
slows both alike; quoted are the minima of the rounds and their ratio.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, SamConfig, SamModel

from tap_llm.tap import TapConfig, TapForConditionalGeneration
from tap_llm.tap.generation import decode_dropping_finished
from tap_llm.tap.outputs import take_slots

SIDE = 1024


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Minimum seconds of each run over `rounds` rounds in turns, after one warm-up round."""
    best = dict.fromkeys(runs, float("inf"))
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number > 0:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def report(title: str, seconds: dict[str, float], ratio: float, aim: str) -> None:
    """Print the minima, the ratio and the aim."""
    listed = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
    print(f"{title:<28} ratio {ratio:5.2f}  (aim {aim})  {listed}", flush=True)


def build_tap(dtype: torch.dtype = torch.float32) -> Any:
    """ViT-B with random weights, ready for inference."""
    torch.manual_seed(0)
    model = TapForConditionalGeneration(TapConfig.from_variant("vit_b")).fold_batch_norm()
    return model.to(dtype).eval()


def box_rows(count: int) -> dict[str, Tensor]:
    """`count` random boxes on one image as TAP's rows."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(0)) * SIDE
    points = torch.stack([corners.amin(1), corners.amax(1)], dim=1)
    return {"input_points": points, "input_labels": torch.tensor([[2, 3]]).repeat(count, 1)}


def bench_encoder(rounds: int) -> None:
    """Image encoder: float32 against SAM, bfloat16 against float32."""
    tap, half, sam = build_tap(), build_tap(torch.bfloat16), SamModel(SamConfig()).eval()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    best = interleaved(
        {
            "tap": lambda: tap.get_image_embeddings(pixels),
            "tap bf16": lambda: half.get_image_embeddings(pixels),
            "sam": lambda: sam.get_image_embeddings(pixels),
        },
        rounds,
    )
    report("image encoder fp32", best, best["sam"] / best["tap"], ">= 1.9")
    report("image encoder bf16", best, best["tap"] / best["tap bf16"], ">= 1.7 with bf16 instructions")


def bench_boxes(rounds: int) -> None:
    """Prompt encoder and mask decoder on one encoded image."""
    tap, sam = build_tap(), SamModel(SamConfig()).eval()
    embeddings = torch.randn(1, 256, 64, 64)
    for count, aim in ((1, "-"), (16, "-"), (64, ">= 1.8")):
        rows = box_rows(count)
        boxes = rows["input_points"].flatten(1)[None]
        best = interleaved(
            {
                "tap": partial(tap, image_embeddings=embeddings, **rows),
                "sam": partial(sam, image_embeddings=embeddings, input_boxes=boxes),
            },
            rounds,
        )
        report(f"{count} boxes", best, best["sam"] / best["tap"], aim)


def bench_captions(rounds: int) -> None:
    """Greedy captions: growth with the number of regions, and what early ends save."""
    tap = build_tap()
    tokens = torch.randn(64, 256)
    best = interleaved(
        {str(n): partial(tap.generate, semantic_tokens=tokens[:n], min_new_tokens=38) for n in (1, 16, 64)}, rounds
    )
    report("captions, 64 over 16", best, best["64"] / best["16"], "<= 3.5")
    decode = partial(
        tap.caption_decoder.generate,
        torch.tensor([[0, 1]]).repeat(64, 1),
        semantic_tokens=tokens,
        custom_generate=decode_dropping_finished,
        max_new_tokens=38,
    )
    best = interleaved(
        {
            "12 words on average": partial(decode, logits_processor=[EndAt(torch.linspace(4, 20, 64).round().long())]),
            "38 words": partial(decode, min_new_tokens=38),
        },
        rounds,
    )
    report("early ends", best, best["38 words"] / best["12 words on average"], ">= 1.5")


class EndAt(LogitsProcessor):
    """Ends caption i after `lengths[i]` words; lengths ascend, so the rows that are left are always the last ones."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(N, L) ids and (N, V) scores -> scores."""
        left = self.lengths[-len(input_ids) :]
        ended = input_ids.shape[1] - 2 >= left
        scores[:, 2] = torch.where(ended, torch.inf, -torch.inf)
        return scores


def bench_reuse() -> None:
    """Prompting an encoded image never runs the encoder again."""
    tap = build_tap()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    tap.model.vision_encoder.register_forward_hook(count)
    embeddings = tap.get_image_embeddings(torch.randn(1, 3, SIDE, SIDE))
    start = time.perf_counter()
    for _ in range(20):
        tap(image_embeddings=embeddings, **box_rows(1))
    print(
        f"{'20 prompts on one image':<28} encoder runs: {calls} (aim 1), {time.perf_counter() - start:.2f} s after it"
    )


def peak_memory() -> None:
    """Encode, decode and caption 64 regions in a process of its own; prints its peak resident memory."""
    tap = build_tap()
    outputs = tap(pixel_values=torch.randn(1, 3, SIDE, SIDE), **box_rows(64))
    tap.generate(semantic_tokens=take_slots(outputs.semantic_tokens, outputs.slots))
    print(f"{peak_gib():.2f}")


def peak_gib() -> float:
    """Peak resident memory of this process.

    Linux carries `ru_maxrss` over from the process that started this one, so its own high-water mark is read there.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def bench_memory() -> None:
    """Peak memory of a fresh process."""
    command = [sys.executable, __file__, "--peak-memory"]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{'peak memory, 64 regions':<28} {peak:.2f} GiB (aim <= 2.0)")


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parts = ("encoder", "boxes", "captions", "reuse", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--peak-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.peak_memory:
        peak_memory()
        return
    print(f"{date.today()}, {platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    runs = {"encoder": bench_encoder, "boxes": bench_boxes, "captions": bench_captions}
    for part in options.only:
        if part in runs:
            runs[part](options.rounds)
        else:
            {"reuse": bench_reuse, "memory": bench_memory}[part]()


if __name__ == "__main__":
    main()
