"""Batches of regions: coverage of cells, labels, prompts, teachers; each a function of its number alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from tap_llm.concepts import ConceptSpace
from tap_llm.data.colours import COLOUR_WORDS
from tap_llm.data.crops import CropSettings
from tap_llm.data.readers import open_samples
from tap_llm.data.target_cache import TargetCache, build_target_cache
from tap_llm.errors import InputError
from training.examples import (
    DataConfig,
    Pictures,
    RegionBatches,
    canvas_cover,
    colour_targets,
    paint_cells,
    pick_regions,
)
from training.prompts import PromptSampler

# Coverage


def test_cover_counts_the_pixels_of_each_cell() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((3, 24, 32)) < 0.4
    canvas = np.zeros((3, 32, 32))
    canvas[:, :24] = masks
    shares = canvas.reshape(3, 8, 4, 8, 4).mean((2, 4))
    cover = canvas_cover(masks, 32)
    assert cover.shape == (3, 8, 8) and cover.dtype == np.uint8
    np.testing.assert_allclose(cover / 255, shares, atol=0.5 / 255 + 1e-9)


def test_cover_of_resized_masks_keeps_area_and_place() -> None:
    masks = np.zeros((2, 120, 200), dtype=bool)
    masks[0, 30:90, 40:160] = masks[1, :, :] = True
    cover = canvas_cover(masks, 64) / 255  # 0.32 of the size
    assert cover[0].sum() * 16 == pytest.approx(60 * 120 * 0.32**2, rel=0.02)
    assert cover[1].sum() * 16 == pytest.approx(64 * 38, rel=1e-3)  # 38.4 rows become 38
    rows, columns = (np.average(np.arange(16) + 0.5, weights=cover[0].sum(axis)) * 4 for axis in (1, 0))
    assert (columns, rows) == (pytest.approx(100 * 0.32, abs=0.1), pytest.approx(60 * 38 / 120, abs=0.1))
    assert (cover[1, 10:] == 0).all()
    small = canvas_cover(np.ones((1, 5, 10), dtype=bool), 64)  # enlarged
    assert (small[0, :8] == 255).all() and (small[0, 8:] == 0).all()


def test_cells_take_the_label_of_the_object_that_covers_most_of_them() -> None:
    cover = np.zeros((3, 8, 8), dtype=np.uint8)
    cover[0, :4, :4] = 255  # all of the first cell
    cover[1, :4, 4:7] = 255  # three quarters of the second
    cover[0, 4:, :2], cover[2, 4:, 2:4] = 255, 250  # no more than half each
    cover[2, 4:, 4:] = 200
    labels = np.array([7, -100, 9])
    assert paint_cells(cover, labels).tolist() == [[7, -100], [-100, 9]]
    assert paint_cells(cover, np.array([7, 8, 9])).tolist() == [[7, 8], [-100, 9]]


# Labels and rows


def test_regions_are_all_taken_before_one_is_taken_again() -> None:
    rng = np.random.default_rng(0)
    assert sorted(pick_regions(rng, 9, 4).tolist())[0] >= 0 and len(set(pick_regions(rng, 9, 4).tolist())) == 4
    picks = pick_regions(rng, 3, 8).tolist()
    assert sorted(picks[:3]) == [0, 1, 2] and picks == (picks[:3] * 3)[:8]
    assert len({tuple(pick_regions(rng, 4, 4).tolist()) for _ in range(200)}) == 24
    assert pick_regions(rng, 0, 4).tolist() == []


def test_colour_targets() -> None:
    targets = colour_targets([["red", "light blue"], []])
    assert targets.shape == (2, len(COLOUR_WORDS)) and targets[1].isnan().all()
    assert [COLOUR_WORDS[i] for i in targets[0].nonzero()[:, 0].tolist()] == ["red", "light blue"]
    assert targets[0].sum() == 2


def batches(tiny: Any, data: DataConfig, size: int = 2, seed: int = 0, **options: Any) -> RegionBatches:
    _, processor, concepts = tiny
    pictures = Pictures(data, seed)
    sampler = PromptSampler(64, options.pop("box_probability", 0.5))
    space = options.pop("space", concepts)
    return RegionBatches(pictures, space, processor.image_processor, sampler, size, data.regions, None, pictures.seed)


SCENES = {"scene_side": [64, 80], "regions": 5}


def test_shapes_and_meaning_of_a_batch(tiny: Any) -> None:
    source = batches(tiny, DataConfig(**SCENES), size=3, box_probability=1.0)
    batch, concepts = source[4], tiny[2]
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "pixel_values": (3, 3, 64, 64), "input_points": (15, 2, 2), "input_labels": (15, 2), "from_box": (15,),
        "region_image_index": (15,), "masks": (15, 16, 16), "names": (15,), "colours": (15, len(COLOUR_WORDS)),
        "cell_names": (3, 4, 4), "cell_colours": (3, 4, 4), "seed": (),
    }  # fmt: skip
    assert batch["region_image_index"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert int(batch["seed"]) == 12 and len(source) == 2**40
    for image in range(3):
        picture = source.pictures[12 + image]
        for row in range(5 * image, 5 * image + 5):
            name = concepts.names[int(batch["names"][row])]
            rows = [i for i, other in enumerate(picture.names) if other == name]
            covers = canvas_cover(picture.masks, 64)[rows]
            (place,) = [
                i for i, cover in zip(rows, covers, strict=True) if (cover == batch["masks"][row].numpy()).all()
            ]
            box = torch.from_numpy(picture.boxes[place]) * 64 / max(picture.image.shape[:2])
            corners = batch["input_points"][row].flatten()
            assert (corners[:2] <= box[:2] + 1e-3).all() and (corners[2:] >= box[2:] - 1e-3).all()  # outward
            assert (corners - box).abs().max() <= 20 * 64 / 1024 + 1e-3
            words = [COLOUR_WORDS[i] for i in batch["colours"][row].nonzero()[:, 0].tolist()]
            assert sorted(words) == sorted(picture.colours[place])
        cells = batch["cell_names"][image][batch["cell_names"][image] >= 0].tolist()
        assert {concepts.names[cell] for cell in cells} <= set(picture.names)


def test_points_lie_on_the_mask(tiny: Any) -> None:
    batch = batches(tiny, DataConfig(**SCENES), size=4, box_probability=1e-9)[0]
    cells = ((batch["input_points"][:, 0] + 0.5) / 4).long()
    for row in (batch["input_labels"][:, 0] == 1).nonzero()[:, 0].tolist():
        assert batch["masks"][row, cells[row, 1], cells[row, 0]] > 127
    assert (batch["input_labels"][:, 1] == 4).all() and not batch["from_box"].any()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key].nan_to_num(9), b[key].nan_to_num(9)) for key in a)


def test_a_batch_depends_on_its_number_alone(tiny: Any, samples: Path) -> None:
    data = DataConfig(**SCENES, samples=[str(samples)], sample_share=0.5, mosaic_share=0.2)
    source = batches(tiny, data)
    assert equal(source[3], batches(tiny, data)[3])
    source[9], torch.rand(3)
    assert equal(source[3], batches(tiny, data)[3])
    assert not equal(source[3], source[4]) and not equal(source[3], batches(tiny, data, seed=1)[3])


def test_batches_of_two_processes_make_one_of_twice_the_size(tiny: Any) -> None:
    data = DataConfig(**SCENES)
    whole, parts = batches(tiny, data, size=4)[3], batches(tiny, data, size=2)
    first, second = parts[6], parts[7]
    for key in whole.keys() - {"region_image_index", "seed"}:
        joined = torch.cat([first[key], second[key]])
        torch.testing.assert_close(joined, whole[key], rtol=0, atol=0, equal_nan=True)


def test_names_that_the_space_lacks_are_unknown(tiny: Any, samples: Path) -> None:
    space = ConceptSpace(["square 1", "Square_2"], torch.eye(16)[:, :2])
    data = DataConfig(regions=4, samples=[str(samples)], sample_share=1.0, jitter=[1.0, 1.0])
    source = batches(tiny, data, size=20, space=space)
    batch = source[0]
    shown = [source.pictures[number].names[0] for number in range(20)]
    expected = [{"square 1": 0, "square 2": 1}.get(name or "", -100) for name in shown]
    assert batch["names"][::4].tolist() == expected and {0, 1, -100} == set(expected)
    assert batch["colours"].isnan().all()  # these samples tell no colours


# Teachers


class StubTeacher:
    """Gives each crop the next of some random directions."""

    name, fingerprint, width, settings = "stub", "0", 16, CropSettings(8)

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def embed_stream(self, chunks: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
        for chunk in chunks:
            if len(chunk):
                yield normalize(torch.randn(len(chunk), self.width, generator=self.random), dim=1)


@pytest.fixture
def cache(samples: Path, tmp_path: Path) -> Path:
    build_target_cache(open_samples(samples), StubTeacher(), tmp_path / "targets")  # type: ignore[arg-type]
    return tmp_path / "targets"


def place_of(mask: NDArray[np.uint8], masks: NDArray[np.uint8]) -> int:
    return int(np.abs(masks.astype(int) - mask.astype(int)).sum((1, 2)).argmin())


def test_embeddings_of_a_teacher_reach_their_regions(tiny: Any, samples: Path, cache: Path) -> None:
    files = {"samples": [str(samples)], "targets": [str(cache)], "sample_hold_out": 4}
    data = DataConfig(regions=3, sample_share=0.7, jitter=[0.6, 1.2], scene_side=[64, 80], **files)  # type: ignore[arg-type]
    source, stored = batches(tiny, data, size=1), TargetCache.open(cache)
    taught = 0
    for number in range(30):
        batch, picture = source[number], source.pictures[number]
        for row in range(3):
            name = picture.names[0] or ""
            if not name.startswith("square "):
                assert batch["teacher"][row].isnan().all()  # a scene
                continue
            place = place_of(batch["masks"][row].numpy(), canvas_cover(picture.masks, 64))
            grey = int(picture.image[picture.masks[place]][0, 0]) - 120  # the square's place in its sample
            expected = stored[int(name.removeprefix("square ")), grey].float()
            torch.testing.assert_close(batch["teacher"][row], expected, rtol=0, atol=0)
            taught += 1
    assert taught > 30


def test_teachers_that_do_not_fit(tiny: Any, samples: Path, cache: Path) -> None:
    data = DataConfig(samples=[str(samples)], targets=[str(cache)], sample_share=1.0)
    with pytest.raises(InputError, match="width 16, the concept space has width 3"):
        batches(tiny, data, space=ConceptSpace(["a"], torch.ones(3, 1)))
    samples.write_text("\n".join(samples.read_text().splitlines()[:5]))
    with pytest.raises(InputError, match="targets of other data"):
        Pictures(data)
    Pictures(data, captioned=True)  # captions need no teacher


def test_broken_samples_are_told(tiny: Any, samples: Path) -> None:
    (samples.parent / "3.png").unlink()
    data = DataConfig(regions=2, samples=[str(samples)], sample_share=1.0, broken_share=0.5)
    source = batches(tiny, data, size=30)
    source[0]
    (problem,) = source.take_problems()
    assert problem.startswith(f"{samples}, line 4: image: ") and source.take_problems() == []
