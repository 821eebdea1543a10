"""Streams: shards per process, and going on exactly where a run stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tap_llm.data import BrokenCount, RegionSample, skip_broken, stream_samples, write_parquet
from tap_llm.errors import InputError, MissingFileError

TOTAL, SHARDS = 26, 4  # shards of unequal length


@pytest.fixture(params=["parquet", "jsonl"])
def files(request, folder, monkeypatch):
    """The same samples 0..25 in four files."""
    monkeypatch.setattr("tap_llm.data.writers.ROWS_PER_GROUP", 3)
    if request.param == "parquet":
        pixels = np.zeros((2, 2, 3), dtype=np.uint8)
        samples = [RegionSample(pixels, [{"box": [0, 0, 1, 1], "id": i}], id=str(i)) for i in range(TOTAL)]
        return write_parquet(samples, folder.path / "a.parquet", shards=SHARDS)
    borders = [TOTAL * i // SHARDS for i in range(SHARDS + 1)]
    return [
        folder.lines(f"{start}.jsonl", [{"image": "a.png", "id": str(i)} for i in range(start, stop)])
        for start, stop in zip(borders, borders[1:], strict=False)
    ]


def ids(samples):
    return [int(sample.id) for sample in samples]


def test_everything_in_order(files):
    assert ids(stream_samples(files)) == list(range(TOTAL))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_the_samples(files, world_size):
    parts = [ids(stream_samples(files, rank, world_size)) for rank in range(world_size)]
    assert sorted(sum(parts, [])) == list(range(TOTAL))
    assert min(map(len, parts)) >= TOTAL // world_size - 1


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_loses_and_repeats_nothing(files, world_size, seed):
    places = np.random.default_rng(0).integers(1, TOTAL // world_size, 3)
    for rank in range(world_size):
        stream = stream_samples(files, rank, world_size, seed=seed)
        stream.set_epoch(2)
        full = ids(stream)
        for place in places:
            stream = stream_samples(files, rank, world_size, seed=seed)
            stream.set_epoch(2)
            samples = iter(stream)
            head = [int(next(samples).id) for _ in range(place)]
            state = json.loads(json.dumps(stream.state_dict()))
            resumed = stream_samples(files, rank, world_size, seed=seed)
            resumed.load_state_dict(state)
            assert head + ids(resumed) == full


def test_a_seed_shuffles_files_anew_every_epoch(files):
    stream = stream_samples(files, seed=1)
    orders = []
    for epoch in range(4):
        stream.set_epoch(epoch)
        orders.append(ids(stream))
    assert all(sorted(order) == list(range(TOTAL)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    again = stream_samples(files, seed=1)
    again.set_epoch(3)
    assert ids(again) == orders[3]


def test_a_resumed_place_counts_once(files):
    stream = stream_samples(files)
    samples = iter(stream)
    assert [int(next(samples).id) for _ in range(20)] == list(range(20))
    resumed = stream_samples(files)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.state_dict() == stream.state_dict()
    assert ids(resumed) == list(range(20, TOTAL))
    assert ids(resumed) == list(range(TOTAL))
    fresh = stream_samples(files)
    fresh.load_state_dict(stream_samples(files).state_dict())
    assert ids(fresh) == list(range(TOTAL))


def test_a_data_set_by_name(folder):
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    samples = [RegionSample(pixels, id=str(i)) for i in range(TOTAL)]
    (folder.path / "set").mkdir()
    write_parquet(samples, folder.path / "set" / "train.parquet", shards=2)
    assert ids(stream_samples(folder.path / "set")) == list(range(TOTAL))
    with pytest.raises(InputError, match="its split 'val' does not consist of parquet"):
        stream_samples(folder.path / "set", split="val")
    with pytest.raises(InputError, match="neither a .parquet or .jsonl file nor a data set"):
        stream_samples(folder.path / "no-such-set")


def test_loader_workers_share_the_files(files):
    loader = DataLoader(stream_samples(files), batch_size=None, num_workers=2)
    assert sorted(ids(loader)) == list(range(TOTAL))


def test_samples_are_whole(folder):
    picture = folder.picture("photos/a.png")
    path = folder.lines("a.jsonl", [{"image": "a.png", "regions": [{"box": [0, 0, 9, 9]}]}])
    (sample,) = stream_samples(path, image_root=picture.parent)
    sample.check()
    write_parquet([sample], folder.path / "a.parquet")
    (sample,) = stream_samples(folder.path / "a.parquet")
    sample.check()
    assert sample.regions == [{"box": [0, 0, 9, 9]}]


def test_broken_lines_can_be_skipped(folder):
    path = folder.lines("a.jsonl", [{"image": "a.png", "id": "1"}, "{", "", "[]", {"image": "a.png", "id": "5"}])
    count = BrokenCount()
    assert list(skip_broken(stream_samples(path), lambda sample: sample.id, count)) == ["1", "5"]
    assert count.broken == 2
    assert "a.jsonl, line 2: not valid JSON" in count.messages[0]
    assert "a.jsonl, line 4: expected a JSON object" in count.messages[1]


def test_wrong_input(folder, tmp_path):
    with pytest.raises(MissingFileError, match="missing.jsonl"):
        stream_samples(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="files of one kind"):
        stream_samples([tmp_path / "a.jsonl", tmp_path / "a.parquet"])
    with pytest.raises(InputError, match="rank must lie between 0 and world_size - 1 = 1, got 2"):
        stream_samples(tmp_path / "a.jsonl", rank=2, world_size=2)
    bad = folder.path / "bad.parquet"
    bad.write_text("PAR1")
    with pytest.raises(InputError, match="not a parquet file"):
        stream_samples(bad)
