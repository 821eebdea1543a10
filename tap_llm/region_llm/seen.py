"""Pictures and regions of a dialogue: each picture is encoded once, each region goes through TAP once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..encoded import EncodedImage, encode_image, prompt_rows
from ..errors import InputError
from ..regions import Region, read_mask
from ..tap.processing_tap import TapProcessor
from .features import RegionFeatures


class SeenRegions:
    """What TAP knows of them, in the order in which they came.

    Args:
        model: a [`TapLlmForConditionalGeneration`].
        processor: its [`TapLlmProcessor`].
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._pictures: list[EncodedImage] = []
        self._picture_features: list[RegionFeatures] = []  # without regions
        self._region_features: list[RegionFeatures] = []  # one region each
        self._owners: list[int] = []

    @property
    def num_images(self) -> int:
        """Pictures so far."""
        return len(self._pictures)

    @property
    def num_regions(self) -> int:
        """Regions so far."""
        return len(self._owners)

    def add_image(self, picture: Image.Image) -> int:
        """Encode an upright RGB picture; returns its number."""
        encoded = encode_image(self.model.model.tap, TapProcessor(self.processor.image_processor), picture)
        self._picture_features.append(self._extract(encoded))
        self._pictures.append(encoded)
        return self.num_images - 1

    def add_region(self, region: Region, image: int | None) -> tuple[Region, int]:
        """Prompt TAP with a region.

        Args:
            region: a region dict.
            image: number of its picture; the last one if None.

        Returns:
            The region, with the mask itself in place of a mask's file, and the number of its picture.

        Raises:
            InputError: there is no such picture, or the region cannot be used on it.
        """
        count = self.num_images
        number = count - 1 if image is None else image
        if not 0 <= number < count:
            way_out = f"images are numbered 0 to {count - 1}" if count else "add an image first"
            raise InputError(f"a region on an image that is not there: {way_out}")
        encoded = self._pictures[number]
        if isinstance(region, Mapping) and isinstance(region.get("mask"), str | Path):
            region = {**region, "mask": read_mask(region["mask"], *encoded.original_size)}
        points, labels = prompt_rows(self.processor, [region], encoded.original_size)
        index = torch.zeros(1, dtype=torch.long)
        rows = self._extract(encoded, input_points=points, input_labels=labels, region_image_index=index)
        self._region_features.append(rows)
        self._owners.append(number)
        return region, number

    def features(self) -> RegionFeatures:
        """Of all pictures and regions; there must be a picture."""
        rows, pictures = [*self._picture_features, *self._region_features], self._picture_features
        return RegionFeatures(
            semantic_tokens=torch.cat([row.semantic_tokens for row in rows]),
            boxes=torch.cat([row.boxes for row in rows]),
            roi=torch.cat([row.roi for row in rows]),
            global_tokens=torch.cat([picture.global_tokens for picture in pictures]),
            region_image_index=torch.tensor(self._owners, dtype=torch.long, device=pictures[0].boxes.device),
        )

    def _extract(self, encoded: EncodedImage, **prompts: Any) -> RegionFeatures:
        sizes = torch.tensor([encoded.resized_size])
        return self.model.extract_features(image_embeddings=encoded.image_embeddings, resized_sizes=sizes, **prompts)


__all__ = ["SeenRegions"]
