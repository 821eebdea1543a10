"""`tap-llm tokenize`: a data set through TAP once; what is printed, what is written, how it fails and goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from tap_llm import cli
from tap_llm.data import open_samples, write_jsonl
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.errors import InputError
from tap_llm.region_llm import token_builder
from tap_llm.region_llm.token_cache import TokenCache

COUNT = 5


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    composer = SceneComposer(SpriteLibrary.bundled())
    write_jsonl((composer.scene(seed, (96, 80)).to_sample() for seed in range(COUNT)), folder / "scenes.jsonl")
    return folder / "scenes.jsonl"


def tokenize(data: Path, out: Path, *more: str) -> int:
    return cli.main(["tokenize", str(data), str(out), "--workers", "0", "--device", "cpu", "--shard-size", "2", *more])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "whole"
    assert tokenize(data, folder) == 0
    return folder


def test_it_says_what_it_did_and_how_fast(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = open_samples(data)
    regions = sum(len(sample.regions) for sample in samples)
    assert tokenize(data, tmp_path / "out") == 0
    told = capsys.readouterr()
    assert re.fullmatch(
        rf"{COUNT} samples with {regions} regions in \d+ s, [1-9]\d*\.\d regions/s; \S+/out is complete, 3 shards\n",
        told.out,
    )
    assert told.err == ""
    cache = TokenCache.open(tmp_path / "out")
    cache.check_data(samples)
    assert len(cache) == COUNT and [len(cache[i]) for i in range(COUNT)] == [len(sample.regions) for sample in samples]
    assert cache.index.maker == "tap-tiny" and cache.index.data == str(data)
    assert cache[0].roi.dtype == torch.float16 and cache[0].roi.shape[1:] == (16, 128)
    assert tokenize(data, tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("nothing was left to do; ")


@pytest.mark.parametrize(
    ("options", "grids"),
    [
        (["--projector", "lite"], (0, 0)),
        (["--projector", "full", "--dtype", "float32"], (4, 8)),
        (["--projector", "full", "--roi-grid", "2", "--global-grid", "4", "--compute-dtype", "bfloat16"], (2, 4)),
    ],
)
def test_the_projector_decides_what_is_stored(
    data: Path, tmp_path: Path, options: list[str], grids: tuple[int, int]
) -> None:
    assert tokenize(data, tmp_path, *options) == 0
    layout = TokenCache.open(tmp_path).layout
    assert (layout.roi_grid, layout.global_grid) == grids
    assert layout.dtype == ("float32" if "float32" in options else "float16")


def test_processes_share_the_work(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenize(data, tmp_path, "--rank", "1", "--world-size", "2") == 0
    assert re.search(r"has 1 of 3 shards\n$", capsys.readouterr().out)
    monkeypatch.setenv("RANK", "0")  # as accelerate and torchrun set them
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tokenize(data, tmp_path) == 0
    assert re.search(r"is complete, 3 shards\n$", capsys.readouterr().out)
    assert shards(tmp_path) == shards(whole)


def test_ctrl_c_says_how_to_go_on(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = token_builder._tokens, iter(range(9))

    def stopped(*args: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(token_builder, "_tokens", stopped)
        assert tokenize(data, tmp_path) == cli.INTERRUPTED
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"tap-llm: interrupted; {tmp_path} has 1 of 3 shards: run the same command again to go on\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "tokens-000000.parquet"]
    assert tokenize(data, tmp_path) == 0
    assert shards(tmp_path) == shards(whole)


def test_broken_samples_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    lines[3]["image"] = "gone.png"
    copy = tmp_path / "data.jsonl"
    copy.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    given = ["--image-root", str(data.parent)]
    assert tokenize(copy, tmp_path / "out", *given) == 2
    assert "1 of 5 samples are broken, more than 1.0%; the first: " in capsys.readouterr().err
    assert tokenize(copy, tmp_path / "out", *given, "--broken-share", "0.2") == 0
    told = capsys.readouterr()
    assert re.match(
        r"tap-llm: no tokens \(delete this file to try again\): tokens-000001.parquet: line 4: image", told.err
    )
    assert told.out.startswith("2 samples with ")
    with pytest.raises(InputError, match="broken: .*line 4"):
        TokenCache.open(tmp_path / "out")[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "'int8': tokens are stored in"),
        (["--projector", "huge"], "unknown projector 'huge': choose one of lite, base, full"),
        (["--global-grid", "7"], "must divide the side of TAP's grid"),
        (["--model", "/absent/tap"], "/absent/tap"),
        (["--device", "abacus"], "abacus"),
        (["--rank", "2", "--world-size", "2"], "ranks are 0 to 1"),
        (["--batch-size", "0"], "batch-size"),
        (["--image-root", "/absent"], "there is no folder /absent"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert tokenize(data, tmp_path / "out", *options) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and told.out == ""
    assert not (tmp_path / "out").exists()


def test_another_origin_is_refused(data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = shards(whole)
    assert tokenize(data, whole, "--projector", "lite") == 2
    assert "made with roi_grid 4, not 0; choose another folder" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(data.read_text(encoding="utf-8").splitlines()[::-1]), encoding="utf-8")
    assert tokenize(other, whole, "--image-root", str(data.parent)) == 2
    assert "holds region tokens of other data: " in capsys.readouterr().err
    assert tokenize(tmp_path / "absent.jsonl", whole) == 2
    assert "there is no file or folder" in capsys.readouterr().err
    assert shards(whole) == before
