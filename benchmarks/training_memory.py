"""Memory and time of one training step, each case in a fresh process.

    python benchmarks/training_memory.py [--variant vit_b] [--recipe pretrain caption] [--batch 1] [--regions 8]
        [--precision bf16 no] [--checkpointing off on] [--steps 1] [--threads 1]

Random weights, drawn scenes or random captions of the greatest length, AdamW, the step of `training.stepper`. A line
tells the time of a step (on CPUs processor seconds, which other work on the machine does not change much), its peak (on
CPUs of the whole process, libraries included; on a GPU what torch allocated), the activations that the forward pass
keeps for the backward pass, counted tensor by tensor, and what a GPU would need, computed from them. With `--steps 0`
only the forward pass runs: sizes that do not fit can still be counted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `training` is beside this folder, not installed

from tap_llm.data.shapes import SHAPE_NAMES
from training.captioning import CaptionLossConfig, CaptionObjective
from training.config import OptimizerConfig, RunConfig
from training.examples import DataConfig, Pictures, RegionBatches
from training.models import ModelConfig, build_tap
from training.objective import LossConfig, PromptConfig, RegionObjective
from training.optimization import build_optimizers, set_learning_rates
from training.precision import autocast, start_accelerator
from training.stepper import Stepper

CONCEPTS = 2560  # of the official concept space
CAPTION_IDS = 40
GIB = 2**30
GPU_ALLOWANCE = 1.0  # GiB for CUDA itself and short-lived tensors; not measured

Batch = dict[str, Tensor]
Case = dict[str, Any]


def build_pretrain(case: Case) -> tuple[nn.Module, list[Batch]]:
    """The trainee of `training.pretrain`, and a batch of drawn scenes for every step."""
    names = [*SHAPE_NAMES, *(f"name {number}" for number in range(CONCEPTS - len(SHAPE_NAMES)))]
    tap, processor, concepts = build_tap(ModelConfig(variant=case["variant"]), names)
    if case["checkpointing"]:
        tap.activation_checkpointing_enable()
    trainee = RegionObjective(tap.model, concepts, False, PromptConfig(), LossConfig())
    side = tap.config.vision_config.image_size
    data = DataConfig(regions=case["regions"], scene_side=[side, side])
    batches = RegionBatches(
        Pictures(data), concepts, processor.image_processor, trainee.sampler, case["batch"], case["regions"]
    )
    return trainee, [batches[number] for number in range(max(1, case["steps"]))]


def build_caption(case: Case) -> tuple[nn.Module, list[Batch]]:
    """The trainee of `training.caption`, and random pictures with captions of the greatest length."""
    tap, _, _ = build_tap(ModelConfig(variant=case["variant"]), ["unknown"])
    if case["checkpointing"]:
        tap.caption_decoder.activation_checkpointing_enable()
    side, text = tap.config.vision_config.image_size, tap.config.text_config
    images, rows = case["batch"], case["batch"] * case["regions"]
    corners = torch.rand(rows, 2, 2) * side
    labels = torch.randint(3, text.vocab_size - 1, (rows, CAPTION_IDS))
    labels[:, 0], labels[:, -1] = text.bos_token_id, text.eos_token_id
    batch = {
        "pixel_values": torch.randn(images, 3, side, side),
        "boxes": torch.cat([corners.amin(1), corners.amax(1)], dim=1),
        "region_image_index": torch.arange(images).repeat_interleave(case["regions"]),
        "labels": labels,
        "seed": torch.tensor(0),
    }
    return CaptionObjective(tap, CaptionLossConfig()), [batch] * max(1, case["steps"])


BUILDERS = {"pretrain": build_pretrain, "caption": build_caption}


def forward_cost(accelerator: Accelerator, model: nn.Module, batch: Batch, precision: str) -> tuple[int, int]:
    """One forward pass: bytes kept for the backward pass (each storage once, weights left out), and operations."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks, autocast(accelerator, precision):
        sums, _ = model(**send_to_device(batch, accelerator.device))
    assert all(value.requires_grad for value in sums.values())
    return sum(kept.values()), counter.get_total_flops()


