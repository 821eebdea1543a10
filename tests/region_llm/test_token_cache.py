"""The token cache: what TAP gives for the pictures, the same however it is made, and alive after being killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tap_llm import TapImageProcessor, TapLlmConfig, TapModel, TapProcessor
from tap_llm.data.samples import RegionSample
from tap_llm.errors import InputError, MissingFileError
from tap_llm.region_llm import RegionFeatures, extract_features, token_builder
from tap_llm.region_llm.token_builder import build_token_cache
from tap_llm.region_llm.token_cache import TokenCache, weights_hash

FORK = multiprocessing.get_context("fork")
SIDE, COUNT = 64, 11
GRIDS = {"roi_grid": 2, "global_grid": 4}
NAMES = ("semantic_tokens", "boxes", "roi", "global_tokens", "region_image_index")


def make_sample(number: int) -> RegionSample:
    """0 to 3 regions on a picture of its own size: a box with words, points alone, and a mask beside a box."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(20, 50, 2).tolist()
    mask = np.zeros((height, width), dtype=bool)
    mask[5:12, 3:18] = True
    regions = [
        {"box": [2, 3, 15, 12 + number % 5], "category": "cat", "captions": ["a cat"], "attributes": {"small": True}},
        {"points": [[4, 5], [9, 9]], "labels": [1, 0]},
        {"mask": mask, "box": [3, 5, 18, 12]},
    ]
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return RegionSample(image, regions[: number % 4], id=f"picture {number}")


