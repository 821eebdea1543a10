"""The Region schema: every form to prompt points, every mistake to a message, rows and pads, JSON copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import encode_rle
from tap_llm.regions import (
    RegionPrompt,
    normalize_region_lists,
    parse_region,
    parse_regions,
    prompts_to_rows,
    region_to_json,
)

HEIGHT, WIDTH = 20, 30
quick = settings(max_examples=60, deadline=None, derandomize=True)


def parse(region: Any, **options: Any) -> RegionPrompt:
    return parse_region(region, HEIGHT, WIDTH, **options)


def square() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[4:9, 3:8] = True
    return mask


def assert_same(a: RegionPrompt, b: RegionPrompt) -> None:
    np.testing.assert_array_equal(a.points, b.points)
    np.testing.assert_array_equal(a.labels, b.labels)


def test_box_is_two_corners() -> None:
    prompt = parse({"box": [3, 4, 8, 9]})
    assert prompt.points.tolist() == [[3, 4], [8, 9]] and prompt.labels.tolist() == [2, 3]
    assert prompt.points.dtype == np.float32 and prompt.labels.dtype == np.int64
    assert prompt.has_box


def test_points_and_labels() -> None:
    prompt = parse({"points": [[1, 2], [3.5, 4]]})
    assert prompt.points.tolist() == [[1, 2], [3.5, 4]] and prompt.labels.tolist() == [1, 1]
    assert not prompt.has_box
    assert parse({"points": [[1, 2], [3, 4]], "labels": [0, 0]}).labels.tolist() == [0, 0]
    assert parse({"points": [[1, 2]], "labels": [False]}).labels.tolist() == [0]


def test_box_with_points_puts_corners_first() -> None:
    prompt = parse({"points": [[5, 5], [9, 9]], "labels": [1, 0], "box": [3, 4, 8, 9]})
    assert prompt.points.tolist() == [[3, 4], [8, 9], [5, 5], [9, 9]]
    assert prompt.labels.tolist() == [2, 3, 1, 0]


@pytest.mark.parametrize("count", [1, 9])
def test_short_sketch_is_kept(count: int) -> None:
    stroke = [[i, i] for i in range(count)]
    assert parse({"sketch": stroke}).points.tolist() == stroke


def test_long_sketch_is_resampled_to_nine() -> None:
    prompt = parse({"sketch": [[i / 10, 0] for i in range(100)]})
    np.testing.assert_allclose(prompt.points[:, 0], np.arange(1, 10), rtol=1e-6)
    assert prompt.labels.tolist() == [1] * 9
    prompt = parse({"sketch": [[i, 0] for i in range(10)]})
    assert prompt.points[:, 0].tolist() == list(range(1, 10))
    prompt = parse({"sketch": [[i, 0] for i in range(25)]})
    assert prompt.points[:, 0].tolist() == [2, 5, 7, 10, 12, 15, 17, 20, 22]


@given(hnp.arrays(bool, (HEIGHT, WIDTH)).filter(np.any))
@quick
def test_mask_becomes_tight_box_and_inner_points(mask: np.ndarray) -> None:
    prompt = parse({"mask": mask})
    y, x = np.nonzero(mask)
    assert prompt.points[:2].tolist() == [[x.min(), y.min()], [x.max() + 1, y.max() + 1]]
    inner = prompt.points[2:].astype(int)
    assert prompt.labels.tolist() == [2, 3] + [1] * len(inner) and 1 <= len(inner) <= 8
    assert mask[inner[:, 1], inner[:, 0]].all()
    points_only = parse({"mask": mask}, mask_prompt="points")
    np.testing.assert_array_equal(points_only.points, prompt.points[2:])
    assert not points_only.has_box


def test_every_kind_of_mask_is_the_same_mask(tmp_path: Path) -> None:
    mask = square()
    path = tmp_path / "mask.png"
    Image.fromarray(mask).save(path)
    expected = parse({"mask": mask})
    for value in (
        mask.astype(np.uint8) * 255,
        mask.astype(np.float32),
        torch.from_numpy(mask),
        torch.from_numpy(mask).to(torch.bfloat16),
        encode_rle(mask),
        [[3, 4, 8, 4, 8, 9, 3, 9]],
        path,
        str(path),
    ):
        assert_same(parse({"mask": value}), expected)


def mask_pictures() -> dict[str, Image.Image]:
    mask = square().astype(np.uint8)
    palette = Image.fromarray(mask * 2).convert("P")
    palette.putdata((mask * 2).ravel().tolist())
    palette.putpalette([200, 0, 0, 0, 0, 0, 0, 0, 0])  # index 0 is red, index 2 is black
    colour = np.zeros((*mask.shape, 4), dtype=np.uint8)
    colour[..., 1] = mask * 80
    colour[..., 3] = 255
    cutout = np.full_like(colour, 90)
    cutout[..., 3] = mask * 255
    alpha_only = np.zeros_like(colour)
    alpha_only[..., 3] = mask * 10
    return {
        "bilevel": Image.fromarray(mask.astype(bool)),
        "grey_of_ones": Image.fromarray(mask),
        "sixteen_bit": Image.fromarray(mask.astype(np.uint16)),
        "palette": palette,
        "rgb": Image.fromarray(colour[..., :3]),
        "opaque_rgba": Image.fromarray(colour),
        "cutout": Image.fromarray(cutout),
        "alpha_only": Image.fromarray(alpha_only),
    }


@pytest.mark.parametrize("name", list(mask_pictures()))
def test_mask_pictures(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.png"
    mask_pictures()[name].save(path)
    assert_same(parse({"mask": path}), parse({"mask": square()}))


def test_jpeg_noise_is_not_inside(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[13:41, 11:50] = 255
    path = tmp_path / "mask.jpg"
    Image.fromarray(mask).save(path, quality=60)
    assert np.asarray(Image.open(path))[mask == 0].max() > 0
    assert parse_region({"mask": path}, 64, 64).points[:2].tolist() == [[11, 13], [50, 41]]


def test_arrays_tensors_extras_and_nones_are_accepted() -> None:
    expected = parse({"box": [3, 4, 8, 9]})
    extras = {"id": 7, "category": "cat", "caption": "a cat", "type": "region"}
    for box in (
        np.array([3, 4, 8, 9], np.float16),
        torch.tensor([3.0, 4, 8, 9], dtype=torch.bfloat16),
        (3, 4, 8, 9),
    ):
        assert_same(parse({"box": box, "points": None, "labels": None, "mask": None, **extras}), expected)


def test_partly_outside_passes() -> None:
    assert parse({"box": [-5, -5, 1, 1]}).points.tolist() == [[-5, -5], [1, 1]]
    assert parse({"box": [WIDTH - 0.5, 0, 999, 3]}).points.tolist() == [[WIDTH - 0.5, 0], [999, 3]]
    assert np.isfinite(parse({"box": [-1e300, 0, 1e300, 3]}).points).all()
    assert parse({"points": [[-1, -1], [WIDTH, HEIGHT]]}).points.tolist() == [[-1, -1], [WIDTH, HEIGHT]]


BAD_REGIONS: list[tuple[Any, str]] = [
    ({"box": [3, 4, 3, 9]}, r"box \[3, 4, 3, 9\] has no area"),
    ({"box": [3, 9, 8, 4]}, "has no area"),
    ({"box": [30, 0, 35, 5]}, r"box \[30, 0, 35, 5\] lies wholly outside the image \(30x20\)"),
    ({"box": [-9, 0, 0, 5]}, "wholly outside"),
    ({"box": [0, 20, 5, 25]}, "wholly outside"),
    ({"box": [0, -9, 5, 0]}, "wholly outside"),
    ({"box": [0, 0, float("nan"), 5]}, "NaN"),
    ({"box": [0, 0, float("inf"), 5]}, "infinity"),
    ({"box": [0, 0, 5]}, "four numbers"),
    ({"box": ["0", "0", "5", "5"]}, "four numbers"),
    ({"box": [0, 0, None, 5]}, "four numbers"),
    ({"box": [[0, 0], [5, 5]]}, "four numbers"),
    ({"box": "0,0,5,5"}, "box 0,0,5,5 must be"),
    ({"box": np.zeros((2, 500))}, r"an array of shape \(2, 500\)"),
    ({"box": [0, 0, 10**400, 5]}, "four numbers"),
    ({"points": []}, '"points" is empty'),
    ({"points": [5, 5]}, r'"points" must be a list of \[x, y\] numbers, got \[5, 5\]'),
    ({"points": [[1, 2, 3]]}, r"list of \[x, y\]"),
    ({"points": [[1, 2], [3]]}, r"list of \[x, y\]"),
    ({"points": [["a", "b"]]}, r"list of \[x, y\]"),
    ({"points": [[5, 5], [-1.5, 5]]}, r"points\[1\] = \[-1.5, 5.0\] lies outside the image \(30x20\)"),
    ({"points": [[30.5, 5]]}, "lies outside"),
    ({"points": [[5, 20.5]]}, "lies outside"),
    ({"points": [[float("nan"), 5]]}, r"points\[0\] .* NaN"),
    ({"points": [[1, 1]], "labels": [1, 0]}, "1 points but 2 labels"),
    ({"points": [[1, 1]], "labels": [2]}, '"labels" must be a list of 1'),
    ({"points": [[1, 1]], "labels": [0.5]}, '"labels" must be'),
    ({"points": [[1, 1]], "labels": ["1"]}, '"labels" must be'),
    ({"points": [[1, 1]], "labels": 1}, '"labels" must be'),
    ({"labels": [1]}, '"labels" need "points"'),
    ({"sketch": []}, '"sketch" is empty'),
    ({"sketch": [[0, 0], [99, 0]]}, r"sketch\[1\] = \[99.0, 0.0\] lies outside"),
    ({"mask": np.zeros((HEIGHT, WIDTH), bool)}, "mask is empty"),
    ({"mask": np.ones((WIDTH, HEIGHT), bool)}, "mask is 20x30, but the image is 30x20"),
    ({"mask": np.ones((1, HEIGHT, WIDTH), bool)}, r"got shape \(1, 20, 30\)"),
    ({"mask": np.full((HEIGHT, WIDTH), 0.3)}, "0 and 1 only"),
    ({"mask": np.full((HEIGHT, WIDTH), np.nan)}, "0 and 1 only"),
    ({"mask": np.full((HEIGHT, WIDTH), "x")}, "must be a"),
    ({"mask": encode_rle(np.ones((4, 4), bool))}, "mask is 4x4"),
    ({"mask": {"size": [20, 30], "counts": [9]}}, "RLE"),
    ({"mask": []}, "polygons"),
    ({"mask": [[25, 25, 28, 25, 28, 28]]}, "mask is empty"),
    ({"mask": 7}, "must be a .* array, an RLE dict, .* got 7"),
    ({"mask": square(), "box": [0, 0, 5, 5]}, '"box", "mask" cannot be combined'),
    ({"sketch": [[1, 1]], "points": [[1, 1]]}, '"points", "sketch" cannot be combined'),
    ({"sketch": [[1, 1]], "labels": [1]}, "cannot be combined"),
    ({"box": [0, 0, 5, 5], "labels": [1]}, "cannot be combined"),
    ({"bbox": [0, 0, 5, 5]}, 'unknown key "bbox"; did you mean "box"'),
    ({"points": [[1, 1]], "label": [1]}, 'unknown key "label"; did you mean "labels"'),
    ({"box": [0, 0, 5, 5], "zzz": 1}, 'unknown key "zzz"; Known keys: box, points'),
    ({"type": "image", "box": [0, 0, 5, 5]}, '"type" of a region must be "region", got image'),
    ({}, 'needs one of "box"'),
    ({"id": 3}, 'needs one of "box"'),
    ([0, 0, 5, 5], r'expected a dict such as {"box"'),
    (None, "expected a dict"),
]


@pytest.mark.parametrize(("region", "message"), BAD_REGIONS)
def test_bad_regions(region: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(region)


def test_bad_options_and_mask_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mask_prompt must be one of .* got 'box'"):
        parse({"mask": square()}, mask_prompt="box")
    with pytest.raises(MissingFileError, match=r"region 0: mask image: .*absent\.png"):
        parse_regions([{"mask": tmp_path / "absent.png"}], [(HEIGHT, WIDTH)])


def test_errors_name_the_region() -> None:
    good, bad = {"box": [0, 0, 5, 5]}, {"box": [5, 0, 5, 5]}
    with pytest.raises(InputError, match=r"^region 2: box \[5, 0, 5, 5\]"):
        parse_regions([good, good, bad], [(HEIGHT, WIDTH)])
    with pytest.raises(InputError, match=r"^image 1, region 0: box \[5, 0, 5, 5\]"):
        parse_regions([[good], [bad]], [(HEIGHT, WIDTH)] * 2)


def test_regions_are_flattened_image_by_image() -> None:
    regions = [[{"box": [0, 0, 5, 5]}, {"points": [[9, 9]]}], [], [{"box": [50, 50, 60, 60]}]]
    prompts, owners = parse_regions(regions, torch.tensor([(20, 30), (5, 5), (100, 100)]))
    assert owners.tolist() == [0, 0, 2] and owners.dtype == np.int64
    assert [prompt.points[0].tolist() for prompt in prompts] == [[0, 0], [9, 9], [50, 50]]


def test_one_image_takes_flat_or_nested_lists() -> None:
    region = {"box": [0, 0, 5, 5]}
    for regions in ([region], [[region]], (region,)):
        prompts, owners = parse_regions(regions, [(HEIGHT, WIDTH)])
        assert len(prompts) == 1 and owners.tolist() == [0]
    empty: list[list[Any]] = [[], [[]]]
    for nothing in empty:
        prompts, owners = parse_regions(nothing, [(HEIGHT, WIDTH)])
        assert prompts == [] and owners.shape == (0,) and owners.dtype == np.int64


def test_normalized_lists_are_copies() -> None:
    inner: list[Any] = [{"box": [0, 0, 5, 5]}]
    lists = normalize_region_lists([inner, ()], 2)
    assert lists == [inner, []]
    lists[0].clear()
    assert len(inner) == 1


@pytest.mark.parametrize(
    ("regions", "count", "message"),
    [
        ([{"box": [0, 0, 5, 5]}], 2, "flat list fits one image only; pass 2 lists"),
        ([[], [], []], 2, "got 3 lists for 2 images"),
        ([], 2, "got 0 lists for 2 images"),
        ([[], []], 1, "got 2 lists for 1 images"),
        ([[], None], 2, "entry 1 must be one image's list of regions, got None"),
        ([{"box": [0, 0, 5, 5]}, []], 1, "entry 0 must be"),
        ({"box": [0, 0, 5, 5]}, 1, "put the region into a list"),
        (None, 1, "got NoneType"),
        ("box", 1, "got str"),
    ],
)
def test_bad_nesting(regions: Any, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        normalize_region_lists(regions, count)


coordinates = st.tuples(st.floats(0, WIDTH - 2, width=32), st.floats(0, HEIGHT - 2, width=32)).map(list)
boxes = coordinates.map(lambda corner: [*corner, corner[0] + 1, corner[1] + 1])
point_lists = st.lists(coordinates, min_size=1, max_size=12)
region_dicts = st.one_of(
    st.fixed_dictionaries({"box": boxes}),
    st.fixed_dictionaries({"points": point_lists}),
    st.fixed_dictionaries({"box": boxes, "points": point_lists}),
    st.fixed_dictionaries({"sketch": point_lists}),
)


@given(st.lists(st.lists(region_dicts, max_size=4), min_size=1, max_size=3))
@quick
def test_rows_hold_the_prompts_and_the_right_pads(regions: list[list[dict[str, Any]]]) -> None:
    prompts, owners = parse_regions(regions, [(HEIGHT, WIDTH)] * len(regions))
    assert owners.tolist() == [image for image, items in enumerate(regions) for _ in items]
    points, labels = prompts_to_rows(prompts)
    assert points.dtype == np.float32 and labels.dtype == np.int64
    assert points.shape == (len(prompts), labels.shape[1], 2)
    longest = max((len(p.labels) + (not p.has_box) for p in prompts), default=2)
    assert labels.shape == (len(prompts), longest)
    for prompt, row_points, row_labels in zip(prompts, points, labels, strict=True):
        count = len(prompt.labels)
        np.testing.assert_array_equal(row_points[:count], prompt.points)
        np.testing.assert_array_equal(row_labels[:count], prompt.labels)
        assert (row_labels[count:] == 4).all() and (row_points[count:] == 0).all()
        assert prompt.has_box or len(row_labels) > count


def test_rows_numbers() -> None:
    prompts = [parse({"points": [[5, 6]]}), parse({"box": [1, 2, 3, 4], "points": [[2, 3]]})]
    points, labels = prompts_to_rows(prompts)
    assert points.tolist() == [[[5, 6], [0, 0], [0, 0]], [[1, 2], [3, 4], [2, 3]]]
    assert labels.tolist() == [[1, 4, 4], [2, 3, 1]]
    points, labels = prompts_to_rows([])
    assert points.shape == (0, 2, 2) and labels.shape == (0, 2)


def test_a_thousand_regions() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 400, (1000, 2))
    regions = [{"box": [x, y, x + 9, y + 9], "id": i} for i, (x, y) in enumerate(corners)]
    prompts, _ = parse_regions(regions, [(480, 640)])
    points, labels = prompts_to_rows(prompts)
    np.testing.assert_allclose(points[:, 1] - points[:, 0], 9, atol=1e-4)
    assert (labels == [2, 3]).all()


def test_region_to_json_is_plain_and_parses_the_same(tmp_path: Path) -> None:
    regions: list[dict[str, Any]] = [
        {"box": np.array([3, 4, 8, 9], np.float32), "id": np.int64(7), "caption": None},
        {"points": torch.tensor([[1, 2], [3, 4]]), "labels": (np.True_, 0), "category": "cat"},
        {"mask": square(), "type": "region"},
        {"mask": torch.from_numpy(square())},
        {"mask": {**encode_rle(square()), "counts": encode_rle(square())["counts"].encode()}},
        {"mask": [[3, 4, 8, 4, 8, 9, 3, 9]]},
    ]
    for region in regions:
        plain = json.loads(json.dumps(region_to_json(region), allow_nan=False))
        assert plain.keys() == region.keys()
        assert_same(parse(plain), parse(region))
    assert region_to_json(regions[2])["mask"] == encode_rle(square())
    assert region_to_json({"mask": tmp_path / "m.png"}) == {"mask": str(tmp_path / "m.png")}


def test_region_to_json_copies_deeply_and_refuses_objects() -> None:
    region: dict[str, Any] = {"points": [[1, 2]]}
    region_to_json(region)["points"][0][0] = 99
    assert region == {"points": [[1, 2]]}
    with pytest.raises(InputError, match="a set cannot be written as JSON"):
        region_to_json({"box": [0, 0, 1, 1], "category": {"cat"}})


def test_rle_of_another_size_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tap_llm.regions.decode_rle", lambda rle: pytest.fail("decoded"))
    with pytest.raises(InputError, match="mask is 10000x9999, but the image is 30x20"):
        parse({"mask": {"size": [9999, 10000], "counts": [99990000]}})


def test_nested_lists_of_zeros_and_ones_are_a_mask() -> None:
    for rows in (square().tolist(), square().astype(int).tolist()):
        assert_same(parse({"mask": rows}), parse({"mask": square()}))
    for empty in (False, 0):
        with pytest.raises(InputError, match="mask is empty"):
            parse({"mask": [[empty] * WIDTH] * HEIGHT})
    polygons = [[3, 4, 8, 4, 8, 9, 3, 9]] * 2
    assert_same(parse_region({"mask": polygons}, HEIGHT, WIDTH), parse({"mask": square()}))
