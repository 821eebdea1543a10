"""Many regions of several pictures at once: each picture is encoded once, prompts are decoded in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tap_llm.data.readers.base import box_from_xywh
from tap_llm.encoded import EncodedImage, TightMask, tight_masks
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle
from tap_llm.pipelines import RegionPipeline
from tap_llm.regions import Region, parse_regions, prompts_to_rows
from tap_llm.tap.image_processing_tap import canvas_side, resize_factor
from tap_llm.tap.outputs import take_slots

from .overlap import Mask


@dataclass(eq=False)
class Answer:
    """What the model says about one region, in the slot that the prompt is routed to: 0 for a box.

    Attributes:
        size: (height, width) of the picture.
        tight: the mask.
        iou: predicted.
        embed: (E,) semantic embedding, float32 on the CPU.
    """

    size: tuple[int, int]
    tight: TightMask
    iou: float
    embed: Tensor

    @property
    def mask(self) -> Mask:
        """(H, W)."""
        return self.tight.full(*self.size)

    def rle(self) -> dict[str, object]:
        """The mask as compressed COCO RLE."""
        return encode_rle(self.mask)


class EncodedPictures:
    """Pictures after the image encoder, which sees all of them at once.

    Args:
        pipe: model under test.
        images: RGB; at least one.
        batch_size: regions decoded at once.
    """

    def __init__(self, pipe: RegionPipeline, images: Sequence[Image.Image], batch_size: int = 64) -> None:
        self.pipe, self.batch_size = pipe, batch_size
        inputs = pipe.processor(list(images))
        pixels = inputs["pixel_values"].to(pipe.model.device, pipe.model.dtype)
        with torch.no_grad():
            embeddings = pipe.model.get_image_embeddings(pixels)
        sizes = [(height, width) for height, width in inputs["resized_sizes"].tolist()]
        self.pictures = [
            EncodedImage(image, embedding[None], (image.height, image.width), size)
            for image, embedding, size in zip(images, embeddings, sizes, strict=True)
        ]

    def ask(self, regions: Sequence[Sequence[Region]]) -> list[list[Answer]]:
        """Answers to the regions of each picture, in order.

        Args:
            regions: one list per picture, may be empty.

        Raises:
            InputError: a region that cannot be used, or answers that are not finite.
        """
        answers: list[list[Answer]] = [[] for _ in self.pictures]
        points, labels, owners = self._rows(regions)
        chunks = (rows.split(self.batch_size) for rows in (points, labels, owners))
        for chunk in zip(*chunks, strict=True):
            for owner, answer in self._decode(*chunk):
                answers[owner].append(answer)
        return answers

    def _rows(self, regions: Sequence[Sequence[Region]]) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts (N, n, 2) in canvas pixels, labels (N, n), and the picture (N,) of each."""
        sizes = [picture.original_size for picture in self.pictures]
        prompts, owners = parse_regions(list(regions), sizes)
        points, labels = prompts_to_rows(prompts)
        side = canvas_side(self.pipe.processor.image_processor)
        factors = np.array([resize_factor(*size, side) for size in sizes], dtype=np.float32)
        points = points * factors[owners][:, None, None]
        return torch.from_numpy(points), torch.from_numpy(labels), torch.from_numpy(owners)

    @torch.no_grad()
    def _decode(self, points: Tensor, labels: Tensor, owners: Tensor) -> Iterator[tuple[int, Answer]]:
        """Answers with the number of their picture. Rows lie picture by picture."""
        if not len(owners):
            return
        used, index = owners.unique_consecutive(return_inverse=True)
        device = self.pipe.model.device
        out = self.pipe.model(
            input_points=points.to(device),
            input_labels=labels.to(device),
            region_image_index=index.to(device),
            image_embeddings=torch.cat([self.pictures[i].image_embeddings for i in used.tolist()]),
        )
        logits, scores, embeds = (
            take_slots(rows, out.slots) for rows in (out.pred_masks, out.iou_scores, out.semantic_embeds)
        )
        if not torch.isfinite(scores).all():
            raise InputError("the model answers with NaN or infinite values; try dtype float32")
        columns = zip(self._masks(logits, owners), scores.tolist(), embeds.float().cpu(), strict=True)
        for owner, (tight, score, embed) in zip(owners.tolist(), columns, strict=True):
            yield owner, Answer(self.pictures[owner].original_size, tight, score, embed)

    def _masks(self, logits: Tensor, owners: Tensor) -> Iterator[TightMask]:
        start = 0
        for owner, rows in groupby(owners.tolist()):
            stop = start + len(list(rows))
            yield from tight_masks(self.pipe.processor, logits[start:stop], self.pictures[owner])
            start = stop


def answer_boxes(
    pipe: RegionPipeline, images: Sequence[Image.Image], boxes: Sequence[Sequence[Any]], batch_size: int = 64
) -> list[list[Answer]]:
    """Answers to boxes (x, y, w, h) of each picture, in order; without any box nothing is encoded.

    Raises:
        InputError: as `EncodedPictures.ask`.
    """
    prompts = [[{"box": box_from_xywh(box)} for box in of_one] for of_one in boxes]
    if not any(prompts):
        return [[] for _ in images]
    return EncodedPictures(pipe, images, batch_size).ask(prompts)
