"""The processor: photos and regions to what the network saw in training, and the network's answers back."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerBase

from tap_llm import InputError, MissingFileError, TapConfig, TapImageProcessor, TapProcessor
from tap_llm.tap.image_processing_tap import resize_factor, resized_size
from tap_llm.tap.tokenization import load_sentencepiece_tokenizer

SIDE = 64
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, 0 to 255
PAD_COLOUR = (123, 116, 103)
BOX, POINT = {"box": [2, 3, 30, 20]}, {"points": [[9, 8]]}
TWO_POINTS = {"points": [[9, 8], [4.5, 2.25]], "labels": [1, 0]}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    rng = random.Random(0)
    words = ("red", "green", "small", "bus", "dog", "table", "kite", "door")
    lines = [" ".join(["a", *rng.choices(words, k=4)]) for _ in range(500)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, model_type="bpe", vocab_size=330,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_sentencepiece_tokenizer(path)


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerBase) -> TapProcessor:
    return TapProcessor(TapImageProcessor(size={"longest_edge": SIDE}), tokenizer)


@pytest.fixture
def silent() -> TapProcessor:
    """A processor without tokenizer."""
    return TapProcessor(TapImageProcessor(size={"longest_edge": SIDE}))


# Keys, shapes, dtypes


def test_one_image_with_a_flat_list(processor: TapProcessor) -> None:
    features = processor(picture(40, 50), [BOX, POINT, TWO_POINTS])
    assert {name: (tuple(value.shape), value.dtype) for name, value in features.items()} == {
        "pixel_values": ((1, 3, SIDE, SIDE), torch.float32),
        "original_sizes": ((1, 2), torch.int64),
        "resized_sizes": ((1, 2), torch.int64),
        "input_points": ((3, 3, 2), torch.float32),
        "input_labels": ((3, 3), torch.int64),
        "region_image_index": ((3,), torch.int64),
    }
    assert features["original_sizes"].tolist() == [[40, 50]]  # (height, width)
    assert features["resized_sizes"].tolist() == [[51, 64]]
    assert features["input_labels"].tolist() == [[2, 3, 4], [1, 4, 4], [1, 0, 4]]
    assert features["region_image_index"].tolist() == [0, 0, 0]
    assert set(features) == set(processor.model_input_names)


def test_a_ragged_batch(processor: TapProcessor) -> None:
    pictures = [picture(40, 50), picture(90, 30), picture(64, 64)]
    features = processor(pictures, [[BOX, POINT], [], [TWO_POINTS]])
    assert features["pixel_values"].shape == (3, 3, SIDE, SIDE)
    assert features["original_sizes"].tolist() == [[40, 50], [90, 30], [64, 64]]
    assert features["resized_sizes"].tolist() == [[51, 64], [64, 21], [64, 64]]
    assert features["region_image_index"].tolist() == [0, 0, 2]
    for row, (image, regions) in enumerate([(0, [BOX]), (0, [POINT]), (2, [TWO_POINTS])]):
        alone = processor(pictures[image], regions)
        length = alone["input_labels"].shape[1]
        assert torch.equal(features["input_points"][row, :length], alone["input_points"][0])
        assert torch.equal(features["input_labels"][row, :length], alone["input_labels"][0])
        assert torch.equal(features["pixel_values"][image], alone["pixel_values"][0])


def test_nested_lists_for_one_image(processor: TapProcessor) -> None:
    flat, nested = processor(picture(40, 50), [BOX, POINT]), processor([picture(40, 50)], [[BOX, POINT]])
    assert flat.keys() == nested.keys()
    assert all(torch.equal(flat[name], nested[name]) for name in flat)


@pytest.mark.parametrize("regions", [[[], []], [[], [BOX]]])
def test_images_without_regions(processor: TapProcessor, regions: list[Any]) -> None:
    features = processor([picture(40, 50), picture(40, 50)], regions)
    rows = sum(map(len, regions))
    assert features["input_points"].shape == (rows, 2, 2)
    assert features["input_labels"].shape == (rows, 2)
    assert features["region_image_index"].tolist() == [1] * rows


def test_images_alone(processor: TapProcessor) -> None:
    assert set(processor(picture(40, 50))) == {"pixel_values", "original_sizes", "resized_sizes"}


def test_every_kind_of_image(processor: TapProcessor, tmp_path: Path) -> None:
    pixels = picture(40, 50)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [pixels, Image.fromarray(pixels), tmp_path / "photo.png", str(tmp_path / "photo.png"), channels_first,
             channels_first.float() / 255]  # fmt: skip
    features = processor(kinds)
    for values in features["pixel_values"]:
        assert torch.equal(values, features["pixel_values"][0])
    assert features["original_sizes"].tolist() == [[40, 50]] * len(kinds)


@pytest.mark.parametrize(("return_tensors", "kind"), [("np", np.ndarray), (None, np.ndarray), ("pt", torch.Tensor)])
def test_kinds_of_tensors(processor: TapProcessor, return_tensors: str | None, kind: type) -> None:
    features = processor(picture(40, 50), [BOX], return_tensors=return_tensors)
    expected = processor(picture(40, 50), [BOX])
    for name, value in features.items():
        assert isinstance(value, kind), name
        np.testing.assert_array_equal(np.asarray(value), expected[name].numpy())


def test_a_photo_turned_by_its_camera(processor: TapProcessor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    stored = picture(40, 60)
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    features = processor(tmp_path / "photo.png", [{"points": [[39, 59]]}])
    assert features["original_sizes"].tolist() == [[60, 40]]
    upright = processor(np.rot90(stored, -1).copy())
    assert torch.equal(features["pixel_values"], upright["pixel_values"])


# Resize, padding, normalisation


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1264, 1190), (1024, 964)),
        ((480, 640), (768, 1024)),
        ((100, 333), (308, 1024)),
        ((3000, 3001), (1024, 1024)),  # keeps the factor of the shorter side
        ((2048, 2049), (1024, 1024)),
        ((2049, 2048), (1024, 1024)),
        ((1024, 1024), (1024, 1024)),
        ((1, 1), (1024, 1024)),
        ((1, 10000), (1, 1024)),
        ((10000, 1), (1024, 1)),
    ],
)
def test_resize_rule(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, 1024) == expected


def test_resize_factor() -> None:
    assert resize_factor(480, 640, 1024) == 1024 / 640
    assert resize_factor(3000, 3001, 1024) == 1024 / 3000  # the longer side still rounds to 1024
    assert resize_factor(2000, 2001, 1024) == 1024 / 2001  # here it would be 1025


def test_the_canvas_is_never_exceeded() -> None:
    for height in (1, 2, 7, 1023, 1024, 1025, 2047, 2048, 2049):
        for width in [*range(1, 60), *range(1000, 1050), *range(2040, 2060), *range(2990, 3010)]:
            sizes = resized_size(height, width, 1024)
            assert min(sizes) >= 1 and max(sizes) == 1024, (height, width)


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (129, 128), (200, 130)])
def test_extreme_photos_fit_the_canvas(processor: TapProcessor, size: tuple[int, int]) -> None:
    features = processor(picture(*size))
    assert features["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert features["resized_sizes"].tolist() == [list(resized_size(*size, SIDE))]
    assert features["pixel_values"].isfinite().all()


@pytest.mark.parametrize("size", [(40, 50), (100, 30), (64, 64), (30, 200)])
def test_pixels_against_pillow_and_numpy(processor: TapProcessor, size: tuple[int, int]) -> None:
    pixels = picture(*size)
    height, width = resized_size(*size, SIDE)
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    canvas[:] = PAD_COLOUR
    canvas[:height, :width] = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    expected = ((canvas - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)
    ours = processor(pixels)["pixel_values"][0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_the_padding_is_nearly_but_not_quite_zero(processor: TapProcessor) -> None:
    values = processor(picture(10, 40))["pixel_values"][0]
    np.testing.assert_allclose(values[:, -1, -1], [-0.0116, -0.0049, -0.0092], atol=1e-4)


@pytest.mark.parametrize("option", ["size", "do_resize", "do_pad"])
def test_the_canvas_cannot_be_changed_by_a_call(processor: TapProcessor, option: str) -> None:
    value = {"longest_edge": 32} if option == "size" else False
    for options in ({option: value}, {"images_kwargs": {option: value}}):
        with pytest.raises(InputError, match=f"{option}.*set it on the image processor"):
            processor(picture(40, 50), **options)


# Regions


@pytest.mark.parametrize("size", [(40, 50), (1264, 1190), (3000, 3001)])
def test_coordinates_share_one_float32_factor(tokenizer: PreTrainedTokenizerBase, size: tuple[int, int]) -> None:
    processor = TapProcessor(TapImageProcessor(), tokenizer)
    factor = np.float32(resize_factor(*size, 1024))
    features = processor(picture(*size), [{"box": [3, 4.5, 17, 33]}, {"points": [[33.3, 7]]}])
    points = np.array([[[3, 4.5], [17, 33]], [[33.3, 7], [0, 0]]], dtype=np.float32)
    assert np.array_equal(features["input_points"].numpy(), points * factor)


def test_each_image_has_its_own_factor(processor: TapProcessor) -> None:
    features = processor([picture(32, 32), picture(128, 64)], [[POINT], [POINT]])
    assert features["input_points"][:, 0].tolist() == [[18, 16], [4.5, 4]]


@pytest.mark.parametrize("mask_prompt", ["box_and_points", "points", None])
def test_mask_regions(processor: TapProcessor, mask_prompt: Any) -> None:
    mask = np.zeros((32, 32), dtype=bool)
    mask[10:20, 4:14] = True
    features = processor(picture(32, 32), [{"mask": mask}], mask_prompt=mask_prompt)
    points, labels = features["input_points"][0] / 2, features["input_labels"][0].tolist()
    if mask_prompt == "points":
        assert set(labels[:-1]) == {1} and labels[-1] == 4 and len(labels) <= 9
    else:
        assert labels[:2] == [2, 3] and set(labels[2:]) == {1} and len(labels) <= 10
        assert points[:2].tolist() == [[4, 10], [14, 20]]  # right and bottom edges are exclusive
    inside = points[torch.tensor(labels) == 1].long()
    assert mask[inside[:, 1], inside[:, 0]].all()


@pytest.mark.parametrize(
    ("images", "regions", "message"),
    [
        (1, [{"box": [9, 9, 3, 20]}], "region 0: box"),
        (2, [[BOX], [{"points": [[70, 3]]}]], "image 1, region 0"),
        (2, [BOX, POINT], "one per image"),
        (2, [[BOX]], "1 lists for 2 images"),
    ],
)
def test_wrong_regions(processor: TapProcessor, images: int, regions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor([picture(40, 50)] * images, regions)


# Captions for training


def test_text_becomes_labels(processor: TapProcessor, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["a red bus", "a dog", "a small green door"]
    features = processor([picture(40, 50)] * 2, [[BOX, POINT], [POINT]], text=texts)
    pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    longest = max(map(len, pieces)) + 2
    expected = [[1, *ids, 2] + [-100] * (longest - len(ids) - 2) for ids in pieces]
    assert features["labels"].tolist() == expected
    assert features["labels"].dtype == torch.int64
    assert processor.batch_decode([ids[: len(p) + 2] for ids, p in zip(expected, pieces, strict=True)]) == texts


def test_long_captions_are_cut_and_end_all_the_same(
    processor: TapProcessor, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "a red bus " * 30
    pieces = tokenizer(text, add_special_tokens=False).input_ids
    assert len(pieces) > 37
    assert processor(picture(40, 50), [BOX], text=[text])["labels"].tolist() == [[1, *pieces[:37], 2]]


@pytest.mark.parametrize("text", [["a dog"], ["a dog"] * 3, []])
def test_one_caption_per_region(processor: TapProcessor, text: list[str]) -> None:
    with pytest.raises(InputError, match=f"{len(text)} captions for 2 regions"):
        processor(picture(40, 50), [BOX, POINT], text=text)


def test_a_bare_string_is_no_list_of_captions(processor: TapProcessor) -> None:
    with pytest.raises(InputError, match="list with one caption per region"):
        processor(picture(40, 50), [BOX, POINT], text="ab")  # two letters are not two captions


def test_text_without_regions(processor: TapProcessor) -> None:
    with pytest.raises(InputError, match="one caption per region"):
        processor(picture(40, 50), text=["a dog"])


def test_no_captions_for_no_regions(processor: TapProcessor) -> None:
    assert processor(picture(40, 50), [], text=[])["labels"].shape[0] == 0


# Decoding


def test_decoding_keeps_the_words_only(processor: TapProcessor, tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer("a red bus", add_special_tokens=False).input_ids
    other = tokenizer("door", add_special_tokens=False).input_ids
    pad = tokenizer.pad_token_id
    rows = [
        [1, *words, 2],
        [1, *words, 2, pad, pad],
        [1, *words, 2, *other, 2],
        [1, *words, pad],
        [*words],
        [1, 2],
    ]
    longest = max(map(len, rows))
    assert processor.batch_decode(rows) == ["a red bus"] * 5 + [""]
    tensor = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    assert processor.batch_decode(tensor) == ["a red bus"] * 5 + [""]
    assert processor.decode(tensor[1]) == "a red bus"
    assert processor.batch_decode(torch.zeros(0, 1, dtype=torch.long)) == []


# Masks


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 4, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(0))


SIZES = torch.tensor([[40, 50], [90, 30], [33, 33]])
RESIZED = torch.tensor([[51, 64], [64, 21], [64, 64]])


def by_hand(logits: torch.Tensor, image: int) -> torch.Tensor:
    """(4, h, w) logits on the photo: to the canvas, cut, to the photo."""
    canvas = interpolate(logits[None], (SIDE, SIDE), mode="bilinear", align_corners=False)
    height, width = RESIZED[image].tolist()
    photo = interpolate(canvas[..., :height, :width], SIZES[image].tolist(), mode="bilinear", align_corners=False)
    return photo[0]


def test_masks_in_two_steps(processor: TapProcessor, logits: torch.Tensor) -> None:
    index = torch.tensor([2, 0, 2])
    masks = processor.post_process_masks(logits, SIZES, RESIZED, index)
    raw = processor.post_process_masks(logits, SIZES, RESIZED, index, binarize=False)
    assert isinstance(masks, list) and len(masks) == 3
    for row, image in enumerate(index.tolist()):
        expected = by_hand(logits[row], image)
        assert masks[row].dtype == torch.bool
        assert masks[row].shape == (4, *SIZES[image].tolist())
        torch.testing.assert_close(raw[row], expected)
        assert torch.equal(masks[row], expected > 0)
    assert processor.post_process_masks(logits, SIZES, RESIZED, index, mask_threshold=0.5)[0].sum() < masks[0].sum()


def test_masks_of_the_routed_slots(processor: TapProcessor, logits: torch.Tensor) -> None:
    slots = torch.tensor([0, 3, 2])
    index = torch.tensor([1, 1, 0])
    everything = processor.post_process_masks(logits, SIZES, RESIZED, index)
    routed = processor.post_process_masks(logits, SIZES, RESIZED, index, slots)
    for row, slot in enumerate(slots.tolist()):
        assert routed[row].shape == tuple(SIZES[index[row]].tolist())
        assert torch.equal(routed[row], everything[row][slot])


def test_the_image_index_of_masks_may_be_left_out(processor: TapProcessor, logits: torch.Tensor) -> None:
    def same(ours: list[torch.Tensor], index: list[int]) -> bool:
        expected = processor.post_process_masks(logits, SIZES, RESIZED, torch.tensor(index))
        return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    assert same(processor.post_process_masks(logits, SIZES, RESIZED), [0, 1, 2])
    assert same(processor.post_process_masks(logits, SIZES[1:2], RESIZED[1:2]), [1, 1, 1])
    with pytest.raises(ValueError, match="3 regions on 2 images: give region_image_index"):
        processor.post_process_masks(logits, SIZES[:2], RESIZED[:2])


def test_many_masks_and_none(processor: TapProcessor, logits: torch.Tensor) -> None:
    many = logits.repeat(20, 1, 1, 1)
    index = torch.arange(60) % 2
    masks = processor.post_process_masks(many, SIZES, RESIZED, index)
    assert len(masks) == 60
    for row in (0, 15, 16, 17, 59):
        assert torch.equal(masks[row], by_hand(many[row], row % 2) > 0)
    assert processor.post_process_masks(logits[:0], SIZES[:1], RESIZED[:1]) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_of_half_precision_logits(processor: TapProcessor, logits: torch.Tensor, dtype: torch.dtype) -> None:
    masks = processor.post_process_masks(logits.to(dtype), SIZES, RESIZED, binarize=False)
    torch.testing.assert_close(masks[0], by_hand(logits[0].to(dtype).float(), 0))


# Saving, and life without a tokenizer


def test_save_and_load(processor: TapProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    expected = processor(picture(40, 50), [BOX], text=["a red bus"])
    for loader in (TapProcessor, AutoProcessor):
        restored = loader.from_pretrained(tmp_path)
        assert type(restored) is TapProcessor
        features = restored(picture(40, 50), [BOX], text=["a red bus"])
        assert all(torch.equal(features[name], expected[name]) for name in expected)
        assert restored.batch_decode(features["labels"]) == ["a red bus"]


def test_save_and_load_without_tokenizer(silent: TapProcessor, tmp_path: Path) -> None:
    silent.save_pretrained(tmp_path)
    TapConfig.from_variant("tiny").save_pretrained(tmp_path)  # as in a model's folder
    expected = silent(picture(40, 50), [BOX])
    for loader in (TapProcessor, AutoProcessor):
        restored = loader.from_pretrained(tmp_path)
        assert type(restored) is TapProcessor
        assert restored.tokenizer is None
        features = restored(picture(40, 50), [BOX])
        assert all(torch.equal(features[name], expected[name]) for name in expected)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is TapImageProcessor


def test_without_tokenizer_masks_work_and_captions_say_what_is_missing(
    silent: TapProcessor, logits: torch.Tensor
) -> None:
    features = silent(picture(40, 50), [BOX, POINT, POINT])
    masks = silent.post_process_masks(logits, features["original_sizes"], features["resized_sizes"])
    assert [mask.shape for mask in masks] == [(4, 40, 50)] * 3
    attempts = {
        "batch_decode": lambda: silent.batch_decode(torch.tensor([[1, 2]])),
        "decode": lambda: silent.decode([1, 2]),
        "text": lambda: silent(picture(40, 50), [BOX], text=["a dog"]),
    }
    for attempt in attempts.values():
        with pytest.raises(MissingFileError, match=r"tokenizer\.model.*--tokenizer"):
            attempt()
