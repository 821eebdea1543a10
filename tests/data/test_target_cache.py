"""The cache of concept targets: complete, the same however it is made, and alive after being killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_clip import WIDTH, clip_processor, make_clip, make_sample

from tap_llm.data import target_cache
from tap_llm.data.crops import ConceptTeacher
from tap_llm.data.samples import RegionSample
from tap_llm.data.target_cache import TargetCache, build_target_cache
from tap_llm.errors import InputError, MissingFileError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def teacher() -> ConceptTeacher:
    return ConceptTeacher(make_clip(), clip_processor())


@pytest.fixture(scope="module")
def samples() -> list[RegionSample]:
    return [make_sample(number) for number in range(14)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def build(samples: list[RegionSample], teacher: ConceptTeacher, folder: Path, **options: Any) -> list[str]:
    return build_target_cache(samples, teacher, folder, **{"shard_size": 3, "batch_size": 4} | options)


@pytest.fixture(scope="module")
def whole(samples: list[RegionSample], teacher: ConceptTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache made without interruption."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    assert build(samples, teacher, folder) == []
    return folder


def test_cache_has_the_embedding_of_every_region(
    whole: Path, samples: list[RegionSample], teacher: ConceptTeacher
) -> None:
    cache = TargetCache.open(whole)
    assert len(cache) == 14 and cache.index.shards == 5 and cache.width == WIDTH and cache.problems() == []
    box = np.zeros((20, 30), dtype=bool)
    box[2:9, 3:] = True
    for number, sample in enumerate(samples):
        masks = {0: 0, 1: 1, 2: box, 3: None}
        for region in range(number % 5):
            mask = masks[region] if region >= 2 else sample.masks()[masks[region]]
            if mask is None:
                assert cache[number, region].isnan().all()
                continue
            expected = teacher.embed_regions(sample.load_image(), [mask])[0]
            torch.testing.assert_close(cache[number, region].float(), expected, rtol=1e-3, atol=1e-3)
    assert cache[4, 0].shape == (WIDTH,) and cache[4, 0].dtype == torch.float16


def test_many_are_looked_up_in_the_order_asked_for(whole: Path) -> None:
    cache = TargetCache.open(whole)
    keys = [(13, 2), (1, 0), (4, 3), (13, 0), (1, 0)]
    rows = cache.lookup(*zip(*keys, strict=True))
    assert rows.shape == (5, WIDTH)
    for row, key in zip(rows, keys, strict=True):
        torch.testing.assert_close(row, cache[key], rtol=0, atol=0, equal_nan=True)
    assert rows.isnan().any(1).tolist() == [False, False, True, False, False]
    assert cache.lookup([], []).shape == (0, WIDTH)
    for key, message in (((14, 0), "0 to 13, not of sample 14"), ((-1, 0), "sample -1"), ((7, 2), "2 regions")):
        with pytest.raises(InputError, match=message):
            cache[key]


def test_cache_travels_to_workers_without_its_maps(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TargetCache.open(whole)
    expected = cache[9, 1]
    monkeypatch.setattr(TargetCache, "max_open", 2)
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 1000 and torch.equal(copy[9, 1], expected)
    assert torch.equal(torch.stack([copy[i, 0] for i in (1, 4, 7, 9, 13, 1)])[0], cache[1, 0])


def test_damaged_and_missing_files_are_named(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no concept targets.*index\.json"):
        TargetCache.open(tmp_path)
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shard = folder / "targets-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"targets-000001\.safetensors is damaged.*delete it"):
        TargetCache.open(folder)[4, 0]
    shard.unlink()
    with pytest.raises(InputError, match="not complete \\(4 of 5 shards\\)"):
        TargetCache.open(folder)
    for content in ("{", "[]", "{}", '{"format": "tap-llm concept targets 2"}'):
        (folder / "index.json").write_text(content)
        with pytest.raises(InputError, match=r"index\.json is damaged"):
            TargetCache.open(folder)
    (folder / "index.json").write_text('{"format": "something else"}')
    with pytest.raises(InputError, match=r"holds .something else., not .tap-llm concept targets 2."):
        TargetCache.open(folder)


def run_forked(work: Callable[[], Any]) -> int:
    """Exit status of a process that does the work; minus the signal that killed it."""
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def kill_at_call(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, number: int) -> None:
    """The n-th call of a function is the process's last moment."""
    original, calls = getattr(place, name), iter(range(number))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, counted)


@pytest.mark.parametrize(
    ("place", "name", "number", "shards"),
    [
        (ConceptTeacher, "embed_pixels", 1, 0),
        (ConceptTeacher, "embed_pixels", 5, 2),
        (os, "replace", 1, 0),  # the index is written, not yet there
        (os, "replace", 4, 2),  # the third shard is written, not yet there
        (os, "fsync", 6, 4),
    ],
)
def test_killed_at_any_moment_it_goes_on_and_repeats_nothing(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    place: Any, name: str, number: int, shards: int,
) -> None:  # fmt: skip
    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        kill_at_call(patch, place, name, number)
        assert run_forked(lambda: build(samples, teacher, folder)) == -signal.SIGKILL
    assert len(list(folder.glob("*.safetensors"))) == shards
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    read: list[int] = []
    reader = target_cache.CropReader.__getitem__
    monkeypatch.setattr(target_cache.CropReader, "__getitem__", lambda self, i: (read.append(i), reader(self, i))[1])
    assert build(samples, teacher, folder) == []
    assert read == list(range(3 * shards, 14))
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors") if path.name in done} == done
    assert {name: data for name, data in files(folder).items() if not name.endswith(".part")} == files(whole)


