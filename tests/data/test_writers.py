"""Writers: what was written comes back, in order, and nothing half-written appears."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tap_llm.data import RegionSample, checked, open_samples, write_jsonl, write_parquet
from tap_llm.data.readers import ParquetSamples
from tap_llm.errors import InputError

SQUARE = [[3.0, 4.0, 8.0, 4.0, 8.0, 10.0, 3.0, 10.0]]  # columns 3..7, rows 4..9


def sample_of_every_kind():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:10, 3:8] = True
    regions = [
        {"id": "12", "mask": mask, "category": "cat", "captions": ["a cat"]},
        {"mask": SQUARE, "box": [3, 4, 8, 10]},
    ]
    chat = [{"role": "user", "content": [{"type": "region", "index": 0}]}, {"role": "assistant", "content": "a cat"}]
    return [
        RegionSample(pixels, regions, id="a", conversations=chat, source="mine", license="CC0-1.0"),
        RegionSample(Image.fromarray(pixels), [{"points": [[1, 2]], "attributes": {"depth": 1}}], captions=["noise"]),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_written_samples_come_back(tmp_path, name):
    samples = sample_of_every_kind()
    writer = write_jsonl if name.endswith("jsonl") else write_parquet
    writer(samples, tmp_path / name)
    back = [checked(sample) for sample in open_samples(tmp_path / name)]
    assert [sample.captions for sample in back] == [[], ["noise"]]
    assert [sample.conversations for sample in back] == [samples[0].conversations, []]
    assert (back[0].id, back[0].source, back[0].license) == ("a", "mine", "CC0-1.0")
    assert back[0].regions[0]["id"] == "12"
    assert back[1].regions == samples[1].regions
    for old, new in zip(samples, back, strict=True):
        assert (np.asarray(old.load_image()) == np.asarray(new.load_image())).all()
        assert (old.masks() == new.masks()).all()


def test_parquet_needs_no_pictures_and_opens_without_a_root(coco_file, tmp_path):
    (path,) = write_parquet(open_samples(coco_file), tmp_path / "out.parquet")
    expected = [sample.masks() for sample in open_samples(coco_file)]
    for picture in (tmp_path / "pictures").iterdir():
        picture.unlink()
    back = [checked(sample) for sample in open_samples(path, image_root="nowhere")]
    assert all((new.masks() == old).all() for new, old in zip(back, expected, strict=True))
    assert back[0].conversations[0]["regions"] == [1, 0]


def test_parquet_shards_keep_the_order(tmp_path, folder):
    samples = [RegionSample(np.full((4, 4, 3), i, dtype=np.uint8), id=str(i)) for i in range(10)]
    folder = tmp_path / "shards"
    folder.mkdir()
    paths = write_parquet(samples, folder / "a.parquet", shards=3)
    assert [path.name for path in paths] == [f"a-0000{i}-of-00003.parquet" for i in range(3)]
    reader = open_samples(folder)
    assert isinstance(reader, ParquetSamples)
    assert [sample.id for sample in reader] == [str(i) for i in range(10)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_nothing_appears_when_writing_fails(tmp_path, name):
    writer = write_jsonl if name.endswith("jsonl") else write_parquet
    samples = [RegionSample(np.zeros((4, 4, 3), np.uint8)), RegionSample(np.zeros((4, 4, 3), np.int64))]
    with pytest.raises(InputError):
        writer(samples, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
