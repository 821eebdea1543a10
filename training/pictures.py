"""Predictions as pictures, for TensorBoard."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.outputs import take_slots
from tap_llm.tap.processing_tap import TapProcessor
from tap_llm.visualize import draw_regions

from .prompts import Prompts

_WANTED, _PREDICTED = torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0.95, 0.2, 0.9])


@torch.no_grad()
def draw_masks(
    objective: Any, batch: dict[str, Tensor], image_processor: TapImageProcessor, images: int = 8
) -> dict[str, NDArray[np.uint8]]:
    """The first region of each image: outline of the true mask (green) and the predicted mask (pink).

    Args:
        objective: the unwrapped trainee, with a TAP `model`.
        batch: of the recipe's data set.
        image_processor: made the batch's pixels.
        images: how many images to show, side by side.

    Returns:
        {title: (H, W, 3) uint8}.
    """
    training = objective.training
    objective.eval()
    device = next(objective.parameters()).device
    keys = ("pixel_values", "input_points", "input_labels", "region_image_index")
    output = objective.model(**{key: batch[key].to(device) for key in keys}, return_dict=True)
    objective.train(training)
    predicted = take_slots(output.pred_masks, output.slots).float().cpu()
    pixels = _pixels(batch["pixel_values"][:images], image_processor)
    owners = batch["region_image_index"].tolist()
    tiles = []
    for image in range(len(pixels)):
        row = owners.index(image)
        shown = _tint(pixels[image], _scaled(predicted[row], pixels[image]) > 0, _PREDICTED)
        tiles.append(_outline(shown, _scaled(batch["masks"][row].float() - 127.5, shown) > 0))
    strip = (torch.cat(tiles, dim=2) * 255).byte()
    return {"regions": strip.permute(1, 2, 0).numpy()}


@torch.no_grad()
def draw_captions(objective: Any, batch: dict[str, Tensor], processor: TapProcessor, images: int = 4) -> dict[str, Any]:
    """Regions prompted by their boxes, with the captions that are generated for them.

    Args:
        objective: the unwrapped trainee, with a TAP `tap`.
        batch: of the recipe's data set.
        processor: made the batch's pixels; decodes captions.
        images: how many images to show, side by side.

    Returns:
        {title: (H, W, 3) uint8}.
    """
    tap, training = objective.tap, objective.training
    objective.eval()
    rows = batch["region_image_index"] < images
    prompts = Prompts.from_boxes(batch["boxes"][rows].to(tap.device))
    output = tap.model(
        pixel_values=batch["pixel_values"][:images].to(tap.device), input_points=prompts.points,
        input_labels=prompts.labels, region_image_index=batch["region_image_index"][rows].to(tap.device),
    )  # fmt: skip
    captions = processor.batch_decode(tap.generate(semantic_tokens=take_slots(output.semantic_tokens, output.slots)))
    objective.train(training)
    masks = take_slots(output.pred_masks, output.slots).float().cpu()
    owners, tiles = batch["region_image_index"][rows].tolist(), []
    for image, pixels in enumerate(_pixels(batch["pixel_values"][:images], processor.image_processor)):
        results: list[dict[str, Any]] = [
            {"mask": (_scaled(masks[row], pixels) > 0).numpy(), "caption": captions[row]}
            for row, owner in enumerate(owners)
            if owner == image
        ]
        shown = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).resize((512, 512))
        enlarged = [{**r, "mask": np.asarray(Image.fromarray(r["mask"]).resize((512, 512)))} for r in results]
        tiles.append(np.asarray(draw_regions(shown, enlarged).crop((0, 0, 512, 512))))
    return {"captions": np.concatenate(tiles, axis=1)}


def _pixels(pixel_values: Tensor, image_processor: TapImageProcessor) -> Tensor:
    """(B, 3, S, S) normalised -> colours in [0, 1], on the CPU."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    return (pixel_values.cpu() * std + mean).clamp(0, 1)


def _scaled(mask: Tensor, picture: Tensor) -> Tensor:
    return F.interpolate(mask[None, None], picture.shape[1:], mode="bilinear")[0, 0]


def _tint(picture: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    return torch.where(mask, 0.5 * picture + 0.5 * colour[:, None, None], picture)


def _outline(picture: Tensor, mask: Tensor) -> Tensor:
    thick = F.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0
    return torch.where(thick & ~mask, _WANTED[:, None, None], picture)