def test_any_number_of_processes_makes_the_same_files(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path, tmp_path: Path
) -> None:
    processes = [
        FORK.Process(target=build, args=(samples, teacher, tmp_path), kwargs={"rank": rank, "world_size": 2})
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files(tmp_path) == files(whole)


def test_another_number_of_processes_may_go_on(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path, tmp_path: Path
) -> None:
    build(samples, teacher, tmp_path, rank=1, world_size=4)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["targets-000001.safetensors"]
    for rank in range(3):
        build(samples, teacher, tmp_path, rank=rank, world_size=3, shard_size=99)  # the first size stays
    assert files(tmp_path) == files(whole)


def test_loading_in_workers_changes_nothing(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path, tmp_path: Path
) -> None:
    build(samples, teacher, tmp_path, workers=2)
    assert files(tmp_path) == files(whole)


def test_another_teacher_or_data_set_is_refused(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path
) -> None:
    before = files(whole)
    other = ConceptTeacher(make_clip(seed=3))
    with pytest.raises(InputError, match=f"another teacher.*{teacher.fingerprint}.*{other.fingerprint}"):
        build(samples, other, whole)
    with pytest.raises(InputError, match=r"other data: samples \[\w+\], not other\.json \[\w+\]; choose another"):
        build(samples[::-1], teacher, whole, data_name="other.json")
    assert files(whole) == before
    cache = TargetCache.open(whole)
    cache.check_data(samples)
    with pytest.raises(InputError, match=r"other data: samples \(14 samples\), not these 13 samples"):
        cache.check_data(samples[:-1])


def test_data_is_told_apart_by_regions_not_by_words(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path
) -> None:
    def changed(**keys: Any) -> list[RegionSample]:
        first = samples[1]
        return [samples[0], RegionSample(first.image, [first.regions[0] | keys], id=first.id), *samples[2:]]

    cache = TargetCache.open(whole)
    cache.check_data(changed(category="cat", captions=["a cat"]))
    with pytest.raises(InputError, match="other data"):
        cache.check_data(changed(mask=~samples[1].regions[0]["mask"]))


def broken_samples(samples: list[RegionSample], *broken: int) -> list[RegionSample]:
    """Some samples with a picture that is none."""
    return [
        RegionSample(np.zeros(7), sample.regions, id=sample.id) if number in broken else sample
        for number, sample in enumerate(samples)
    ]


def test_a_broken_sample_is_named_and_has_no_targets(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path, tmp_path: Path
) -> None:
    problems = build(broken_samples(samples, 4), teacher, tmp_path, broken_share=0.1)
    assert len(problems) == 1 and problems[0].startswith("targets-000001.safetensors: record 4: image:")
    cache, intact = TargetCache.open(tmp_path), TargetCache.open(whole)
    assert cache.problems() == problems
    assert cache.lookup([4] * 4, range(4)).isnan().all()
    torch.testing.assert_close(cache[3, 1], intact[3, 1])
    assert build(broken_samples(samples, 4), teacher, tmp_path, broken_share=0.1) == problems
    (tmp_path / "targets-000001.safetensors").unlink()
    assert build(samples, teacher, tmp_path) == []
    assert files(tmp_path) == files(whole)


def test_too_many_broken_samples_stop_it_before_they_are_written(
    samples: list[RegionSample], teacher: ConceptTeacher, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"2 of 14 samples are broken, more than 10\.0%; the first: .*record 4"):
        build(broken_samples(samples, 4, 5), teacher, tmp_path, broken_share=0.1)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["targets-000000.safetensors"]
    assert build(samples, teacher, tmp_path) == []
    assert files(tmp_path) == files(whole)


def test_malformed_regions_are_broken_samples(teacher: ConceptTeacher, tmp_path: Path) -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    bad = [
        {"mask": np.zeros((20, 30), dtype=bool)},
        {"mask": np.ones((30, 20), dtype=bool)},
        {"box": [0, 0, float("nan"), 5]},
        {"box": [31, 0, 40, 5]},
        {"box": "here"},
    ]
    problems = build([RegionSample(image, [region]) for region in bad], teacher, tmp_path, broken_share=1)
    assert [problem.split(": ")[1] for problem in problems] == [f"record {number}" for number in range(5)]
    assert TargetCache.open(tmp_path).lookup(range(5), [0] * 5).isnan().all()


def test_no_samples_make_no_cache(teacher: ConceptTeacher, samples: list[RegionSample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty\.json: 0 samples"):
        build([], teacher, tmp_path, data_name="empty.json")
    with pytest.raises(InputError, match="in shards of 0"):
        build(samples, teacher, tmp_path, shard_size=0)
    assert list(tmp_path.iterdir()) == []


def test_index_says_what_the_cache_was_made_of(whole: Path, teacher: ConceptTeacher) -> None:
    index = json.loads((whole / "index.json").read_text())
    assert index["maker"] == "CLIPModel built in memory (float32)" and index["maker_hash"] == teacher.fingerprint
    assert (index["data"], index["samples"], index["shard_size"]) == ("samples", 14, 3)
    assert index["settings"] == {"width": WIDTH}
