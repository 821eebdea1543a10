"""The mixture of pictures: a function of number and seed, without what is held out, past what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tap_llm.data.readers import open_samples
from tap_llm.errors import InputError
from training.sample_files import SampleFile, boxed_picture, masked_picture
from training.sources import DataConfig, Picture, Pictures


def same(a: Picture, b: Picture) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks) and a.names == b.names


@pytest.fixture
def sprites(tmp_path: Path) -> str:
    """Ten named discs."""
    folder = tmp_path / "sprites"
    folder.mkdir()
    y, x = np.mgrid[:24, :24]
    for number in range(10):
        pixels = np.zeros((24, 24, 4), dtype=np.uint8)
        pixels[(x - 12) ** 2 + (y - 12) ** 2 < 120] = 25 * number, 200, 40, 255
        Image.fromarray(pixels).save(folder / f"thing_{number}.png")
    return str(folder)


def mixture(file: Path, /, **changes: Any) -> DataConfig:
    fields = {"scene_side": [64, 80], "samples": [str(file)], "mosaic_share": 0.3, "sample_share": 0.3} | changes
    return DataConfig(**fields)


def test_a_picture_depends_on_its_number_alone(samples: Path) -> None:
    config = mixture(samples)
    first, second = Pictures(config, seed=3), Pictures(config, seed=3)
    forwards = [first[number] for number in range(12)]
    backwards = [second[number] for number in reversed(range(12))][::-1]
    assert all(map(same, forwards, backwards))
    other = first.reseeded(4)
    assert not any(same(other[number], forwards[number]) for number in range(12))
    assert same(other[5], Pictures(config, seed=4)[5]) and first.seed == 3


def test_shares(samples: Path) -> None:
    pictures = Pictures(mixture(samples))
    kinds = []
    for number in range(150):
        picture = pictures[number]
        named = picture.names[0] or ""
        kinds.append("sample" if named.startswith("square ") else "mosaic" if len(picture.names) > 7 else "scene")
    for kind, share in (("sample", 0.3), ("mosaic", 0.3), ("scene", 0.4)):
        assert abs(kinds.count(kind) / 150 - share) < 0.12, kind


def test_scenes_have_the_sides_that_are_asked_for() -> None:
    pictures = Pictures(DataConfig(scene_side=[64, 80]))
    sizes = [pictures[number].image.shape[:2] for number in range(60)]
    assert all(64 <= max(size) <= 80 and min(size) >= 0.64 * max(size) for size in sizes)
    assert {height < width for height, width in sizes} == {True, False}


def test_held_out_names_are_known_but_never_shown(sprites: str) -> None:
    config = DataConfig(sprites=[sprites], hold_out=0.4, shape_share=0.0, mosaic_share=0.5, scene_side=[64, 80])
    pictures = Pictures(config)
    assert pictures.novel is not None and pictures.novel.sprites is not None
    novel = set(pictures.novel.sprites.names)
    shown = {name for number in range(40) for name in pictures[number].names}
    everything = {f"thing {number}" for number in range(10)}
    assert 3 <= len(novel) <= 5 and shown == everything - novel
    assert everything <= set(pictures.names())


def shown_samples(config: DataConfig, count: int = 120) -> set[str]:
    pictures = Pictures(config)
    return {name for number in range(count) for name in pictures[number].names if name}


@pytest.mark.parametrize("every", [2, 3, 5])
def test_held_out_samples_are_never_shown(samples: Path, every: int) -> None:
    shown = shown_samples(
        mixture(samples, mosaic_share=0.0, sample_share=1.0, sample_hold_out=every, jitter=[1.0, 1.0])
    )
    assert shown == {f"square {number}" for number in range(10) if number % every}


def test_a_broken_sample_is_not_replaced_by_one_that_is_held_out(samples: Path) -> None:
    (samples.parent / "4.png").unlink()  # the next sample, 5, is held out
    config = mixture(samples, mosaic_share=0.0, sample_share=1.0, sample_hold_out=5, broken_share=0.5)
    assert shown_samples(config) == {f"square {number}" for number in (1, 2, 3, 6, 7, 8, 9)}


def test_places_and_indices() -> None:
    class Ten:
        def __len__(self) -> int:
            return 10

    for every in (0, 2, 3, 4, 10):
        file = SampleFile(Ten(), masked_picture, hold_out=every)  # type: ignore[arg-type]
        shown = [index for index in range(10) if not every or index % every]
        assert len(file) == len(shown)
        assert [file._index_of(place) for place in range(len(file))] == shown
        assert [file.place_of(index) for index in shown] == list(range(len(shown)))
        assert all(file.place_of(index) is None for index in set(range(10)) - set(shown))


def test_broken_samples_are_skipped_and_named_with_file_and_line(samples: Path) -> None:
    lines = samples.read_text().splitlines()
    lines[2] = '{"image": "2.png", "regions": 5}'
    samples.write_text("\n".join(lines))
    (samples.parent / "7.png").write_bytes(b"no picture")
    config = mixture(samples, mosaic_share=0.0, sample_share=1.0, broken_share=0.5)
    pictures = Pictures(config)
    shown = {name for number in range(80) for name in pictures[number].names}
    assert shown == {f"square {number}" for number in (0, 1, 3, 4, 5, 6, 8, 9)}
    problems = pictures.take_problems()
    assert sorted(problem.split(": ")[0] for problem in problems) == [f"{samples}, line 3", f"{samples}, line 8"]
    assert all(problem.count("line ") == 1 for problem in problems)
    assert pictures.take_problems() == []
    assert "square 2" not in set(pictures.names()) and "square 7" in set(pictures.names())


def test_too_many_broken_samples_stop(samples: Path) -> None:
    (samples.parent / "7.png").unlink()
    pictures = Pictures(mixture(samples, mosaic_share=0.0, sample_share=1.0, broken_share=0.02))
    with pytest.raises(InputError, match=r"samples are broken.*samples\.jsonl, line 8: .*more than 2\.0%"):
        for number in range(400):
            pictures[number]


def test_captioned_regions_need_a_box_and_words_only(samples: Path) -> None:
    regions = [
        {"box": [1, 2, 30, 20], "caption": "a box"}, {"points": [[3, 4]], "caption": "a point"},
        {"box": [5, 5, 9, 9], "category": "Cup"}, {"mask": [[2, 2, 8, 2, 8, 9, 2, 9]], "captions": ["  ", "a mask"]},
        {"box": [5, 5, 9, 9], "captions": [" "]},
    ]  # fmt: skip
    samples.write_text(json.dumps({"image": "0.png", "regions": regions}))
    picture = boxed_picture(open_samples(samples)[0])
    assert picture.captions == [["a box"], ["a mask"]]
    assert picture.boxes.tolist() == [[1, 2, 30, 20], [2, 2, 8, 9]] and picture.masks.shape == (0, 40, 60)
    config = mixture(samples, mosaic_share=0.0, sample_share=1.0)
    assert same(Pictures(config, captioned=True)[0], picture)  # no jitter: captions may tell left from right
    samples.write_text(json.dumps({"image": "0.png", "regions": regions[1:3]}))
    with pytest.raises(InputError, match="no region with a caption in 1000 draws"):
        Pictures(config, captioned=True)[0]


def test_colours_of_other_data_sets(samples: Path) -> None:
    square = {"mask": [[2, 2, 8, 2, 8, 9, 2, 9]]}
    said = [{"colours": ["red", "turquoise"]}, {"colours": "red"}, {"colours": None}, {}, None]
    regions = [{**square, "attributes": attributes} for attributes in said]
    samples.write_text(json.dumps({"image": "0.png", "regions": regions}))
    assert masked_picture(open_samples(samples)[0]).colours == [["red"], [], [], [], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mosaic_share": 0.8}, "at most 1"),
        ({"mosaic_share": -0.1}, "at most 1"),
        ({"samples": []}, "names no files"),
        ({"targets": ["a", "b"]}, "2 caches for 1 files"),
        ({"sample_hold_out": 1}, "sample_hold_out"),
        ({"scene_side": [80, 64]}, "scene_side"),
        ({"jitter": [0.5]}, "jitter"),
        ({"regions": 0}, "regions"),
        ({"sprites": ["absent"]}, "no folder absent"),
        ({"samples": ["absent.json"]}, r"no file or folder absent\.json"),
    ],
)
def test_settings_that_cannot_be(samples: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pictures(mixture(samples, **changes))


def test_a_scene_without_objects_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures(DataConfig(scene_side=[64, 80]))
    expected, composed, original = pictures[0], [], pictures.composer.scene

    def scene(seed: int, size: tuple[int, int]) -> Any:
        composed.append(seed)
        found = original(seed, size)
        empty = {key: getattr(found, key)[:0] for key in ("masks", "names", "captions", "colours")}
        return type(found)(**{**vars(found), **empty}) if len(composed) < 3 else found

    monkeypatch.setattr(pictures.composer, "scene", scene)
    picture = pictures[0]
    assert len(set(composed)) == 3 and picture.names and not same(picture, expected)
