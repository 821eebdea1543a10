"""Regions as a teacher sees them: crops against hand-made ones, and the formula of its targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_clip import SIDE, SMALL, clip_processor, make_clip, make_sample, make_space
from torch import Tensor
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from tap_llm.data.crops import (
    CLIP_MEAN,
    CLIP_STD,
    ConceptTeacher,
    CropSettings,
    concept_log_targets,
    masked_crop,
    masked_crops,
)
from tap_llm.errors import InputError


@pytest.fixture(scope="module")
def teacher() -> ConceptTeacher:
    return ConceptTeacher(make_clip(), clip_processor())


# Crops


def test_crop_is_the_tight_box_on_a_square_of_the_mean_colour() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    mask = np.zeros((12, 20), dtype=bool)
    mask[3:7, 5:13] = True
    mask[4, 6] = False
    crop = np.asarray(masked_crop(Image.fromarray(image), mask, size=8, fill=(1, 2, 3)))  # 8 wide: not resized
    expected = np.full((8, 8, 3), (1, 2, 3), dtype=np.uint8)
    expected[2:6] = image[3:7, 5:13]
    expected[3, 1] = 1, 2, 3
    assert np.array_equal(crop, expected)


@pytest.mark.parametrize("size", [5, 40])
def test_crop_is_resized_bicubically(size: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    expected = image.resize((size, size), Image.Resampling.BICUBIC)
    assert masked_crop(image, np.ones((9, 9)), size).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("mask", "message"),
    [(np.zeros((4, 6)), "empty"), (np.ones((6, 4)), r"\(6, 4\).*\(4, 6\)")],
)
def test_crops_that_cannot_be(mask: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        masked_crop(Image.new("RGB", (6, 4)), mask)


def test_crops_are_normalised_and_the_outside_is_nearly_zero() -> None:
    image, masks = Image.new("RGB", (30, 20), (255, 0, 51)), np.zeros((2, 20, 30), dtype=bool)
    masks[0, 5:7, 4:14] = masks[1, 2, 3] = True
    crops = masked_crops(image, masks)
    assert crops.shape == (2, 3, 224, 224) and crops.dtype == torch.float32
    assert crops[0, :, :40].abs().max() < 0.01  # half a grey level
    inside = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(crops[1], inside[:, None, None].expand(3, 224, 224), rtol=1e-5, atol=1e-5)
    assert masked_crops(image, masks[:0]).shape == (0, 3, 224, 224)


def test_settings_come_from_the_image_processor() -> None:
    siglip = SiglipImageProcessorPil(size={"height": 48, "width": 48})
    assert CropSettings.of_tower(None, siglip) == CropSettings(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert CropSettings.of_tower(None, siglip).fill == (128, 128, 128)
    assert CropSettings.of_tower(None, clip_processor()) == CropSettings(SIDE)
    assert CropSettings.of_tower(make_clip()) == CropSettings(SIDE, CLIP_MEAN, CLIP_STD)
    with pytest.raises(InputError, match="square"):
        CropSettings.of_tower(None, SiglipImageProcessorPil(size={"height": 48, "width": 32}))


# Teachers


def test_targets_follow_the_formula(teacher: ConceptTeacher) -> None:
    sample, space = make_sample(2), make_space()
    image, masks = sample.load_image(), sample.masks()
    with torch.no_grad():
        pixels = clip_processor()([masked_crop(image, mask, SIDE) for mask in masks], return_tensors="pt")
        features = teacher.model.get_image_features(**pixels).pooler_output
    embeds = teacher.embed_regions(image, masks)
    torch.testing.assert_close(embeds, features / features.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    log_targets = ConceptTeacher(teacher.model, clip_processor(), space).log_targets(image, masks)
    torch.testing.assert_close(log_targets, torch.log_softmax(embeds @ space.weights, dim=-1))
    torch.testing.assert_close(log_targets.exp().sum(1), torch.ones(2))
    torch.testing.assert_close(concept_log_targets(7 * embeds, space), log_targets)


def test_any_model_with_image_features_can_teach() -> None:
    torch.manual_seed(0)
    vision, text = SMALL | {"image_size": SIDE, "patch_size": 8}, SMALL | {"vocab_size": 11}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).to(torch.bfloat16)
    siglip = ConceptTeacher(model, SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}))
    embeds = siglip.embed_regions(make_sample(2).load_image(), make_sample(2).masks())
    assert siglip.width == 16 and embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(2))

    class PlainTensors:  # as other libraries and earlier versions return them
        config, device, dtype = model.config, torch.device("cpu"), torch.float32

        def eval(self) -> PlainTensors:
            return self

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.mean(dim=(2, 3))

    assert ConceptTeacher(PlainTensors()).width == 3


def test_teachers_that_cannot_teach(teacher: ConceptTeacher) -> None:
    image, masks = make_sample(2).load_image(), make_sample(2).masks()
    with pytest.raises(InputError, match="Linear has no image features"):
        ConceptTeacher(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="no concepts"):
        teacher.log_targets(image, masks)
    with pytest.raises(InputError, match=r"width 5.*width 24"):
        ConceptTeacher(teacher.model, clip_processor(), make_space(5)).log_targets(image, masks)
    broken = make_clip()
    broken.visual_projection.weight.data[:] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        ConceptTeacher(broken).embed_regions(image, masks)


def test_loading_and_telling_teachers_apart(teacher: ConceptTeacher, tmp_path: Path) -> None:
    teacher.model.save_pretrained(tmp_path / "clip")
    without = ConceptTeacher.from_pretrained(tmp_path / "clip")
    assert without.settings == CropSettings(SIDE)
    clip_processor().save_pretrained(tmp_path / "clip")
    loaded = ConceptTeacher.from_pretrained(tmp_path / "clip")
    assert loaded.fingerprint == without.fingerprint == teacher.fingerprint
    assert loaded.name == f"CLIPModel {tmp_path / 'clip'} (float32)"
    others = [
        ConceptTeacher(make_clip(seed=1)),
        ConceptTeacher.from_pretrained(tmp_path / "clip", dtype="bfloat16"),
        ConceptTeacher(teacher.model, SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})),
    ]
    assert len({other.fingerprint for other in others} | {teacher.fingerprint}) == 4
    with pytest.raises(InputError, match="absent cannot be loaded"):
        ConceptTeacher.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_stream_is_embedded_in_order(teacher: ConceptTeacher, batch_size: int) -> None:
    pixels = torch.randint(0, 256, (9, 3, SIDE, SIDE), dtype=torch.uint8)
    batches = list(teacher.embed_stream(pixels.split([0, 2, 1, 5, 0, 1]), batch_size))
    assert [len(batch) for batch in batches] == [len(part) for part in pixels.split(batch_size)]
    torch.testing.assert_close(torch.cat(batches), teacher.embed_pixels(pixels), rtol=1e-4, atol=1e-5)
    assert list(teacher.embed_stream([pixels[:0]], batch_size)) == []
