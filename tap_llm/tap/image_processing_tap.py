"""Image processor of TAP: resize to the canvas, pad, normalise; and masks back to the photo."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

# Logits brought to full resolution at a time, in bytes: bounds memory, never changes results.
_UPSCALE_BYTES = 256 * 2**20


class TapImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of [`TapImageProcessor`]: those of Transformers, nothing more."""


def resized_size(height: int, width: int, target: int) -> tuple[int, int]:
    """Size of an image on a square canvas of side `target`.

    The shorter side is scaled to `target`, unless the longer one would then, rounded, exceed it; then the longer
    side is. So the longest side ends at `target`, and small images are scaled up. Sides never leave [1, target].

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        target: side of the canvas, in pixels.

    Returns:
        (height, width) after the resize.
    """
    scale = resize_factor(height, width, target)
    resized_height, resized_width = (min(max(int(side * scale + 0.5), 1), target) for side in (height, width))
    return resized_height, resized_width


def resize_factor(height: int, width: int, target: int) -> float:
    """Factor from pixels of the image to pixels of the canvas, the same for both axes; see [`resized_size`]."""
    scale = target / min(height, width)
    if round(scale * max(height, width)) > target:
        scale = target / max(height, width)
    return scale


class TapImageProcessor(PilBackend):
    """Prepares images for TAP.

    Pillow resizes even where torchvision is installed: TAP's weights were made with Pillow's antialiased bilinear
    filter on 8-bit pixels, and other filters change the result.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"longest_edge": 1024}
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    do_pad = True
    valid_kwargs = TapImageProcessorKwargs
    model_input_names = ["pixel_values", "original_sizes", "resized_sizes"]

    def __init__(self, **kwargs: Unpack[TapImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """(C, H, W) -> (C, h, w) with the longest side at `size.longest_edge`; see [`resized_size`].

        Raises:
            ValueError: `size` has no `longest_edge`.
        """
        if not size.longest_edge:
            raise ValueError(f"TAP resizes by the longest edge: size must be {{'longest_edge': side}}, got {size}")
        height, width = resized_size(image.shape[-2], image.shape[-1], size.longest_edge)
        return super().resize(image, SizeDict(height=height, width=width), resample=resample)

    def _pad_canvas(self, image: np.ndarray, side: int, image_mean: Any, rescale_factor: float) -> np.ndarray:
        """(C, h, w) -> (C, side, side), filled with the mean colour cut to 8 bits, as TAP was trained."""
        mean = np.broadcast_to(np.asarray(image_mean, dtype=np.float64), (image.shape[0],))
        colour = np.floor(mean / rescale_factor + 1e-6).astype(image.dtype)
        canvas = np.empty((image.shape[0], side, side), dtype=image.dtype)
        canvas[:] = colour[:, None, None]
        canvas[:, : image.shape[1], : image.shape[2]] = image
        return canvas

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        do_pad: bool | None,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Channels-first images to a batch; see [`TapImageProcessor.preprocess`] for the keys."""
        pixel_values, original_sizes, resized_sizes = [], [], []
        for image in images:
            original_sizes.append(image.shape[-2:])
            if do_resize:
                image = self.resize(image, size, resample)
            resized_sizes.append(image.shape[-2:])
            if do_pad:
                image = self._pad_canvas(image, size.longest_edge, image_mean, rescale_factor)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            pixel_values.append(image)
        data = {
            "pixel_values": pixel_values,
            "original_sizes": np.array(original_sizes, dtype=np.int64).reshape(-1, 2),
            "resized_sizes": np.array(resized_sizes, dtype=np.int64).reshape(-1, 2),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def post_process_masks(
        self,
        pred_masks: Tensor,
        original_sizes: Tensor,
        resized_sizes: Tensor,
        region_image_index: Tensor | None = None,
        slots: Tensor | None = None,
        mask_threshold: float = 0.0,
        binarize: bool = True,
    ) -> list[Tensor]:
        """Low-resolution logits to masks of the photos: upscale to the canvas, cut the padding off, resize, threshold.

        Args:
            pred_masks: (N, 4, 4G, 4G) logits.
            original_sizes: (B, 2) heights and widths of the photos.
            resized_sizes: (B, 2) heights and widths on the canvas.
            region_image_index: (N,) image of each row; may be left out for one image, or one region per image.
            slots: (N,) slot to keep of each row; all four if None.
            mask_threshold: logit above which a pixel is inside.
            binarize: return bool masks; logits otherwise.

        Returns:
            N tensors, (H, W) with `slots` and (4, H, W) without; bool, or float32 logits.

        Raises:
            ValueError: the rows cannot be assigned to images.
        """
        rows, images = len(pred_masks), len(original_sizes)
        if region_image_index is None and images not in (1, rows):
            raise ValueError(f"{rows} regions on {images} images: give region_image_index")
        if region_image_index is None:
            owners = [0] * rows if images == 1 else list(range(rows))
        else:
            owners = region_image_index.tolist()
        if slots is not None:
            pred_masks = pred_masks[torch.arange(rows, device=pred_masks.device), slots.to(pred_masks.device)][:, None]
        masks: list[Tensor] = [pred_masks] * rows
        originals, resized = _pairs(original_sizes), _pairs(resized_sizes)
        for image in sorted(set(owners)):
            on_image = [row for row in range(rows) if owners[row] == image]
            pixels = max(originals[image][0] * originals[image][1], canvas_side(self) ** 2)
            step = max(1, _UPSCALE_BYTES // (4 * pixels * pred_masks.shape[1]))
            for start in range(0, len(on_image), step):
                picked = on_image[start : start + step]
                logits = self._to_photo(pred_masks[picked].float(), originals[image], resized[image])
                result = logits > mask_threshold if binarize else logits
                for row, mask in zip(picked, result, strict=True):
                    masks[row] = mask if slots is None else mask[0]
        return masks

    def _to_photo(self, logits: Tensor, original: tuple[int, int], resized: tuple[int, int]) -> Tensor:
        """(n, K, 4G, 4G) float32 -> (n, K, H, W), through the canvas."""
        side = canvas_side(self)
        canvas = interpolate(logits, (side, side), mode="bilinear", align_corners=False)
        cropped = canvas[..., : resized[0], : resized[1]]
        return interpolate(cropped, original, mode="bilinear", align_corners=False)


def _pairs(sizes: Any) -> list[tuple[int, int]]:
    """(B, 2) tensor or nested list -> list of (height, width)."""
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(int(height), int(width)) for height, width in rows]


def canvas_side(image_processor: TapImageProcessor) -> int:
    """Side of the square canvas, in pixels."""
    size = image_processor.size
    return int(size["longest_edge"] if isinstance(size, dict) else size.longest_edge)


__all__ = ["TapImageProcessor", "canvas_side", "resize_factor", "resized_size"]
