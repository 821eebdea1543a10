"""The command that makes concept targets: one process, two processes, killed and run again, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tap_llm.data.crops import ConceptTeacher
from tap_llm.data.target_cache import TargetCache
from training.concept_targets import main, make_targets, parse_args

ROOT = Path(__file__).resolve().parents[2]
SIDE, PICTURES = 16, 24
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 11, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = SMALL | {"image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    crop_size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one JSON object per line; its pictures share four files."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    records = []
    for number in range(PICTURES):
        boxes = [[x, y, x + 4 + number % 9, y + 7] for x, y in rng.integers(0, 12, (number % 3, 2)).tolist()]
        records.append({"image": f"{number % 4}.png", "id": str(number), "regions": [{"box": box} for box in boxes]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "data.jsonl"


def arguments(data: Path, model: Path, out: Path) -> list[str]:
    return ["--data", str(data), "--model", str(model), "--out", str(out), "--shard-size", "2", "--workers", "0",
            "--device", "cpu", "--batch-size", "3"]  # fmt: skip


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(data: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets made by one process without interruption."""
    folder = tmp_path_factory.mktemp("targets")
    make_targets(parse_args(arguments(data, clip_folder, folder)))
    return folder


def test_targets_of_a_file(whole: Path, data: Path, clip_folder: Path) -> None:
    cache, teacher = TargetCache.open(whole), ConceptTeacher.from_pretrained(clip_folder)
    assert len(cache) == PICTURES and cache.index.data == str(data) and cache.problems() == []
    record = json.loads(data.read_text().splitlines()[5])
    (x0, y0, x1, y1), mask = record["regions"][1]["box"], np.zeros((20, 30), dtype=bool)
    mask[y0:y1, x0:x1] = True
    expected = teacher.embed_regions(Image.open(data.parent / "1.png"), [mask])[0]
    torch.testing.assert_close(cache[5, 1].float(), expected, rtol=1e-3, atol=1e-3)


def in_fresh_process(*command: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: a fork of one whose torch has threads may crash."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_two_processes_make_the_same_targets(whole: Path, data: Path, clip_folder: Path, tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "training.concept_targets")
    done = in_fresh_process(*launch, *arguments(data, clip_folder, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert shards(tmp_path) == shards(whole)


DIES_BEFORE_THE_FIFTH_SHARD = """
import os, signal, sys
from training import concept_targets
replace, calls = os.replace, iter(range(6))
def replace_or_die(*paths):
    if next(calls) == 5:  # the index, four shards, and now the fifth shard
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace_or_die
concept_targets.make_targets(concept_targets.parse_args(sys.argv[1:]))
"""


def test_killed_and_run_again(whole: Path, data: Path, clip_folder: Path, tmp_path: Path) -> None:
    given = parse_args(arguments(data, clip_folder, tmp_path))
    done = in_fresh_process("-c", DIES_BEFORE_THE_FIFTH_SHARD, *arguments(data, clip_folder, tmp_path))
    assert done.returncode == -signal.SIGKILL
    before = shards(tmp_path)
    assert len(before) == 4 < len(shards(whole))
    make_targets(given)
    assert shards(tmp_path) == shards(whole)
    assert before.items() <= shards(tmp_path).items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data": "absent.json"}, "no file or folder absent.json"),
        ({"--model": "/absent/clip"}, "/absent/clip cannot be loaded"),
        ({"--dtype": "int8"}, "int8"),
        ({"--batch-size": "0"}, "--batch-size must be"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    changes: dict[str, str], message: str,
) -> None:  # fmt: skip
    extra = [text for pair in changes.items() for text in pair]
    monkeypatch.setattr(sys, "argv", ["concept_targets", *arguments(data, clip_folder, tmp_path), *extra])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and message in told[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_broken_picture_is_named(
    data: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = data.read_text().splitlines()
    copy = tmp_path / "data.jsonl"
    copy.write_text("\n".join([*lines[:20], lines[20].replace(".png", ".gone"), *lines[21:]]))
    given = [*arguments(copy, clip_folder, tmp_path / "out"), "--image-root", str(data.parent), "--broken-share", "0.1"]
    make_targets(parse_args(given))
    told = capsys.readouterr().err
    assert "no targets (delete this file to try again): targets-000010.safetensors: line 21: image" in told
    assert TargetCache.open(tmp_path / "out").lookup([20, 20], [0, 1]).isnan().all()
