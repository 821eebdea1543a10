"""BatchNorm over processes: two processes with unequal batches do what one process does with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tap_llm.tap.configuration_tap import TapVisionConfig
from tap_llm.tap.vision_encoder import TapVisionEncoder
from training.distributed import SynchronizedBatchNorm2d, synchronize_batch_norm
from training.losses import global_mean

ROOT = Path(__file__).resolve().parents[2]
LOCAL_BATCHES = (3, 1)  # images per process
STEPS = 2


def small_net(**norm: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **norm), nn.GELU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    for norm_layer in (net[1], net[4]):
        if norm_layer.affine:
            nn.init.normal_(norm_layer.weight)
            nn.init.normal_(norm_layer.bias)
    return net


def tiny_encoder() -> TapVisionEncoder:
    torch.manual_seed(1)
    config = TapVisionConfig(
        image_size=64, patch_size=8, window_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_bottlenecks=2, output_channels=16,
    )  # fmt: skip
    encoder = TapVisionEncoder(config)
    for bottleneck in encoder.bottlenecks:  # starts at zero, and would hide the block from the test
        nn.init.normal_(bottleneck.norm3.weight)
    return encoder


NETS = {
    "plain": small_net,
    "cumulative": lambda: small_net(momentum=None),
    "without parameters": lambda: small_net(affine=False),
    "untracked": lambda: small_net(track_running_stats=False),
    "large mean": small_net,
}


def images(step: int, side: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(sum(LOCAL_BATCHES), 3, side, side, generator=generator) * 2 + offset


def run_net(net: nn.Module, rank: int | None, offset: float = 0.0) -> dict[str, Tensor]:
    """Outputs, input gradients, summed parameter gradients and state after some steps; on a share of the batch."""
    result = {}
    for step in range(STEPS):
        whole = images(step, 6, offset)
        pixels = (whole if rank is None else whole.split(LOCAL_BATCHES)[rank]).requires_grad_()
        output = net(pixels)
        (output.sin() * output).sum().backward()  # a sum: each process adds its share
        result |= {f"output {step}": output.detach(), f"input gradient {step}": pixels.grad}
    result |= {f"gradient {name}": parameter.grad for name, parameter in net.named_parameters()}
    return result | {f"state {name}": value for name, value in net.state_dict().items()}


def encoder_gradients(encoder: nn.Module, rank: int | None) -> dict[str, Tensor]:
    """Gradients of a mean over values of which the processes hold unequal numbers; DDP averages them."""
    whole = images(5, 64)
    pixels = whole if rank is None else whole.split(LOCAL_BATCHES)[rank]
    output = encoder(pixels).last_hidden_state
    values = (output.sin() * output).flatten()  # not the mere squares: BatchNorm fixes their mean
    count = values.numel() * len(whole) / len(pixels)
    global_mean(values, count, num_processes=1 if rank is None else 2).backward()
    return {name.removeprefix("module."): p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def worker(rank: int, folder: Path) -> None:
    """What each of the two processes does; they meet through a file, so no port has to be free."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    results = {}
    for name, build in NETS.items():
        results[name] = run_net(synchronize_batch_norm(build()), rank, 100.0 if name == "large mean" else 0.0)
    mixed = synchronize_batch_norm(small_net())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results["bfloat16"] = {"output": mixed(images(0, 6).split(LOCAL_BATCHES)[rank])}
    frozen = synchronize_batch_norm(small_net().eval())
    results["frozen"] = {"output": frozen(images(0, 6).split(LOCAL_BATCHES)[rank])}
    encoder = synchronize_batch_norm(tiny_encoder().train())
    results["encoder"] = encoder_gradients(DistributedDataParallel(encoder), rank)
    kept = small_net()
    before = {id(tensor) for tensor in (*kept.parameters(), *kept.buffers())}
    swapped = synchronize_batch_norm(kept)
    after = {id(tensor) for tensor in (*swapped.parameters(), *swapped.buffers())}
    folded = synchronize_batch_norm(tiny_encoder().fold_batch_norm())
    results["swap"] = {
        "classes": [type(module).__name__ for module in swapped],
        "same tensors": before == after,
        "keys": list(swapped.state_dict()) == list(small_net().state_dict()),
        "folded norms": [type(m).__name__ for m in folded.modules() if isinstance(m, nn.BatchNorm2d)],
        "device cuda": type(synchronize_batch_norm(small_net(), "cuda")[1]).__name__,
        "dtype": synchronize_batch_norm(small_net().double())[1].running_mean.dtype,
        "mode": synchronize_batch_norm(small_net().eval())[1].training,
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(2)]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def joined(processes: list[dict[str, Any]], case: str) -> dict[str, Tensor]:
    """One result from two: batches joined, parameter gradients summed; the state must be the same in both."""
    first, second = (process[case] for process in processes)
    result = {}
    for key in first:
        if key.startswith("state"):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
            result[key] = first[key]
        elif key.startswith("gradient"):
            result[key] = first[key] + second[key]
        else:
            result[key] = torch.cat([first[key], second[key]])
    return result