@pytest.fixture(scope="module")
def samples() -> list[RegionSample]:
    return [make_sample(number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def processor() -> TapProcessor:
    return TapProcessor(TapImageProcessor(size={"longest_edge": SIDE}))


@pytest.fixture(scope="module")
def make(tap: TapModel, processor: TapProcessor) -> Any:
    """Makes a cache, by default in shards of three and batches of two."""

    def build(samples: list[RegionSample], folder: Path, model: Any = tap, **options: Any) -> Any:
        usual = {"shard_size": 3, "batch_size": 2, "dtype": "float32", **GRIDS}
        return build_token_cache(samples, model, processor, folder, **usual | options)

    return build


@pytest.fixture(scope="module")
def whole(samples: list[RegionSample], make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache made without interruption."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    report = make(samples, folder)
    assert (report.problems, report.samples, report.regions) == ([], COUNT, 15) and report.seconds > 0
    return folder


def from_images(tap: TapModel, processor: TapProcessor, samples: list[RegionSample], **grids: int) -> RegionFeatures:
    inputs = processor([sample.load_image() for sample in samples], [sample.prompts() for sample in samples])
    del inputs["original_sizes"]
    return extract_features(tap, **inputs, **{**GRIDS, **grids})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(ours: RegionFeatures, expected: RegionFeatures) -> None:
    for name in NAMES:
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=0, atol=0)


def test_features_are_those_of_the_images_bit_for_bit(
    tap: TapModel, processor: TapProcessor, samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path
) -> None:
    make(samples, tmp_path, batch_size=1)
    cache = TokenCache.open(tmp_path)
    assert len(cache) == COUNT
    for number, sample in enumerate(samples):
        same(cache[number], from_images(tap, processor, [sample]))
        assert len(cache[number]) == number % 4 and cache[number].num_images == 1
    batched = TokenCache.open(whole)
    for first in (0, 3, 6, 9):  # shards of three in batches of two
        pair = [first, first + 1]
        same(RegionFeatures.cat([batched[i] for i in pair]), from_images(tap, processor, [samples[i] for i in pair]))


def test_shapes_and_origin(whole: Path, tap: TapModel) -> None:
    cache = TokenCache.open(whole)
    found = cache[7]
    assert [tuple(getattr(found, name).shape) for name in NAMES] == [(3, 32), (3, 4), (3, 4, 32), (1, 16, 128), (3,)]
    index = json.loads((whole / "index.json").read_text())
    assert (index["maker"], index["maker_hash"], index["data"]) == ("built in memory", weights_hash(tap), "samples")
    about = json.loads(pq.read_schema(whole / "tokens-000002.parquet").metadata[b"tap_llm"])
    assert about["first_sample"] == 6 and about["samples"] == 3
    assert about["shapes"]["roi"] == ["regions", 4, 32] and about["shapes"]["global_tokens"] == [1, 16, 128]
    assert about["dtypes"] == {"semantic_tokens": "float32", "boxes": "float32", "roi": "float32",
                               "global_tokens": "float32"}  # fmt: skip
    for number in (-1, COUNT):
        with pytest.raises(IndexError, match=f"sample {number} of 11"):
            cache[number]
    assert len(list(cache)) == COUNT


def test_many_regions_go_through_tap_in_parts(
    tap: TapModel, processor: TapProcessor, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [{"box": [x, y, x + 9, y + 7]} for x in range(0, 20, 3) for y in range(0, 20, 4)]
    crowd = [RegionSample(np.zeros((40, 30, 3), np.uint8), boxes), make_sample(3)]
    seen, forward = [], TapModel.forward
    monkeypatch.setattr(
        TapModel,
        "forward",
        lambda self, **inputs: (seen.append(len(inputs["input_points"])), forward(self, **inputs))[1],
    )
    monkeypatch.setattr(token_builder, "REGIONS_AT_ONCE", 16)
    make(crowd, tmp_path)
    assert seen == [16, 16, 6]
    ours, expected = RegionFeatures.cat(list(TokenCache.open(tmp_path))), from_images(tap, processor, crowd)
    for name in NAMES:
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types_are_rounded_once(
    dtype: str, samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path
) -> None:
    make(samples, tmp_path, dtype=dtype)
    cache, exact = TokenCache.open(tmp_path), TokenCache.open(whole)
    for number in range(COUNT):
        same(cache[number], exact[number].to(dtype=getattr(torch, dtype)))
    assert cache[1].boxes.dtype == torch.float32 and cache[1].roi.dtype == getattr(torch, dtype)


def test_parts_may_be_left_out(samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path) -> None:
    make(samples, tmp_path, roi_grid=0, global_grid=0)
    lite, exact = TokenCache.open(tmp_path)[7], TokenCache.open(whole)[7]
    assert lite.roi.shape == (3, 0, 32) and lite.global_tokens.shape == (1, 0, 32)
    assert torch.equal(lite.semantic_tokens, exact.semantic_tokens) and torch.equal(lite.boxes, exact.boxes)
    same(TokenCache.open(whole, roi=False, global_tokens=False)[7], lite)
    some = TokenCache.open(whole, roi=False)[7]
    assert some.roi.shape == (3, 0, 32) and torch.equal(some.global_tokens, exact.global_tokens)


def test_a_sample_is_read_without_its_shard(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = pq.ParquetFile(whole / "tokens-000001.parquet")
    assert shard.num_row_groups == 3 and all(shard.metadata.row_group(i).num_rows == 1 for i in range(3))
    read, original = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, row, **o: (read.append(row), original(self, row, **o))[1]
    )
    cache = TokenCache.open(whole)
    for number in (4, 10, 3):
        cache[number]
    assert read == [1, 1, 0]


def test_the_cache_travels_to_workers(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenCache, "max_open", 2)
    cache = TokenCache.open(whole, roi=False)
    expected = [cache[number] for number in range(COUNT)]
    assert len(pickle.dumps(cache)) < 1500
    for workers, context in ((0, None), (2, "fork")):
        loader = torch.utils.data.DataLoader(  # type: ignore[var-annotated]
            cache, batch_size=None, num_workers=workers, multiprocessing_context=context
        )
        for found, before in zip(loader, expected, strict=True):
            same(found, before)


def run_forked(make: Any, samples: list[RegionSample], folder: Path) -> int:
    """Exit status of a process that makes a cache; minus the signal that killed it."""
    process = FORK.Process(target=make, args=(samples, folder))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize(
    ("place", "name", "number", "shards"),
    [
        (token_builder, "extract_features", 1, 0),
        (token_builder, "to_bytes", 30, 2),  # in the middle of the third shard
        (os, "replace", 1, 0),  # the index is written, not yet there
        (os, "replace", 4, 2),  # the third shard is written, not yet there
    ],
)
def test_killed_at_any_moment_it_goes_on_and_repeats_nothing(
    samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any,
    name: str, number: int, shards: int,
) -> None:  # fmt: skip
    original, calls = getattr(place, name), iter(range(number))

    def fatal(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fatal)
        assert run_forked(make, samples, tmp_path) == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert len(done) == shards
    with pytest.raises(InputError if (tmp_path / "index.json").exists() else MissingFileError):
        TokenCache.open(tmp_path)
    assert make(samples, tmp_path).samples == COUNT - 3 * shards
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet") if path.name in done} == done
    assert {name: data for name, data in files(tmp_path).items() if not name.startswith("index.json.")} == files(whole)


def test_interrupted_it_leaves_complete_shards_only(
    samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    original, calls = token_builder._tokens, iter(range(9))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            token_builder, "_tokens", lambda *args: interrupted() if next(calls) == 3 else original(*args)
        )  # fmt: skip
        make(samples, tmp_path)
    assert sorted(files(tmp_path)) == ["index.json", "tokens-000000.parquet"]
    make(samples, tmp_path)
    assert files(tmp_path) == files(whole)
    again = make(samples, tmp_path)
    assert (again.samples, again.regions, again.problems) == (0, 0, [])


def test_ranks_share_the_work_and_make_the_same_files(
    samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path
) -> None:
    assert make(samples, tmp_path, rank=1, world_size=3).samples == 3
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["tokens-000001.parquet"]
    reports = [make(samples, tmp_path, rank=rank, world_size=2) for rank in (1, 0)]  # another number may go on
    assert [report.samples for report in reports] == [2, 6]
    assert files(tmp_path) == files(whole)


def test_loading_in_workers_changes_nothing(
    samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path
) -> None:
    make(samples, tmp_path, workers=2)
    assert files(tmp_path) == files(whole)


def test_other_models_data_and_settings_are_refused(
    tap: TapModel, samples: list[RegionSample], make: Any, whole: Path
) -> None:
    before, other = files(whole), pickle.loads(pickle.dumps(tap))
    with torch.no_grad():
        other.vision_encoder.get_parameter(next(iter(dict(other.vision_encoder.named_parameters())))).mul_(1.5)
    with pytest.raises(InputError, match=rf"another TAP: .*{weights_hash(tap)}.*{weights_hash(other)}.*another folder"):
        make(samples, whole, other)
    with pytest.raises(InputError, match=r"tokens of other data: samples \[\w+\], not b\.json \[\w+\]"):
        make(samples[::-1], whole, data_name="b.json")
    with pytest.raises(InputError, match="made with roi_grid 2, not 4"):
        make(samples, whole, roi_grid=4)
    with pytest.raises(InputError, match="made with dtype float32, not float16"):
        make(samples, whole, dtype="float16")
    assert files(whole) == before
    cache = TokenCache.open(whole)
    cache.check_data(samples)
    cache.check_model(tap)
    cache.check_model(pickle.loads(pickle.dumps(tap)).bfloat16())
    with pytest.raises(InputError, match="another TAP: built in memory"):
        cache.check_model(other)
    with pytest.raises(InputError, match=r"other data: samples \(11 samples\), not these 10"):
        cache.check_data(samples[:-1])


def test_a_projector_is_told_what_is_not_there(tap: TapModel, whole: Path) -> None:
    cache = TokenCache.open(whole)
    text = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}

    def config(projector: str, **grids: int) -> TapLlmConfig:
        return TapLlmConfig(tap_config=tap.config.to_dict(), text_config=text, projector=projector, **grids)

    for projector in ("lite", "base", "full"):
        cache.check_config(config(projector, **GRIDS))
    cache.check_config(config("lite"))
    with pytest.raises(InputError, match='with roi_grid 2, but the projector "base" reads 4'):
        cache.check_config(config("base"))
    with pytest.raises(InputError, match='with global_grid 4, but the projector "full" reads 8'):
        cache.check_config(config("full", roi_grid=2))


@pytest.mark.parametrize("damage", ["cut", "bit", "garbage", "exchanged", "empty"])
def test_a_damaged_shard_is_named(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shard = folder / "tokens-000001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    damaged = {"cut": content[:-10], "bit": content, "garbage": b"garbage", "empty": b"",
               "exchanged": (folder / "tokens-000002.parquet").read_bytes()}  # fmt: skip
    shard.write_bytes(damaged[damage])
    with pytest.raises(InputError, match=r"tokens-000001\.parquet is damaged \(.*\): delete it and run") as caught:
        for number in (3, 4, 5):
            TokenCache.open(folder)[number]
    assert "\n" not in str(caught.value)
    assert len(TokenCache.open(folder)[0]) == 0  # the others are whole
    shard.unlink()
    with pytest.raises(
        InputError, match=r"the region tokens in .* are not complete \(3 of 4 shards\): run the command"
    ):
        TokenCache.open(folder)
    with pytest.raises(MissingFileError, match="there are no region tokens"):
        TokenCache.open(tmp_path)


def broken_samples(samples: list[RegionSample], *broken: int) -> list[RegionSample]:
    """Some samples with a picture that is none."""
    return [
        RegionSample(np.zeros(7), sample.regions, id=sample.id) if number in broken else sample
        for number, sample in enumerate(samples)
    ]


def test_broken_samples_are_named_and_have_no_tokens(
    samples: list[RegionSample], make: Any, whole: Path, tmp_path: Path
) -> None:
    damaged = broken_samples(samples, 3, 4, 6)
    report = make(damaged, tmp_path, broken_share=0.3)
    assert [text.split(": image")[0] for text in report.problems] == [
        f"tokens-00000{number // 3}.parquet: record {number}" for number in (3, 4, 6)
    ]
    cache, intact = TokenCache.open(tmp_path), TokenCache.open(whole)
    assert cache.problems() == report.problems
    for number in (3, 4, 6):
        with pytest.raises(InputError, match=f"has no tokens of a sample that was broken: .*record {number}: image"):
            cache[number]
    same(cache[0], intact[0])
    torch.testing.assert_close(cache[7].roi, intact[7].roi, rtol=1e-5, atol=1e-5)  # now alone in its batch
    again = make(damaged, tmp_path, broken_share=0.3)
    assert again.problems == report.problems and again.samples == 0
    for number in (1, 2):
        (tmp_path / f"tokens-00000{number}.parquet").unlink()
    assert make(samples, tmp_path).problems == []
    assert files(tmp_path) == files(whole)


def test_too_many_broken_samples_stop_it(samples: list[RegionSample], make: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of 11 samples are broken, more than 10\.0%; the first: .*record 4"):
        make(broken_samples(samples, 4, 5), tmp_path, broken_share=0.1)
    assert sorted(files(tmp_path)) == ["index.json", "tokens-000000.parquet"]


def test_malformed_regions_are_broken_samples(make: Any, tmp_path: Path) -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    bad = [{"mask": np.zeros((20, 30), dtype=bool)}, {"box": [31, 0, 40, 5]}, {"box": "here"}, {"category": "cat"}]
    report = make([RegionSample(image, [region]) for region in bad], tmp_path, broken_share=1)
    assert [problem.split(": ")[1] for problem in report.problems] == [f"record {number}" for number in range(4)]


def test_settings_that_cannot_be(tap: TapModel, samples: list[RegionSample], make: Any, tmp_path: Path) -> None:
    for options, message in (
        ({"dtype": "int8"}, "'int8': tokens are stored in float32, float16, bfloat16"),
        ({"global_grid": 3}, "must divide the side of TAP's grid, 8"),
        ({"roi_grid": -1}, "neither may be negative"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shard_size": 0}, "in shards of 0 make no region tokens"),
        ({"model": torch.nn.Linear(2, 2)}, "expected a TapModel"),
    ):
        with pytest.raises(InputError, match=message):
            make(samples, tmp_path, **options)
    other = TapProcessor(TapImageProcessor(size={"longest_edge": 32}))
    with pytest.raises(InputError, match="pictures of 32 pixels, the TAP reads 64"):
        build_token_cache(samples, tap, other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_are_no_numbers_are_never_stored(
    tap: TapModel, samples: list[RegionSample], make: Any, tmp_path: Path
) -> None:
    loud = pickle.loads(pickle.dumps(tap))
    embed = loud.get_image_embeddings
    loud.get_image_embeddings = lambda pixels: 1e6 * embed(pixels)
    with pytest.raises(InputError, match=r"not finite in float16.*try float32 or bfloat16"):
        make(samples, tmp_path, loud, dtype="float16")
    assert sorted(files(tmp_path)) == ["index.json"]
