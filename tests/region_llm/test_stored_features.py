"""Conversations whose pictures were seen before: the processor takes stored features in place of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tap_llm import InputError, TapProcessor
from tap_llm.region_llm.features import RegionFeatures

Join = Callable[..., Any]
TENSORS = ("pixel_values", "input_points", "input_labels", "region_image_index", "resized_sizes")
BOXES = [[[3, 4, 20, 25], [10, 10, 40, 40], [0, 0, 5, 40]], [[2, 2, 20, 29]]]


def talk(*regions: int) -> list[dict[str, Any]]:
    """A dialogue that speaks of regions in this order, each twice."""
    parts = [{"type": "region", "index": index} for index in (*regions, *regions)]
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? "}, *parts]},
        {"role": "assistant", "content": "a red square"},
    ]


TALKS = [talk(2, 0), talk(0)]  # the first leaves a region out


def store(model: Any, processor: Any, picture: Image.Image, boxes: list[list[int]]) -> RegionFeatures:
    inputs = TapProcessor(processor.image_processor)([picture], [[{"box": box} for box in boxes]])
    return model.extract_features(**{name: inputs[name] for name in TENSORS})


@pytest.mark.parametrize("projector", ["lite", "base", "full"])
def test_stored_features_give_the_logits_of_images(projector: str, join: Join, pictures: list[Image.Image]) -> None:
    model, processor = join("llama", projector)
    regions = [[{"box": box} for box in boxes] for boxes in BOXES]
    options = {"return_labels": True, "allow_unused_regions": True}
    seen = processor(TALKS, images=[[picture] for picture in pictures[:2]], regions=regions, **options)
    features = [store(model, processor, picture, boxes) for picture, boxes in zip(pictures, BOXES, strict=False)]
    stored = processor(TALKS, region_features=features, **options)
    assert "pixel_values" not in stored and len(stored["region_features"]) == 3
    assert torch.equal(stored["input_ids"], seen["input_ids"]) and torch.equal(stored["labels"], seen["labels"])
    with torch.no_grad():
        torch.testing.assert_close(model(**stored).logits, model(**seen).logits, atol=1e-5, rtol=1e-5)


def test_features_and_images_exclude_each_other(join: Join, pictures: list[Image.Image]) -> None:
    model, processor = join("llama", "lite")
    features = [store(model, processor, pictures[0], BOXES[0])]
    with pytest.raises(InputError, match="either region_features, or images and regions"):
        processor(TALKS[:1], images=[pictures[:1]], region_features=features)


def test_a_part_beyond_the_stored_regions(join: Join, pictures: list[Image.Image]) -> None:
    model, processor = join("llama", "lite")
    features = [store(model, processor, pictures[0], BOXES[0])]
    with pytest.raises(InputError, match="region part 7 has no region: 3 given"):
        processor([talk(7)], region_features=features)


def test_stored_features_without_a_region(join: Join, pictures: list[Image.Image]) -> None:
    """Of a picture that no one speaks of: nothing is put in."""
    model, processor = join("llama", "base")
    features = store(model, processor, pictures[0], BOXES[0])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello"}]}]
    stored = processor([messages], region_features=[features], allow_unused_regions=True)
    assert len(stored["region_features"]) == 0
    bare = model.model.language_model(input_ids=stored["input_ids"], attention_mask=stored["attention_mask"])
    assert torch.equal(model(**stored).logits, bare.logits)
