"""The mixture of pictures: a function of number and seed, without what is held out, past what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tap_llm.data.readers import open_samples
from tap_llm.data.scenes import Scene
from tap_llm.errors import InputError
from training import sources
from training.sample_files import SampleFile, boxed_picture, masked_picture
from training.sources import VALIDATION_SEED, DataConfig, Picture, Pictures, picture_of_scene


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
    other = Pictures(config, seed=4)
    assert not any(same(other[number], forwards[number]) for number in range(12))


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


def shown_samples(pictures: Pictures, count: int = 120) -> set[str]:
    return {name for number in range(count) for name in pictures[number].names if name}


@pytest.mark.parametrize("every", [2, 3, 5])
def test_held_out_samples_are_never_shown(samples: Path, every: int) -> None:
    pictures = Pictures(mixture(samples, mosaic_share=0.0, sample_share=1.0, sample_hold_out=every, jitter=[1.0, 1.0]))
    assert shown_samples(pictures) == {f"square {number}" for number in range(10) if number % every}
    assert shown_samples(pictures.for_validation()) == {f"square {number}" for number in range(0, 10, every)}
    assert set(pictures.names()) >= {f"square {number}" for number in range(10)}


def test_validation_without_held_out_samples_draws_from_all(samples: Path) -> None:
    config = mixture(samples)
    validation, expected = Pictures(config).for_validation(), Pictures(config, seed=VALIDATION_SEED)
    assert all(same(validation[number], expected[number]) for number in range(12))


def test_validation_shows_the_names_of_training(sprites: str) -> None:
    """Those of `hold_out` stay unseen, also by the choice of the best model."""
    config = DataConfig(sprites=[sprites], hold_out=0.4, shape_share=0.0, mosaic_share=1.0, scene_side=[64, 80])
    pictures = Pictures(config)
    assert pictures.novel is not None and pictures.novel.sprites is not None
    shown = shown_samples(pictures.for_validation(), 20)
    assert shown == {f"thing {number}" for number in range(10)} - set(pictures.novel.sprites.names)


def test_nothing_is_left_to_train_on(samples: Path) -> None:
    samples.write_text(samples.read_text().splitlines()[0])
    message = r"samples\.jsonl has no sample to train on that data\.sample_hold_out leaves"
    with pytest.raises(InputError, match=message):
        Pictures(mixture(samples, sample_hold_out=20))
    Pictures(mixture(samples, sample_hold_out=20, sample_share=0.0))
    samples.write_text("")
    with pytest.raises(InputError, match=r"has no sample to train on$"):
        Pictures(mixture(samples))


def test_a_broken_sample_is_not_replaced_by_one_that_is_held_out(samples: Path) -> None:
    (samples.parent / "4.png").unlink()  # the next sample, 5, is held out
    config = mixture(samples, mosaic_share=0.0, sample_share=1.0, sample_hold_out=5, broken_share=0.5)
    assert shown_samples(Pictures(config)) == {f"square {number}" for number in (1, 2, 3, 6, 7, 8, 9)}


def test_samples_of_a_file(samples: Path) -> None:
    for every in (2, 3, 4, 10):
        file = SampleFile(open_samples(samples), masked_picture, hold_out=every)
        both = [[picture.names[0] for picture in part] for part in (file, file.held_out())]
        assert both[0] == [f"square {index}" for index in range(10) if index % every]
        assert both[1] == [f"square {index}" for index in range(0, 10, every)]
    assert len(SampleFile(open_samples(samples), masked_picture)) == 10


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


class Drawn(Dataset[bool]):
    """Whether picture n can be made."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return 150

    def __getitem__(self, number: int) -> bool:
        try:
            return self.pictures[number] is not None
        except InputError as error:
            assert "samples are broken" in str(error)
            return False


@pytest.mark.parametrize(("share", "stops"), [(0.02, True), (0.5, False)])
def test_workers_are_judged_together(samples: Path, share: float, stops: bool) -> None:
    """Each of two draws some 80, too few to be judged; together they draw enough, a tenth of them broken."""
    (samples.parent / "7.png").unlink()
    pictures = Pictures(mixture(samples, mosaic_share=0.0, sample_share=1.0, broken_share=share))
    made = list(DataLoader(Drawn(pictures), batch_size=None, num_workers=2))
    assert not all(made) if stops else all(made)
    assert pictures._count.seen > 150 and 0.05 < pictures._count.broken / pictures._count.seen < 0.15


def test_validation_counts_with_training(samples: Path) -> None:
    (samples.parent / "7.png").unlink()
    pictures = Pictures(mixture(samples, mosaic_share=0.0, sample_share=1.0, broken_share=0.5))
    validation = pictures.for_validation()
    for number in range(40):
        validation[number]
    assert pictures._count.seen >= 40 and pictures.take_problems() == []
    (problem,) = validation.take_problems()
    assert "line 8" in problem


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
        ({"broken_share": 2.0}, r"data\.broken_share must lie between 0 and 1, got 2\.0"),
        ({"sprites": ["absent"]}, "no folder absent"),
        ({"samples": ["absent.json"]}, r"no file or folder absent\.json"),
    ],
)
def test_settings_that_cannot_be(samples: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pictures(mixture(samples, **changes))


def test_a_scene_without_objects_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures(DataConfig(scene_side=[64, 80]))
    expected, composed = pictures[0], []

    def picture_of(scene: Scene) -> Picture:
        composed.append(picture_of_scene(scene))
        return composed[-1].keep([]) if len(composed) < 3 else composed[-1]

    monkeypatch.setattr(sources, "picture_of_scene", picture_of)
    picture = pictures[0]
    assert [same(one, expected) for one in composed] == [True, False, False] and same(picture, composed[2])