@pytest.mark.parametrize("case", [name for name in NETS if name != "large mean"])
def test_two_processes_equal_one(processes: list[dict[str, Any]], case: str) -> None:
    expected = run_net(NETS[case](), None)
    torch.testing.assert_close(joined(processes, case), expected, rtol=1e-4, atol=2e-5)


def test_statistics_survive_a_large_mean(processes: list[dict[str, Any]]) -> None:
    """In float32 the mean of squares minus the squared mean would be off by percents here."""
    got, expected = joined(processes, "large mean"), run_net(small_net(), None, 100.0)
    for key in ("output 0", "state 1.running_var", "state 4.running_var"):
        torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-3)


def test_statistics_differ_from_those_of_a_share(processes: list[dict[str, Any]]) -> None:
    alone = run_net(small_net(), 0)["output 0"]
    assert (processes[0]["plain"]["output 0"] - alone).abs().max() > 0.1


def test_bfloat16_stays_bfloat16(processes: list[dict[str, Any]]) -> None:
    output = joined(processes, "bfloat16")["output"]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), run_net(small_net(), None)["output 0"], rtol=0.05, atol=0.05)


def test_frozen_norm_uses_its_running_statistics(processes: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(joined(processes, "frozen")["output"], small_net().eval()(images(0, 6)))


def test_gradients_of_the_image_encoder_under_ddp(processes: list[dict[str, Any]]) -> None:
    expected = encoder_gradients(tiny_encoder().train(), None)
    assert len(expected) == len(list(tiny_encoder().parameters()))
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())  # some biases sit before a norm: their gradient is rounding
        for process in processes:
            torch.testing.assert_close(process["encoder"][name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-8)


def test_swapping_keeps_tensors_keys_mode_and_folded_models(processes: list[dict[str, Any]]) -> None:
    assert processes[0]["swap"] == {
        "classes": ["Conv2d", "SynchronizedBatchNorm2d", "GELU", "Conv2d", "SynchronizedBatchNorm2d"],
        "same tensors": True,
        "keys": True,
        "folded norms": [],
        "device cuda": "SyncBatchNorm",
        "dtype": torch.float64,
        "mode": False,
    }


def test_one_process_keeps_its_model() -> None:
    net = small_net()
    assert synchronize_batch_norm(net) is net and type(net[1]) is nn.BatchNorm2d


def test_one_process_runs_as_plain_batch_norm() -> None:
    plain = nn.BatchNorm2d(3)
    ours = SynchronizedBatchNorm2d(3)
    ours.load_state_dict(deepcopy(plain.state_dict()))
    pixels = images(0, 6)
    torch.testing.assert_close(ours(pixels), plain(pixels), rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