def allocate_states(model: nn.Module, optimizers: list[Any]) -> None:
    """Make the optimiser's states, which would else appear at the end of the first step, after its peak."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    set_learning_rates(optimizers, 0.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def gpu_gib(trainable: int, frozen: int, kept: int) -> float:
    """What a GPU needs: weights, gradients and two AdamW states in float32, activations, and the allowance."""
    return (trainable * (4 + 4 + 8) + frozen * 4 + kept) / GIB + GPU_ALLOWANCE


def measure(case: Case) -> dict[str, float]:
    """Run a case in this process."""
    set_seed(0)
    run = RunConfig(precision=case["precision"], batch_size=case["batch"])
    accelerator = start_accelerator(run)
    trainee: Any
    trainee, batches = BUILDERS[case["recipe"]](case)
    optimizers = build_optimizers(trainee, OptimizerConfig())
    model, *optimizers = accelerator.prepare(trainee, *optimizers)
    model.train()
    kept, operations = forward_cost(accelerator, model, batches[0], run.precision)
    gc.collect()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    stepper, seconds = Stepper(accelerator, model, optimizers, trainee, run), float("nan")
    if case["steps"]:
        allocate_states(model, optimizers)
    for step in range(case["steps"]):
        start = clock()
        losses, _ = stepper.step([batches[step]], step)
        assert all(torch.isfinite(value) for value in losses.values())  # and the device has finished
        seconds = clock() - start
    counts = [sum(p.numel() for p in trainee.parameters() if p.requires_grad == wanted) for wanted in (True, False)]
    return {
        "trainable": counts[0] / 1e6, "frozen": counts[1] / 1e6, "kept": kept / GIB, "peak": peak_gib(),
        "seconds": seconds, "gpu": gpu_gib(counts[0], counts[1], kept), "forward": operations / 1e12,
    }  # fmt: skip


def peak_gib() -> float:
    """Most memory so far: allocated on the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # Linux carries ru_maxrss over from the parent; this is the process's own.
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20


HEADER = (
    "| recipe | size | images x regions | precision | checkpointing | trained + frozen | forward | step | peak | kept "
    "| GPU, computed |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(case: Case, result: dict[str, float] | None) -> str:
    """A line of the table."""
    precision = "fp32" if case["precision"] == "no" else case["precision"]
    start = (
        f"| {case['recipe']} | {case['variant']} | {case['batch']} x {case['regions']} | {precision} "
        f"| {'on' if case['checkpointing'] else 'off'} "
    )
    if result is None:
        return start + "| did not finish | | | | | |"
    step = f"{result['seconds']:.1f} s | {result['peak']:.2f} GiB" if case["steps"] else "- | -"
    return (
        start + f"| {result['trainable']:.0f} M + {result['frozen']:.0f} M | {result['forward']:.2f} TFLOP | {step} "
        f"| {result['kept']:.2f} GiB | {result['gpu']:.1f} GiB |"
    )


def measure_apart(case: Case) -> dict[str, float] | None:
    """Run a case in a fresh process; None if it died, as a process without memory does."""
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", nargs="+", default=["vit_b"])
    parser.add_argument("--recipe", nargs="+", default=["pretrain", "caption"], choices=list(BUILDERS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images")
    parser.add_argument("--regions", nargs="+", type=int, default=[8], help="per image")
    parser.add_argument("--precision", nargs="+", default=["bf16", "no"], choices=["bf16", "fp16", "no"])
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--steps", type=int, default=1, help="the time is that of the last; 0 counts activations only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the table, a line as soon as it is known."""
    arguments = parse_arguments()
    if arguments.case:
        torch.set_num_threads(arguments.case["threads"])
        print(json.dumps(measure(arguments.case)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads {arguments.threads}"
    print(f"{date.today()}, {device}, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(HEADER, flush=True)
    names = ("recipe", "variant", "batch", "regions", "precision", "checkpointing")
    for values in itertools.product(*(getattr(arguments, name) for name in names)):
        case: Case = dict(zip(names, values, strict=True))
        case |= {"checkpointing": case["checkpointing"] == "on", "steps": arguments.steps, "threads": arguments.threads}
        print(row(case, measure_apart(case)), flush=True)


if __name__ == "__main__":
    main()
