"""Batches of pictures and regions answer as the pipeline does, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from eval.overlap import iou
from eval.prompting import EncodedPictures, answer_boxes
from tap_llm.errors import InputError
from tap_llm.masks import decode_rle

SIZES = ((48, 32), (30, 64), (20, 20))
REGIONS = [
    [{"box": [4, 4, 40, 30]}, {"points": [[5, 6], [20, 20], [9, 9]], "labels": [1, 0, 1]}, {"points": [[40, 3]]}],
    [],
    [{"points": [[3, 3]]}, {"box": [0, 0, 20, 20]}],
]


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(4)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_are_those_of_the_pipeline(pipe, images, batch_size):
    answers = EncodedPictures(pipe, images, batch_size).ask(REGIONS)
    assert [len(of_one) for of_one in answers] == [3, 0, 2]
    for image, regions, of_one in zip(images, REGIONS, answers, strict=True):
        for region, answer in zip(regions, of_one, strict=True):
            alone = pipe(image, [region], captions=False)[0]
            assert iou(answer.mask, alone["mask"]) > 0.99 or not alone["mask"].any()
            assert answer.iou == pytest.approx(alone["iou"], abs=1e-3)  # large random weights
            names, _ = pipe.concepts.classify(answer.embed)
            assert names == [alone["concept"]]
            assert (decode_rle(answer.rle()) == answer.mask).all()
            assert answer.mask.shape == (image.height, image.width)


def test_boxes_of_coco(pipe, images):
    answers = answer_boxes(pipe, images, [[[4, 4, 36, 26]], [], []])
    same = EncodedPictures(pipe, images[:1]).ask([[{"box": [4, 4, 40, 30]}]])[0][0]
    assert iou(answers[0][0].mask, same.mask) > 0.99
    assert answers[1:] == [[], []]


def test_nothing_is_encoded_for_no_box(pipe, images, monkeypatch):
    monkeypatch.setattr("eval.prompting.EncodedPictures", None)
    assert answer_boxes(pipe, images, [[], [], []]) == [[], [], []]


def test_bad_region_is_named(pipe, images):
    with pytest.raises(InputError, match="image 2, region 0: box .* lies wholly outside"):
        EncodedPictures(pipe, images).ask([[], [], [{"box": [50, 0, 60, 5]}]])


def test_answers_that_are_not_finite(make_pipe, images):
    broken = make_pipe()
    with torch.no_grad():
        next(broken.model.model.mask_decoder.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        answer_boxes(broken, images[:1], [[[0, 0, 9, 9]]])
