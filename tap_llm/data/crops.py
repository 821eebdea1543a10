"""Regions as a CLIP image tower sees them: one crop each, one embedding each.

The published TAP leaves the crop open; this is the one that fits what is known (arXiv:2312.09128, section 3, its
pre-training targets): the tight box of the mask, padded to a square, the mean colour wherever the mask is not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from ..concepts import ConceptSpace
from ..errors import InputError
from ..masks import BoolArray, mask_to_box
from ..regions import check_box
from .broken import with_place
from .samples import RegionSample

Colour = tuple[float, float, float]

CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
_PROBED_VALUES = 64  # values per weight tensor that tell models apart


@dataclass(frozen=True)
class CropSettings:
    """What an image tower expects.

    Args:
        size: side of its square input in pixels.
        mean: red, green, blue, of pixels in 0..1; also the colour outside the mask.
        std: by which pixels are divided once the mean is taken off.
    """

    size: int = 224
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD

    @classmethod
    def of_tower(cls, model: Any, image_processor: Any = None) -> CropSettings:
        """Settings of a model: from its image processor; without one, the size of its config and CLIP's colours."""
        if image_processor is None:
            return cls(size=int(model.config.vision_config.image_size))
        size = _input_side(image_processor)
        return cls(size, _colour(image_processor.image_mean), _colour(image_processor.image_std))

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour in 0..255: next to nothing once normalised."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue


def _input_side(image_processor: Any) -> int:
    """Side of what leaves an image processor: CLIP crops to `crop_size`, SigLIP resizes to `size`."""
    crops = getattr(image_processor, "do_center_crop", False)
    size = image_processor.crop_size if crops else image_processor.size
    height, width, shortest = (size.get(key) for key in ("height", "width", "shortest_edge"))
    if height != width or not (height or shortest):
        raise InputError(f"the image tower must take square pictures of one size; its image processor says {size}")
    return int(height or shortest)


def _colour(values: Any) -> Colour:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def masked_crop(
    image: Image.Image, mask: ArrayLike, size: int = 224, fill: tuple[int, int, int] = CropSettings().fill
) -> Image.Image:
    """Cut one region out: tight box, centred on a square, other pixels in one colour, resized bicubically.

    Args:
        image: RGB.
        mask: (H, W) of the image, nonzero = inside.
        size: side of the result in pixels.
        fill: red, green, blue in 0..255 of whatever is outside the mask; by default the mean colour of CLIP.

    Returns:
        RGB image, size x size.

    Raises:
        InputError: the mask is empty or has another size than the image.
    """
    inside = np.asarray(mask) != 0
    if inside.shape != (image.height, image.width):
        raise InputError(f"mask {inside.shape} and image {(image.height, image.width)} (height, width) must agree")
    box = mask_to_box(inside)
    if box is None:
        raise InputError("a region without pixels has no crop: its mask is empty")
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    side = max(width, height)
    square = Image.new("RGB", (side, side), fill)
    corner = (side - width) // 2, (side - height) // 2
    square.paste(image.crop((x0, y0, x1, y1)), corner, Image.fromarray(inside[y0:y1, x0:x1]))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def crop_pixels(image: Image.Image, masks: Sequence[ArrayLike] | BoolArray, settings: CropSettings) -> Tensor:
    """[`masked_crop`] of each mask as (M, 3, size, size) uint8: a quarter of what [`masked_crops`] weighs."""
    pixels = np.empty((len(masks), settings.size, settings.size, 3), dtype=np.uint8)
    for row, mask in enumerate(masks):
        pixels[row] = np.asarray(masked_crop(image, mask, settings.size, settings.fill))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def normalise_pixels(pixels: Tensor, settings: CropSettings) -> Tensor:
    """uint8 (M, 3, h, w) -> float32 of the same shape and device, normalised as the tower expects."""
    mean, std = (torch.tensor(colour, device=pixels.device)[:, None, None] for colour in (settings.mean, settings.std))
    return (pixels.float() / 255 - mean) / std


