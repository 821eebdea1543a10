"""Folders of shards: what belongs together is told from what does not, and nothing is there by half."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tap_llm.data.samples import RegionSample
from tap_llm.data.shards import (
    INDEX_FILE,
    ShardCache,
    ShardFolder,
    ShardIndex,
    ShardKind,
    check_broken,
    data_hash,
    make_index,
    whole_shard,
)
from tap_llm.errors import InputError, MissingFileError

KIND = ShardKind("marbles", "potter", "marbles-{:03d}.bin")


def make_samples(count: int = 7, **regions: Any) -> list[RegionSample]:
    return [RegionSample(f"{n}.jpg", [{"box": [0, 0, 5, 5 + n]} | regions], id=str(n)) for n in range(count)]


def index_of(samples: list[RegionSample], maker: str = "anna", size: int = 3, **settings: Any) -> ShardIndex:
    return make_index(KIND, (maker, f"#{maker}"), "bag.json", samples, size, **{"glaze": "red"} | settings)


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    return ShardFolder.claim(tmp_path / "shards", KIND, index_of(make_samples()), 0)


def fill(folder: ShardFolder, *shards: int) -> None:
    for shard in shards:
        folder.shard_path(shard).write_bytes(b"content")


def test_shards_are_runs_of_samples(folder: ShardFolder) -> None:
    assert folder.index.shards == 3
    assert [list(folder.index.samples_of(shard)) for shard in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert folder.shard_path(2) == folder.path / "marbles-002.bin"


def test_processes_share_what_is_missing(folder: ShardFolder) -> None:
    fill(folder, 2)
    share = folder.share(0, 2)
    assert (share.done, share.pending, share.total, share.left) == ([2], [0], 4, 3)
    other = folder.share(1, 2)
    assert (other.done, other.pending, other.total, other.left) == ([], [1], 3, 3)
    assert folder.share(5, 6).total == 0
    for rank in (-1, 2):
        with pytest.raises(InputError, match="ranks are 0 to 1"):
            folder.share(rank, 2)


def test_only_a_complete_folder_opens(folder: ShardFolder, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"there are no marbles in .*index\.json"):
        ShardFolder.open(tmp_path, KIND)
    fill(folder, 0, 1)
    with pytest.raises(InputError, match=r"the marbles in .* are not complete \(2 of 3 shards\)"):
        ShardFolder.open(folder.path, KIND)
    fill(folder, 2)
    assert ShardFolder.open(str(folder.path), KIND).index == folder.index
    with pytest.raises(InputError, match="holds 'tap-llm marbles 1', not 'tap-llm marbles 2'"):
        ShardFolder.open(folder.path, ShardKind("marbles", "potter", KIND.file, version=2))


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"format": "tap-llm marbles 1"}', b"\xff"])
def test_a_damaged_index_is_named(folder: ShardFolder, content: bytes) -> None:
    (folder.path / INDEX_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        ShardFolder.open(folder.path, KIND)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (index_of(make_samples(), maker="ben"), r"marbles of another potter: anna \[#anna\], not ben \[#ben\]"),
        (index_of(make_samples(8)), r"marbles of other data: bag\.json \[\w+\], not bag\.json \[\w+\]; choose"),
        (index_of(make_samples(), glaze="blue"), "marbles made with glaze red, not blue; choose another folder"),
        (index_of(make_samples(), holes=2), "made with holes None, not 2"),
    ],
)
def test_another_origin_is_refused_and_changes_nothing(folder: ShardFolder, other: ShardIndex, message: str) -> None:
    before = (folder.path / INDEX_FILE).read_bytes()
    with pytest.raises(InputError, match=message):
        ShardFolder.claim(folder.path, KIND, other, 0)
    assert [path.name for path in folder.path.iterdir()] == [INDEX_FILE]
    assert (folder.path / INDEX_FILE).read_bytes() == before


def test_the_size_of_shards_stays(folder: ShardFolder) -> None:
    assert ShardFolder.claim(folder.path, KIND, index_of(make_samples(), size=99), 1).index.shard_size == 3


def test_settings_survive_the_file(tmp_path: Path) -> None:
    index = index_of(make_samples(), mean=[0.1, 1e-7], name=None)
    for rank in range(2):
        assert ShardFolder.claim(tmp_path, KIND, index, rank).index == index
    assert json.loads((tmp_path / INDEX_FILE).read_text())["settings"]["mean"] == [0.1, 1e-7]


def test_nothing_makes_no_shards() -> None:
    with pytest.raises(InputError, match=r"bag\.json: 0 samples in shards of 3 make no marbles"):
        index_of([])
    with pytest.raises(InputError, match="7 samples in shards of 0"):
        index_of(make_samples(), size=0)


def test_data_is_told_apart_by_what_models_see() -> None:
    plain = data_hash(make_samples())
    assert plain == data_hash(make_samples(category="cat", captions=["a cat"]))
    moved = [RegionSample(f"/data/{s.image}", s.regions, id=s.id) for s in make_samples()]
    assert plain == data_hash(moved)
    others = [
        make_samples(6),
        make_samples()[::-1],
        make_samples(points=[[1, 1]]),
        make_samples(mask=np.ones((9, 9), dtype=bool)),
        [RegionSample("x.jpg", s.regions, id=s.id) for s in make_samples()],
        [RegionSample(b"encoded", s.regions, id=s.id) for s in make_samples()],
        [RegionSample(s.image, s.regions) for s in make_samples()],
    ]
    hashes = [plain, *map(data_hash, others)]
    assert len(set(hashes)) == len(hashes)


class Marbles(ShardCache[bytes]):
    """Reads whole files, and counts how often."""

    kind = KIND
    max_open = 2
    reads = 0

    def _read(self, number: int) -> bytes:
        type(self).reads += 1
        return self._shards.shard_path(number).read_bytes()


def test_a_cache_keeps_few_shards_open_and_travels_without_them(folder: ShardFolder) -> None:
    fill(folder, 0, 1, 2)
    cache = Marbles.open(folder.path)
    assert len(cache) == 7 and cache.folder == folder.path and cache.index == folder.index
    for shard in (0, 0, 1, 0, 2, 0, 1):
        assert cache._shard(shard) == b"content"
    assert Marbles.reads == 4
    copy = pickle.loads(pickle.dumps(cache))
    assert "_shard" not in vars(copy) and copy._shard(0) == b"content" and Marbles.reads == 5


def test_a_cache_knows_its_samples(folder: ShardFolder) -> None:
    fill(folder, 0, 1, 2)
    cache = Marbles.open(folder.path)
    cache.check_data(make_samples())
    with pytest.raises(InputError, match=r"other data: bag\.json \(7 samples\), not these 5 samples; make marbles"):
        cache.check_data(make_samples(5))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tmp_path / "a.bin", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(target.exists()))
    with whole_shard(target) as part:
        part.write_bytes(b"all of it")
    assert target.read_bytes() == b"all of it" and seen == [False]
    with pytest.raises(KeyboardInterrupt), whole_shard(target) as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"all of it" and list(tmp_path.iterdir()) == [target]


def test_too_many_broken_samples_are_an_error() -> None:
    check_broken(["one"], 100, 0.01)
    with pytest.raises(InputError, match=r"4 of 100 samples are broken, more than 1\.0%; the first: a; b; c$"):
        check_broken(["a", "b", "c", "d"], 100, 0.01)
