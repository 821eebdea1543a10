"""Features of regions: boxes and samples as shares of the photo, whatever the canvas around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import grid_sample

from tap_llm import RegionFeatures, TapImageProcessor, TapModel, TapProcessor
from tap_llm.region_llm import extract_features
from tap_llm.region_llm.features import grid_cells, sample_bilinear

SIDE, GRID = 64, 8


@pytest.fixture(scope="module")
def processor() -> TapProcessor:
    return TapProcessor(TapImageProcessor(size={"longest_edge": SIDE}))


def extract(tap: TapModel, inputs: Any, **options: Any) -> RegionFeatures:
    names = ("pixel_values", "input_points", "input_labels", "region_image_index", "resized_sizes")
    return extract_features(tap, **{name: inputs[name] for name in names}, roi_grid=2, global_grid=2, **options)


def test_sampling_is_torchs_bilinear_sampling_with_repeated_borders() -> None:
    images, points = torch.randn(2, 5, GRID, GRID), torch.rand(3, 7, 2)
    index = torch.tensor([1, 0, 1])
    expected = grid_sample(images[index], points[:, None] * 2 - 1, padding_mode="border", align_corners=False)
    torch.testing.assert_close(sample_bilinear(images, index, points), expected[:, :, 0].transpose(1, 2))


def test_cells_of_a_box() -> None:
    cells = grid_cells(torch.tensor([[0.5, 0.25, 1.0, 0.5]]), 2)
    expected = torch.tensor([[0.25, 0.125], [0.75, 0.125], [0.25, 0.375], [0.75, 0.375]])
    torch.testing.assert_close(cells[0, :, :2], expected)
    torch.testing.assert_close(cells[0, :, 2:], torch.tensor([[0.5, 0.25]]).expand(4, 2))


def test_boxes_are_shares_of_the_photo(tap: TapModel, processor: TapProcessor) -> None:
    photos = [Image.new("RGB", size) for size in ((60, 30), (20, 50))]
    inputs = processor(photos, [[{"box": [0, 0, 30, 30]}, {"box": [-9, 15, 90, 99]}], [{"box": [5, 10, 15, 40]}]])
    boxes = extract(tap, inputs).boxes
    expected = [[0.25, 0.5, 0.5, 1.0], [0.5, 0.75, 1.0, 0.5], [0.5, 0.5, 0.5, 0.6]]
    torch.testing.assert_close(boxes, torch.tensor(expected), atol=0.02, rtol=0)  # canvas pixels are whole


def test_points_take_the_box_of_their_mask(
    tap: TapModel, processor: TapProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = processor(Image.new("RGB", (60, 30)), [{"points": [[5, 5]]}, {"points": [[30, 20]]}])
    outputs = tap(**inputs)
    outputs.pred_masks = torch.full_like(outputs.pred_masks, -1.0)
    outputs.pred_masks[0, :, 4:12, 8:24] = 1.0  # of 32 cells: rows 1/8 to 3/8 of the canvas, columns 1/4 to 3/4
    monkeypatch.setattr(type(tap), "forward", lambda *_, **__: outputs)
    boxes = extract(tap, inputs).boxes  # the photo fills the upper half of the canvas; the second mask is empty
    torch.testing.assert_close(boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]))


def test_padding_of_the_canvas_is_never_sampled(tap: TapModel) -> None:
    embeddings = torch.full((1, 32, GRID, GRID), torch.nan)
    embeddings[..., : GRID // 2, :] = torch.arange(GRID // 2).float()[:, None].expand(-1, GRID)
    found = extract_features(tap, image_embeddings=embeddings, resized_sizes=torch.tensor([[32, 64]]), global_grid=1)
    rows = found.global_tokens.view(GRID, GRID, 32)[:, 0, 0]
    assert rows[:-1].isfinite().all()  # the last row lies between the photo and the padding
    assert (rows[:-1].diff() > 0).sum() >= GRID - 3


def test_a_square_photo_keeps_its_grid(tap: TapModel) -> None:
    embeddings = torch.randn(2, 32, GRID, GRID)
    tokens = extract_features(tap, image_embeddings=embeddings, global_grid=2).global_tokens
    assert tokens.shape == (2, 4, 16 * 32)
    block = embeddings[1, :, :4, 4:].permute(1, 2, 0).flatten()  # upper right
    torch.testing.assert_close(tokens[1, 1], block, atol=1e-6, rtol=1e-6)


def test_joined_batches_equal_one_batch(tap: TapModel, processor: TapProcessor, pictures: Any) -> None:
    regions = [[{"box": [1, 2, 20, 20]}], [{"points": [[3, 4]]}, {"box": [3, 3, 9, 9]}], []]
    whole = extract(tap, processor(pictures, regions))
    parts = [extract(tap, processor([p], [r])) for p, r in zip(pictures, regions, strict=True)]
    joined = RegionFeatures.cat(parts)
    assert len(joined) == 3 and joined.num_images == 3
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(joined, name), value, atol=1e-4, rtol=1e-4)


def test_moved_features_keep_exact_boxes(tap: TapModel, processor: TapProcessor, pictures: Any) -> None:
    found = extract(tap, processor(pictures[:1], [[{"box": [1, 2, 20, 20]}]]))
    half = found.to(dtype=torch.float16)
    assert half.roi.dtype == half.semantic_tokens.dtype == half.global_tokens.dtype == torch.float16
    assert torch.equal(half.boxes, found.boxes) and half.boxes.dtype == torch.float32


def test_index_may_be_left_out(tap: TapModel, processor: TapProcessor, pictures: Any) -> None:
    inputs = processor(pictures[:2], [[{"box": [1, 2, 20, 20]}]] * 2)
    without = {**inputs, "region_image_index": None}
    assert torch.equal(extract(tap, without).roi, extract(tap, inputs).roi)


def test_exactly_one_source(tap: TapModel) -> None:
    with pytest.raises(ValueError, match="exactly one of pixel_values and image_embeddings"):
        extract_features(tap)