def masked_crops(
    image: Image.Image, masks: Sequence[ArrayLike] | BoolArray, settings: CropSettings | None = None
) -> Tensor:
    """Crops of all regions of an image, ready for the tower.

    Args:
        image: RGB.
        masks: M masks (H, W) of the image, or an array (M, H, W).
        settings: by default those of CLIP: 224 pixels.

    Returns:
        (M, 3, size, size) float32, normalised.

    Raises:
        InputError: see [`masked_crop`].
    """
    settings = settings or CropSettings()
    return normalise_pixels(crop_pixels(image, masks, settings), settings)


@dataclass
class SampleCrops:
    """Crops of a sample's regions.

    Attributes:
        pixels: (M, 3, size, size) uint8, of the M regions that have a crop.
        has_crop: (N,) bool, which of the N regions those are.
        problem: why the sample cannot be used and has no crops; empty where it can.
    """

    pixels: Tensor
    has_crop: Tensor
    problem: str = ""


class CropReader(Dataset[SampleCrops]):
    """Crops of the samples of a data set, picklable for the workers of a `DataLoader`.

    A region is cut out by its mask, else by its box; one of points alone has no crop. A broken sample gives no
    crops and says why.
    """

    def __init__(self, samples: Sequence[RegionSample], settings: CropSettings) -> None:
        self.samples = samples
        self.settings = settings

    def __getitem__(self, index: int) -> SampleCrops:
        """Crops of sample `index`; never raises for what is wrong with the sample's data."""
        number = 0
        try:
            sample = self.samples[index]
            number = len(sample.regions)
            image = sample.load_image()
            masks, has_crop = _region_masks(sample)
            return SampleCrops(crop_pixels(image, masks, self.settings), torch.from_numpy(has_crop))
        except (InputError, OSError, LookupError, TypeError, AttributeError) as error:  # records break in many ways
            side = self.settings.size
            nothing = torch.empty((0, 3, side, side), dtype=torch.uint8)
            return SampleCrops(nothing, torch.zeros(number, dtype=torch.bool), with_place(self.samples, index, error))


def _region_masks(sample: RegionSample) -> tuple[list[BoolArray], BoolArray]:
    """Masks (H, W) of the regions that have a mask or box, and which (N,) those are."""
    height, width = sample.image_size()
    drawn = iter(sample.masks())
    masks: list[BoolArray] = []
    has_crop = sample.has_mask
    for index in range(len(sample.regions)):
        box = sample.regions[index].get("box")
        if has_crop[index]:
            masks.append(next(drawn))
        elif box is not None:
            masks.append(_filled_box(box, height, width))
            has_crop[index] = True
    return masks, has_crop


def _filled_box(box: Any, height: int, width: int) -> BoolArray:
    """(H, W) mask of the pixels that a box touches."""
    x0, y0, x1, y1 = check_box(box, height, width)
    mask = np.zeros((height, width), dtype=bool)
    mask[max(0, math.floor(y0)) : math.ceil(y1), max(0, math.floor(x0)) : math.ceil(x1)] = True
    return mask


def concept_log_targets(embeds: Tensor, concepts: ConceptSpace) -> Tensor:
    """Log probabilities of the concepts: log_softmax(normalize(v) @ W).

    Args:
        embeds: (N, E) image embeddings of any length and dtype.
        concepts: K concepts of the text encoder that belongs to the image tower.

    Returns:
        (N, K) float32.

    Raises:
        InputError: the concepts are of another width.
    """
    return concepts.logits(embeds).log_softmax(dim=-1)


