"""Pictures of regions: labels keep apart and stay inside, masks show, nothing else changes, text reads."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from tap_llm.drawing import contrast_ratio, ink_on
from tap_llm.errors import InputError
from tap_llm.label_drawing import PANEL, PANEL_NOTE, PANEL_TEXT
from tap_llm.label_layout import Anchor, Rect, balance_text, needs_leader, place_labels, wrap_text
from tap_llm.visualize import _edge_distance, draw_regions, region_color


def make_image(width: int = 640, height: int = 480, color: tuple[int, int, int] = (128, 128, 128)) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def make_result(image: Image.Image, box: tuple[int, int, int, int] | None, **extra: Any) -> dict[str, Any]:
    mask = np.zeros((image.height, image.width), dtype=bool)
    if box is not None:
        mask[box[1] : box[3], box[0] : box[2]] = True
    base = {
        "region": {},
        "mask": mask,
        "box": box,
        "iou": 0.9,
        "concept": "",
        "concept_score": 0.0,
        "caption": "",
    }
    return {**base, **extra}


def many_results(image: Image.Image, count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, [image.width - 60, image.height - 60], (count, 2))
    sizes = rng.integers(8, 60, (count, 2))
    boxes = [(int(x), int(y), int(x + w), int(y + h)) for (x, y), (w, h) in zip(corners, sizes, strict=True)]
    return [make_result(image, box, concept="wine glass", concept_score=0.5) for box in boxes]


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    after = after.crop((0, 0, *before.size))
    return np.asarray(np.asarray(ImageChops.difference(before, after)).max(-1) > 0)


def overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def assert_apart_and_inside(rects: list[Rect | None], sizes: list[tuple[int, int]], bounds: tuple[int, int]) -> None:
    placed = [(rect, size) for rect, size in zip(rects, sizes, strict=True) if rect is not None]
    for rect, size in placed:
        assert (rect[2] - rect[0], rect[3] - rect[1]) == size
        assert rect[0] >= 0 and rect[1] >= 0 and rect[2] <= bounds[0] and rect[3] <= bounds[1]
    assert not any(overlap(a, b) for (a, _), (b, _) in combinations(placed, 2))


# Layout


anchors_and_sizes = st.lists(
    st.tuples(st.integers(0, 290), st.integers(0, 190), st.integers(1, 300), st.integers(1, 200),
              st.integers(5, 90), st.integers(5, 40)),
    max_size=25,
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(anchors_and_sizes, st.booleans())
def test_labels_never_overlap_and_stay_inside(rows: list[tuple[int, ...]], inside: bool) -> None:
    bounds = (300, 200)
    boxes = [(x, y, min(x + w, 300), min(y + h, 200)) for x, y, w, h, _, _ in rows]
    anchors = [Anchor(box, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)) for box in boxes]
    sizes = [(row[4], row[5]) for row in rows]
    rects = place_labels(sizes, anchors, bounds, inside=inside)
    assert len(rects) == len(rows)
    assert_apart_and_inside(rects, sizes, bounds)


def test_a_single_label_sits_on_top_of_its_region() -> None:
    anchor = Anchor((100, 100, 200, 180), (150, 140))
    assert place_labels([(60, 20)], [anchor], (400, 300), gap=4) == [(100, 76, 160, 96)]
    assert place_labels([(60, 20)], [anchor], (400, 300), inside=True) == [(120, 130, 180, 150)]


def test_labels_avoid_what_is_precious() -> None:
    anchor = Anchor((100, 100, 200, 180), (150, 140))
    crowd = np.zeros((300, 400))
    crowd[60:100] = 0.01
    (rect,) = place_labels([(60, 20)], [anchor], (400, 300), crowd=crowd)
    assert rect is not None and rect[1] >= 100
    assert not needs_leader(rect, anchor, 4)


def test_a_crowd_gets_leaders_and_then_no_place() -> None:
    anchor = Anchor((50, 50, 60, 60), (55, 55))
    rects = place_labels([(60, 20)] * 12, [anchor] * 12, (200, 120))
    placed = [rect for rect in rects if rect is not None]
    assert any(needs_leader(rect, anchor, 4) for rect in placed)
    assert None in rects  # 12 labels of 60 x 20 with gaps between them need more than 200 x 120
    assert place_labels([(60, 20)], [anchor], (50, 120)) == [None]


def test_wrapped_text_fits_and_ends_in_an_ellipsis() -> None:
    def measure(text: str) -> float:
        return float(len(text))

    assert wrap_text("a dog on a beach", 8, 3, measure) == ["a dog on", "a beach"]
    assert wrap_text("one two three four five", 7, 2, measure) == ["one two", "three…"]
    assert wrap_text("abcdefghijkl", 5, 3, measure) == ["abcde", "fghij", "kl"]
    assert wrap_text("  ", 5, 3, measure) == []
    assert balance_text("aa bb cc dd ee", 11, 2, measure) == ["aa bb cc", "dd ee"]


# Colours


def test_colours_are_fixed_and_neighbours_differ() -> None:
    colors = [region_color(index) for index in range(200)]
    assert colors == [region_color(index) for index in range(200)]
    assert all(0 <= channel <= 255 for color in colors for channel in color)
    distances = [np.abs(np.subtract(a, b)).sum() for a, b in zip(colors, colors[1:], strict=False)]
    assert min(distances) > 100
    first = [np.abs(np.subtract(a, b)).sum() for a, b in combinations(colors[:12], 2)]
    assert min(first) > 40


def test_text_contrast_is_at_least_4_5() -> None:
    assert contrast_ratio((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    chips = [region_color(index) for index in range(300)]
    greys = [(value, value, value) for value in range(256)]
    assert min(contrast_ratio(color, ink_on(color)) for color in chips + greys) >= 4.5
    assert min(contrast_ratio(PANEL, text) for text in (PANEL_TEXT, PANEL_NOTE)) >= 4.5


# Pictures


def test_masks_change_and_far_pixels_do_not() -> None:
    image = make_image()
    results = [make_result(image, (200, 200, 300, 280)), make_result(image, (400, 100, 440, 160))]
    picture = draw_regions(image, results, labels=False)
    assert picture.size == image.size and picture.mode == "RGB"
    difference = changed(image, picture)
    assert difference[results[0]["mask"] | results[1]["mask"]].all()
    near = np.zeros_like(difference)
    near[190:290, 190:310] = near[90:170, 390:450] = True
    assert not difference[~near].any()


def test_a_label_stays_near_and_the_input_is_untouched() -> None:
    image = make_image()
    result = make_result(image, (200, 200, 300, 280), concept="frog", concept_score=0.96, caption="a green frog")
    with_label = changed(image, draw_regions(image, [result]))
    without = changed(image, draw_regions(image, [result], labels=False))
    rows, columns = np.nonzero(with_label & ~without)
    assert len(rows) > 1000 and rows.min() > 130 and rows.max() < 280 and columns.max() < 400
    assert not changed(image, make_image()).any()


def test_the_small_region_lies_on_top_whatever_the_order() -> None:
    image = make_image(color=(90, 90, 90))
    small, large = make_result(image, (300, 200, 340, 240)), make_result(image, (100, 50, 600, 400))
    for results, index in (([small, large], 0), ([large, small], 1)):
        picture = draw_regions(image, results, labels=False, opacity=1.0)
        assert picture.getpixel((320, 220)) == region_color(index)
        assert picture.getpixel((150, 300)) == region_color(1 - index)


def test_drawing_is_deterministic() -> None:
    image = make_image()
    results = many_results(image, 30)
    assert draw_regions(image, results).tobytes() == draw_regions(image, results).tobytes()


def test_no_results_give_a_copy() -> None:
    image = make_image(30, 20)
    picture = draw_regions(image, [])
    assert picture is not image
    assert picture.size == image.size and picture.tobytes() == image.tobytes()


@pytest.mark.parametrize("shape", [(480, 639), (640, 480), (480, 640, 1), ()])
def test_a_mask_of_another_size_is_an_error(shape: tuple[int, ...]) -> None:
    image = make_image()
    good, bad = make_result(image, (1, 1, 5, 5)), make_result(image, None, mask=np.zeros(shape, dtype=bool))
    with pytest.raises(InputError, match=r"region 2 .*\(480, 640\)"):
        draw_regions(image, [good, bad])


@pytest.mark.parametrize("opacity", [-0.1, 1.1, float("nan")])
def test_an_opacity_out_of_range_is_an_error(opacity: float) -> None:
    with pytest.raises(InputError, match="opacity"):
        draw_regions(make_image(), [], opacity=opacity)


def test_a_missing_font_is_an_error() -> None:
    image = make_image()
    with pytest.raises(InputError, match="no-such-font.ttf"):
        draw_regions(image, [make_result(image, (1, 1, 50, 50))], font="no-such-font.ttf")


@pytest.mark.parametrize("size, expected", [((64, 48), (640, 480)), ((400, 300), (800, 600)), ((480, 300), (480, 300))])
def test_small_pictures_are_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = make_image(*size)
    result = make_result(image, (20, 20, 40, 40), concept="cup", concept_score=0.5)
    picture = draw_regions(image, [result])
    assert picture.size == expected
    factor = expected[0] // size[0]
    enlarged = image.resize(expected)
    assert changed(enlarged, picture)[25 * factor : 35 * factor, 25 * factor : 35 * factor].mean() > 0.99


@pytest.mark.parametrize("size", [(1, 1), (400, 3), (5, 700), (2000, 40)])
def test_odd_shapes_are_drawn(size: tuple[int, int]) -> None:
    image = make_image(*size)
    result = make_result(image, (0, 0, *size), concept="cup", concept_score=0.5, caption="a white cup on a table")
    picture = draw_regions(image, [result])
    assert picture.width >= size[0] and picture.height > size[1]  # room for the text, enlarged or beneath


def test_many_regions_get_a_legend_that_is_capped() -> None:
    image = make_image()
    some = draw_regions(image, many_results(image, 30))
    many = draw_regions(image, many_results(image, 160))
    assert some.width == many.width == 640
    assert 480 < some.height < many.height <= 2 * 480 + 100
    assert some.getpixel((2, some.height - 2)) == PANEL


def test_few_regions_get_no_legend() -> None:
    image = make_image()
    boxes = [(50, 100, 150, 200), (300, 100, 400, 200), (450, 300, 600, 400)]
    results = [make_result(image, box, concept="cup", concept_score=0.9, caption="a white cup") for box in boxes]
    assert draw_regions(image, results).size == image.size


@pytest.mark.parametrize(
    "text", ["日本の青い蛙 🐸", "crème brûlée", "\ud800 \x00\n\t", "x" * 3000, "word " * 300, "\u202eעברית"]
)
def test_any_text_can_be_drawn(text: str) -> None:
    image = make_image()
    result = make_result(image, (200, 200, 300, 280), concept=text, concept_score=float("nan"), caption=text)
    assert changed(image, draw_regions(image, [result])).any()


def test_an_empty_mask_shows_its_prompt_and_chip() -> None:
    image = make_image()
    result = make_result(image, None, region={"box": [200, 200, 300, 280]})
    difference = changed(image, draw_regions(image, [result], labels=False))
    assert difference[200, 200:300].all() and not difference[230:250, 220:280].any()
    with_chip = changed(image, draw_regions(image, [result])).sum()
    assert with_chip > difference.sum() + 200
    assert changed(image, draw_regions(image, [make_result(image, None)])).any()


def test_points_are_filled_or_crossed_and_sketches_follow_their_path() -> None:
    image = make_image()
    region = {
        "points": [[100, 100], [300, 100]],
        "labels": [1, 0],
        "sketch": [[100, 300], [300, 300], [300, 400]],
    }
    picture = draw_regions(image, [make_result(image, None, region=region)], labels=False)
    assert picture.getpixel((100, 100)) == region_color(0)
    red, green, blue = np.asarray(picture)[100, 300]
    assert red > 150 > green and blue < 150
    assert picture.getpixel((200, 300)) == picture.getpixel((300, 350)) == region_color(0)
    assert picture.getpixel((200, 350)) == (128, 128, 128)
    plain = draw_regions(image, [make_result(image, None, region=region)], labels=False, prompts=False)
    assert plain.tobytes() == image.tobytes()


def test_boxes_far_outside_cost_nothing() -> None:
    image = make_image()
    region = {"box": [-1e9, 100, 1e9, 200]}
    difference = changed(image, draw_regions(image, [make_result(image, None, region=region)], labels=False))
    assert difference[100].all() and difference[200].all() and not difference[150].any()


def test_the_distance_to_the_edge_is_signed_and_exact() -> None:
    mask = np.ones((5, 7), dtype=bool)
    distance = _edge_distance(mask, 3)
    assert distance.shape == (5 + 8, 7 + 8)
    assert distance[6, 4:11].tolist() == [-0.5, -1.5, -2.5, -2.5, -2.5, -1.5, -0.5]
    assert distance[6, :4].tolist() == [3.5, 2.5, 1.5, 0.5]
    assert distance[3, 3] == pytest.approx(np.sqrt(2) - 0.5)
