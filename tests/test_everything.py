"""Everything mode on a model that segments by colour, so that the right answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tap_llm.encoded import encode_image, tight_masks
from tap_llm.errors import InputError
from tap_llm.everything import (
    EverythingConfig,
    _layer_grid,
    crop_boxes,
    holds_point,
    point_grid,
    segment_everything,
    stability_scores,
    touches_crop_edge,
)
from tap_llm.masks import mask_to_box
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.processing_tap import TapProcessor

CANVAS, CELL = 128, 4
OBJECTS = [(8, 8, 40, 32), (56, 16, 72, 80), (16, 48, 48, 88)]  # xyxy in a picture of 128 x 96
QUICK = {"points_per_side": 16}


class ColourTap:
    """Stands in for TAP: the mask of a point is what has its colour. Slot 3 scores best but is unstable."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(mask_decoder_config=SimpleNamespace(hidden_size=4, semantic_embed_dim=3))

    def __init__(self, least_cells: int = 1) -> None:
        self.least_cells = least_cells  # smaller masks get a low score, as small objects do
        self.encoded, self.rows = [], []

    def get_image_embeddings(self, pixel_values):
        self.encoded.append(tuple(pixel_values.shape))
        return pixel_values

    def __call__(self, input_points, input_labels, image_embeddings):
        assert input_labels.tolist() == [[1, 4]] * len(input_points)
        self.rows.append(len(input_points))
        picture = image_embeddings[0]
        x, y = input_points[:, 0].round().long().clamp(0, CANVAS - 1).unbind(1)
        colour = picture[:, y, x].T  # (N, 3)
        cells = picture[:, CELL // 2 :: CELL, CELL // 2 :: CELL]
        same = (cells[None] - colour[:, :, None, None]).abs().sum(1) < 0.05
        logits = torch.where(same, 10.0, -10.0)
        scores = torch.tensor([0.5, 0.95, 0.9, 0.99]).repeat(len(x), 1)
        scores[same.sum((1, 2)) < self.least_cells] = 0.1
        slots = torch.arange(4.0).repeat(len(x), 1)
        return SimpleNamespace(
            pred_masks=torch.stack([-logits, logits, logits, logits / 20], dim=1),
            iou_scores=scores,
            semantic_tokens=torch.cat([slots[..., None], colour[:, None].expand(-1, 4, -1)], dim=2),
            semantic_embeds=colour[:, None].expand(-1, 4, -1),
        )


@pytest.fixture(scope="module")
def processor():
    return TapProcessor(TapImageProcessor(size={"longest_edge": CANVAS}))


def picture(objects=OBJECTS, size=(128, 96), scale=1):
    pixels = np.full((size[1], size[0], 3), 230, dtype=np.uint8)
    for index, (x0, y0, x1, y1) in enumerate(objects):
        pixels[y0:y1, x0:x1] = [(200, 0, 0), (0, 180, 0), (0, 0, 220), (90, 90, 0)][index]
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def truth(objects=OBJECTS, size=(128, 96), scale=1):
    masks = np.zeros((len(objects) + 1, size[1], size[0]), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks[1:], objects, strict=True):
        mask[y0:y1, x0:x1] = True
    masks[0] = ~masks[1:].any(0)
    return masks.repeat(scale, 1).repeat(scale, 2)


def matches(found, expected, least=0.9):
    """Index of the expected mask that each found mask covers; fails where there is none."""
    pairs = []
    for mask in found:
        ious = [(mask & other).sum() / (mask | other).sum() for other in expected]
        assert max(ious) > least, ious
        pairs.append(int(np.argmax(ious)))
    return pairs


def same_masks(first, second):
    pairs = zip(first, second, strict=True)
    return all(a.box == b.box and np.array_equal(a.pixels, b.pixels) for a, b in pairs)


def test_finds_each_object_once_and_the_background(processor):
    result = segment_everything(ColourTap(), processor, picture(), EverythingConfig(**QUICK))
    masks = [mask.full(96, 128) for mask in result.masks]
    assert sorted(matches(masks, truth())) == [0, 1, 2, 3]
    for mask, tight, region in zip(masks, result.masks, result.regions, strict=True):
        assert list(tight.box) == mask_to_box(mask) and mask.sum() == tight.pixels.sum()
        (x, y), labels = region["points"][0], region["labels"]
        assert mask[round(y), round(x)] and labels == [1]


def test_unstable_masks_are_dropped_and_tokens_are_those_of_the_masks_slot(processor):
    stable = segment_everything(ColourTap(), processor, picture(), EverythingConfig(**QUICK))
    assert stable.semantic_tokens[:, 0].tolist() == [1.0] * 4  # slot 3 scores 0.99 but is unstable; 2 is a duplicate
    assert stable.iou_scores == pytest.approx([0.95] * 4)
    free = EverythingConfig(**QUICK, stability_threshold=0)
    unstable = segment_everything(ColourTap(), processor, picture(), free)
    assert unstable.semantic_tokens[:, 0].tolist() == [3.0] * 4
    assert torch.equal(stable.semantic_tokens[:, 1:], stable.semantic_embeds)


def test_embeddings_follow_their_masks(processor):
    image = picture()
    result = segment_everything(ColourTap(), processor, image, EverythingConfig(**QUICK))
    colours = encode_image(ColourTap(), processor, image).image_embeddings[0]
    for region, embed in zip(result.regions, result.semantic_embeds, strict=True):
        x, y = (round(value) for value in region["points"][0])
        assert torch.allclose(embed, colours[:, y, x])


@pytest.mark.parametrize(("setting", "expected"), [({"pred_iou_threshold": 0.96}, 0), ({"min_area": 1000}, 3)])
def test_filters(processor, setting, expected):
    result = segment_everything(ColourTap(), processor, picture(), EverythingConfig(**QUICK, **setting))
    assert len(result.regions) == expected
    assert len(result.masks) == len(result.iou_scores) == expected
    assert (result.semantic_tokens.shape, result.semantic_embeds.shape) == ((expected, 4), (expected, 3))


def test_highest_predicted_iou_comes_first(processor):
    class Graded(ColourTap):
        def __call__(self, **inputs):
            out = super().__call__(**inputs)
            out.iou_scores = out.iou_scores + out.semantic_embeds @ torch.tensor([0.01, 0.005, 0.0])
            return out

    scores = segment_everything(Graded(), processor, picture(), EverythingConfig(**QUICK)).iou_scores
    assert len(set(scores)) == 4 and (np.diff(scores) < 0).all()


def test_work_is_bounded_and_batches_change_nothing(processor):
    one, many = ColourTap(), ColourTap()
    results = [
        segment_everything(model, processor, picture(), EverythingConfig(**QUICK, points_per_batch=size))
        for model, size in ((one, 7), (many, 1000))
    ]
    assert max(one.rows) == 7 and sum(one.rows) == 256 and many.rows == [256]
    assert len(one.encoded) == len(many.encoded) == 1
    assert same_masks(results[0].masks, results[1].masks)
    assert results[0].regions == results[1].regions


def test_an_encoded_picture_is_not_encoded_again(processor):
    model = ColourTap()
    encoded = encode_image(model, processor, picture())
    again = segment_everything(model, processor, encoded, EverythingConfig(**QUICK))
    assert len(model.encoded) == 1 and len(again.regions) == 4


def test_crops_find_small_objects_and_drop_what_they_cut(processor):
    objects = [*OBJECTS, (100, 60, 106, 66)]  # 6 x 6 pixels of 128: one or two cells of the whole picture
    expected = truth(objects, scale=5)
    config = EverythingConfig(points_per_side=32)
    coarse = segment_everything(ColourTap(least_cells=6), processor, picture(objects, scale=5), config)
    assert sorted(matches([mask.full(480, 640) for mask in coarse.masks], expected, 0.8)) == [0, 1, 2, 3]
    model = ColourTap(least_cells=6)
    fine = segment_everything(
        model, processor, picture(objects, scale=5), EverythingConfig(points_per_side=32, crop_layers=1)
    )
    assert len(model.encoded) == 5 and sum(model.rows) == 32**2 + 4 * 16**2
    masks = [mask.full(480, 640) for mask in fine.masks]
    assert sorted(matches(masks, expected, 0.6)) == [0, 1, 2, 3, 4]
    for mask, region in zip(masks, fine.regions, strict=True):
        x, y = region["points"][0]
        assert mask[round(y), round(x)]


@pytest.mark.parametrize("size", [(1, 1), (8, 200), (200, 8)])
def test_odd_sizes(processor, size):
    result = segment_everything(ColourTap(), processor, Image.new("RGB", size), EverythingConfig(crop_layers=1))
    assert len(result.masks) == 1 and result.masks[0].full(size[1], size[0]).mean() > 0.6


def test_point_grid_is_the_centres_of_a_tiling():
    assert point_grid(2, 10, 20).tolist() == [[4.5, 2], [14.5, 2], [4.5, 7], [14.5, 7]]
    assert point_grid(32, 1, 3).tolist() == [[0, 0], [1, 0], [2, 0]]


@pytest.mark.parametrize(("height", "width"), [(480, 640), (37, 1000), (5, 3)])
def test_crops_cover_the_picture_and_overlap(height, width):
    crops = crop_boxes(height, width, 2, 0.25)
    assert crops[0] == (0, (0, 0, width, height))
    for layer in (1, 2):
        boxes = [box for level, box in crops if level == layer]
        assert len(boxes) <= 4**layer
        covered = np.zeros((height, width), dtype=int)
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            covered[y0:y1, x0:x1] += 1
        assert covered.min() == 1 and covered.max() > 1
    assert len({(x1 - x0, y1 - y0) for level, (x0, y0, x1, y1) in crops if level == 1}) == 1


def test_two_crops_share_the_asked_overlap():
    (x0, _, x1, _), (x2, _, x3, _) = (box for level, box in crop_boxes(100, 1000, 1, 0.25)[:3] if level)
    assert (x0, x3) == (0, 1000) and (x1 - x2) / (x1 - x0) == pytest.approx(0.25, abs=0.01)


def test_stability_is_the_iou_of_two_cuts():
    logits = torch.full((3, 2, 5), -9.0)
    logits[0, 0] = 9.0  # five cells, whatever the cut
    logits[1, 0] = torch.tensor([2.0, 2.0, 0.5, 0.0, -0.5])  # two cells above 1, five above -1
    assert stability_scores(logits, 1.0).tolist() == pytest.approx([1.0, 0.4, 0.0])


def test_only_inner_crop_borders_cut():
    boxes = np.array([[0, 0, 50, 50], [50, 20, 100, 60], [99, 0, 100, 1], [30, 30, 60, 60], [30, 30, 40, 100]], float)
    crop = (0, 0, 100, 100)  # top left of 200 x 100: only its right border is inside
    assert touches_crop_edge(boxes, crop, 100, 200).tolist() == [False, True, True, False, False]
    assert not touches_crop_edge(boxes, crop, 100, 100).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 3}, 'unknown setting "points"; known: points_per_side'),
        ({"points_per_batch": 0}, "points_per_batch must be at least 1, got 0"),
        ({"stability_threshold": 2}, "stability_threshold must be between 0 and 1"),
        ({"crop_overlap": 1}, "crop_overlap"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        EverythingConfig.from_options(options)


def test_settings_come_in_three_forms():
    assert EverythingConfig.from_options(True) == EverythingConfig()
    assert EverythingConfig.from_options({"min_area": 5}).min_area == 5
    recommended = {"min_area": 7, "pred_iou_threshold": 0.5}
    mixed = EverythingConfig.from_options({"min_area": 5}, recommended)
    assert (mixed.min_area, mixed.pred_iou_threshold) == (5, 0.5)
    config = EverythingConfig(points_per_side=2)
    assert EverythingConfig.from_options(config) is config


@pytest.mark.parametrize("size", [(96, 128), (301, 77), (40, 500), (9, 7), (1, 1), (3, 90)])
def test_tight_masks_are_those_of_the_processor(processor, size):
    generator = torch.Generator().manual_seed(sum(size))
    coarse = torch.randn(12, 1, 5, 5, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, 32, mode="bicubic")[:, 0] - torch.arange(12.0)[:, None, None] / 6
    encoded = encode_image(ColourTap(), processor, Image.new("RGB", size[::-1]))
    sizes = (torch.tensor([size]), torch.tensor([encoded.resized_size]))
    exact = processor.post_process_masks(logits[:, None], *sizes, binarize=False)
    for mask, full in zip(tight_masks(processor, logits, encoded), exact, strict=True):
        expected, found = full[0].numpy(), mask.full(*size)
        clear = np.abs(expected) > 1e-4  # rounding decides the rest
        assert np.array_equal(found[clear], expected[clear] > 0)
        assert mask_to_box(found) == (None if mask.box is None else list(mask.box))


def test_exact_suppression_looks_inside_boxes(processor):
    """Two triangles share a box and half of it: boxes alone cannot tell them apart, masks can."""

    class Triangles(ColourTap):
        def __call__(self, **inputs):
            out = super().__call__(**inputs)
            upper = torch.ones(32, 32).triu()
            near = upper.triu(2)
            near[16, 16] = 1  # the point
            shapes = torch.stack([upper, upper.T, upper, near]) * 20 - 10
            out.pred_masks = shapes.repeat(len(out.iou_scores), 1, 1, 1)
            return out

    config = {"points_per_side": 1, "box_nms_threshold": 1}
    found = segment_everything(Triangles(), processor, Image.new("RGB", (128, 128)), EverythingConfig(**config))
    assert found.semantic_tokens[:, 0].tolist() == [3.0, 1.0]  # slot 2 is near slot 3; slot 1 is the other triangle
    nothing_dropped = EverythingConfig(**config, mask_nms_threshold=1)
    assert len(segment_everything(Triangles(), processor, Image.new("RGB", (128, 128)), nothing_dropped).masks) == 3


def test_a_mask_must_cover_its_own_point() -> None:
    logits = torch.full((2, 4, 4), -1.0)
    logits[:, 3, 1] = 1.0  # row 3, column 1
    points = torch.tensor([[5.0, 15.0], [15.0, 5.0]])
    assert holds_point(logits, points, side=16).tolist() == [True, False]


def test_several_grid_densities_are_joined() -> None:
    config = EverythingConfig(points_per_side=(4, 2), crop_layers=1)
    assert len(_layer_grid(config, 0, 100, 100)) == 16 + 4
    assert len(_layer_grid(config, 1, 100, 100)) == 4 + 1
    with pytest.raises(InputError, match="points_per_side"):
        EverythingConfig(points_per_side=())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": "ab"}, "points_per_side must be a whole number, or several, got 'ab'"),
        ({"points_per_side": 2.5}, "points_per_side must be a whole number, or several, got 2.5"),
        ({"points_per_side": [8, "9"]}, "points_per_side must be a whole number"),
        ({"points_per_batch": 2.5}, "points_per_batch must be a whole number"),
        ({"crop_layers": "1"}, "crop_layers must be a whole number"),
        ({"pred_iou_threshold": "high"}, "pred_iou_threshold must be a number"),
        ({"stability_threshold": None}, "stability_threshold must be a number"),
        ("yes", "everything must be True, a dict"),
        (1, "everything must be True, a dict"),
    ],
)
def test_settings_of_a_wrong_type(options, message):
    with pytest.raises(InputError, match=message):
        EverythingConfig.from_options(options)


def test_numpy_numbers_and_lists_are_settings_too():
    config = EverythingConfig(
        points_per_side=[8, np.int64(4)], pred_iou_threshold=np.float32(0.5), min_area=np.int32(3)
    )
    assert config.densities == (8, 4)