class ConceptTeacher:
    """The image tower of a CLIP model as the teacher of concepts; the published TAP had EVA02-CLIP-E/14+.

    Args:
        model: a Transformers model with `get_image_features` (CLIP, SigLIP, ...).
        image_processor: its image processor, for size, mean and std; None takes CLIP's colours.
        concepts: for [`ConceptTeacher.log_targets`]; embeddings need none.

    Raises:
        InputError: another kind of model.
    """

    def __init__(self, model: Any, image_processor: Any = None, concepts: ConceptSpace | None = None) -> None:
        if not hasattr(model, "get_image_features"):
            raise InputError(f"a {type(model).__name__} has no image features: the teacher must be a CLIP-like model")
        self.model = model.eval()
        self.concepts = concepts
        self.settings = CropSettings.of_tower(model, image_processor)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        concepts: ConceptSpace | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> ConceptTeacher:
        """Load a teacher from a folder or hub id, whose weights must be safetensors.

        Raises:
            InputError: there is no such model, or it cannot be used.
        """
        from transformers import AutoModel

        load: Any = AutoModel.from_pretrained
        try:
            model = load(str(source), dtype=dtype, use_safetensors=True, trust_remote_code=False)
        except Exception as error:  # damaged files surface as nearly any exception type
            reason = " ".join(str(error).split())
            raise InputError(f"the teacher {source} cannot be loaded: {type(error).__name__}: {reason}") from error
        return cls(model.to(device), _load_image_processor(source), concepts)

    @cached_property
    def width(self) -> int:
        """Width E of its embeddings."""
        side = self.settings.size
        return self._features(torch.zeros((1, 3, side, side), dtype=torch.uint8)).shape[-1]

    @cached_property
    def fingerprint(self) -> str:
        """Tells teachers apart: a hash of the crop settings and of values taken from all weights."""
        activation = getattr(getattr(self.model.config, "vision_config", None), "hidden_act", None)
        digest = hashlib.sha256(repr((self.settings, activation)).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.detach().flatten()
            places = (
                torch.linspace(0, max(len(values) - 1, 0), _PROBED_VALUES).round().long().clamp(max=len(values) - 1)
            )
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(values[places.to(values.device)].double().cpu().numpy().tobytes() if len(values) else b"")
        return digest.hexdigest()[:16]

    @property
    def name(self) -> str:
        """For messages: class, origin and dtype."""
        origin = getattr(self.model, "name_or_path", "") or "built in memory"
        return f"{type(self.model).__name__} {origin} ({str(self.model.dtype).removeprefix('torch.')})"

    @torch.no_grad()
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Unit image embeddings of crops.

        Args:
            pixels: (M, 3, size, size) uint8, as of `crop_pixels`.

        Returns:
            (M, E) float32 on the model's device.

        Raises:
            InputError: embeddings that are no numbers, as of damaged weights or too small a dtype.
        """
        if not len(pixels):
            return torch.zeros((0, self.width), device=self.model.device)
        features = self._features(pixels)
        if not torch.isfinite(features).all():
            raise InputError(f"{self.name} gives embeddings with NaN or infinite values; try dtype float32")
        return normalize(features, dim=-1)

    def embed_stream(self, chunks: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
        """`embed_pixels` of chunks of any length, `batch_size` crops at a time whatever chunk they come from."""
        waiting: list[Tensor] = []
        for chunk in chunks:
            waiting.append(chunk)
            if sum(map(len, waiting)) >= batch_size:
                crops = torch.cat(waiting)
                full = len(crops) // batch_size * batch_size
                yield from map(self.embed_pixels, crops[:full].split(batch_size))
                waiting = [crops[full:].clone()]
        if sum(map(len, waiting)):
            yield self.embed_pixels(torch.cat(waiting))

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        inputs = normalise_pixels(pixels.to(self.model.device), self.settings).to(self.model.dtype)
        features = self.model.get_image_features(pixel_values=inputs)
        features = features if isinstance(features, Tensor) else features.pooler_output
        return features.float()

    def embed_regions(self, image: Image.Image, masks: Sequence[BoolArray] | BoolArray) -> Tensor:
        """Unit embeddings (M, E) of the M regions of an RGB image; see `masked_crop` for the masks and errors."""
        return self.embed_pixels(crop_pixels(image, masks, self.settings))

    def log_targets(self, image: Image.Image, masks: Sequence[BoolArray] | BoolArray) -> Tensor:
        """Log probabilities (M, K) of the concepts for the M regions of an RGB image, float32.

        Raises:
            InputError: the teacher has no concepts, or they are of another width; see also `masked_crop`.
        """
        if self.concepts is None:
            raise InputError("this teacher has no concepts: pass a ConceptSpace")
        return concept_log_targets(self.embed_regions(image, masks), self.concepts)


def _load_image_processor(source: str | Path) -> Any:
    """The image processor of a model; None where it has none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(str(source), backend="pil", trust_remote_code=False)
    except (OSError, ValueError):
        return None
