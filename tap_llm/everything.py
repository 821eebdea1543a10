"""Everything mode: find all regions of a picture from a grid of points.

Each grid point prompts TAP once and yields three candidates (slots 1 to 3, from part to whole). They are filtered
by predicted IoU, stability, their own point (a mask must cover it) and crop borders at low resolution; only the
survivors of box suppression are brought to the size of the picture, and exact mask suppression removes what is left
of duplicates. The recipe is that of SAM's automatic masks (arXiv:2304.02643, appendix B) on TAP's slots
(arXiv:2312.09128). A survivor keeps the semantic token and embedding of its own slot, so names and captions need no
second pass.

Memory: prompts go in batches, and masks of the picture are tight crops. Until box suppression, the good candidates
of a crop are held on the CPU at low resolution in float16: at most 3 per grid point, (4G)^2 cells of 2 bytes each, so
about 400 MB for 32 x 32 points on a canvas of 1024 (G = 64) if every one of them passes; usually a small part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .encoded import Box, EncodedImage, TightMask, cell_boxes, encode_image, prompt_rows, tight_masks
from .errors import InputError
from .masks import BoolArray, FloatArray, IntArray, box_nms
from .regions import Region
from .tap.image_processing_tap import canvas_side, resize_factor

_POINT_SLOTS = slice(1, 4)  # slot 0 answers boxes
_EDGE_TOLERANCE = 0.02  # of a crop's longer side: a mask this near to the border counts as cut by it


@dataclass(frozen=True)
class EverythingConfig:
    """Settings of everything mode; the defaults suit photos."""

    points_per_side: int | tuple[int, ...] = 32  # grid on the whole picture, n x n points; or several densities
    points_per_batch: int = 64  # points decoded at once: bounds memory, does not change results
    pred_iou_threshold: float = 0.88  # candidates with a lower predicted IoU are dropped
    stability_threshold: float = 0.95  # ... and with a lower stability, see `stability_scores`
    stability_offset: float = 1.0  # logits above and below zero between which stability is measured
    box_nms_threshold: float = 0.7  # a box overlapping a better one by more (IoU) is dropped
    mask_nms_threshold: float = 0.7  # the same for masks, exactly, at full resolution
    min_area: int = 0  # masks with fewer pixels of the original picture are dropped
    crop_layers: int = 0  # layer i adds 2^i x 2^i overlapping crops, each encoded on its own: finds small objects
    crop_overlap: float = 1 / 3  # share of its neighbour that a crop overlaps
    crop_points_divisor: int = 2  # points_per_side is divided by this once per layer

    def __post_init__(self) -> None:
        self._check_types()
        _require(len(self.densities) > 0 and min(self.densities) >= 1, "points_per_side", "at least 1", self)
        for name in ("points_per_batch", "crop_points_divisor"):
            _require(getattr(self, name) >= 1, name, "at least 1", self)
        for name in ("min_area", "stability_offset", "crop_layers"):
            _require(getattr(self, name) >= 0, name, "at least 0", self)
        for name in ("stability_threshold", "box_nms_threshold", "mask_nms_threshold"):
            _require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", self)
        _require(0 <= self.crop_overlap < 1, "crop_overlap", "at least 0 and below 1", self)
        _require(self.crop_layers <= 4, "crop_layers", "at most 4 (256 crops)", self)

    def _check_types(self) -> None:
        whole = all(isinstance(n, Integral) for n in self.densities)
        _require(whole, "points_per_side", "a whole number, or several", self)
        kinds = {"int": (Integral, "a whole number"), "float": (Real, "a number")}
        for name, (kind, rule) in ((field.name, kinds[field.type]) for field in fields(self) if field.type in kinds):
            _require(isinstance(getattr(self, name), kind), name, rule, self)

    @property
    def densities(self) -> tuple[int, ...]:
        """Points per side of each grid."""
        given: Any = self.points_per_side
        return tuple(given) if isinstance(given, list | tuple) else (given,)

    @classmethod
    def from_options(
        cls, options: bool | Mapping[str, Any] | EverythingConfig, defaults: Mapping[str, Any] | None = None
    ) -> EverythingConfig:
        """`True` (defaults), a mapping of fields, or a config as it is.

        Args:
            options: the settings.
            defaults: fields that a model recommends (`everything` in its config.json); options win.

        Raises:
            InputError: unknown field, or a value of another type or out of range.
        """
        if isinstance(options, EverythingConfig):
            return options
        if options is not True and not isinstance(options, Mapping):
            raise InputError(f"everything must be True, a dict of settings or an EverythingConfig, got {options!r}")
        values = {**(defaults or {}), **({} if options is True else options)}
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f'everything: unknown setting "{name}"; known: {", ".join(known)}')
        return cls(**values)


def _require(holds: bool, name: str, rule: str, config: EverythingConfig) -> None:
    if not holds:
        raise InputError(f"everything: {name} must be {rule}, got {getattr(config, name)!r}")


@dataclass
class EverythingResult:
    """M regions, highest predicted IoU first.

    Attributes:
        regions: the prompt of each, `{"points": [[x, y]], "labels": [1]}` in pixels of the picture.
        masks: M masks with their boxes; `mask.full(height, width)` gives the (H, W) array.
        iou_scores: M predicted IoUs.
        semantic_tokens: (M, D) of the mask's own slot, on the CPU.
        semantic_embeds: (M, E), likewise.
    """

    regions: list[Region]
    masks: list[TightMask]
    iou_scores: list[float]
    semantic_tokens: Tensor
    semantic_embeds: Tensor


@dataclass
class _Candidates:
    """K candidates of one crop at low resolution, on the CPU; points and boxes in pixels of the crop."""

    points: Tensor  # (K, 2)
    logits: Tensor  # (K, 4G, 4G) float16
    boxes: Tensor  # (K, 4)
    scores: Tensor  # (K,)
    tokens: Tensor
    embeds: Tensor

    def take(self, kept: IntArray) -> _Candidates:
        """Those with these indices."""
        index = torch.from_numpy(kept)
        return _Candidates(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def join(parts: Sequence[_Candidates]) -> _Candidates:
        """All of them, in order."""
        names = [field.name for field in fields(_Candidates)]
        return _Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass
class _Found:
    """One region at full resolution; point and mask in pixels of the whole picture."""

    point: tuple[float, float]
    score: float
    mask: TightMask
    token: Tensor
    embed: Tensor


def point_grid(points_per_side: int, height: int, width: int) -> FloatArray:
    """Centres of an n x n tiling of a picture, row by row, as (n * n, 2) pixel indices x, y.

    A side with fewer pixels than points gets one point per pixel.
    """
    columns, rows = min(points_per_side, width), min(points_per_side, height)
    x = (np.arange(columns) + 0.5) * width / columns - 0.5
    y = (np.arange(rows) + 0.5) * height / rows - 0.5
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _layer_grid(config: EverythingConfig, layer: int, height: int, width: int) -> FloatArray:
    """Points of all densities on a crop of this layer; deeper layers have coarser grids."""
    divisor = config.crop_points_divisor**layer
    return np.concatenate([point_grid(max(1, n // divisor), height, width) for n in config.densities])


def crop_boxes(height: int, width: int, layers: int, overlap: float) -> list[tuple[int, Box]]:
    """(layer, box) of the whole picture, layer 0, and of 2^i x 2^i overlapping crops for each further layer i.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        layers: further layers.
        overlap: share of a crop that its neighbour covers as well.
    """
    crops: list[tuple[int, Box]] = [(0, (0, 0, width, height))]
    for layer in range(1, layers + 1):
        columns, rows = (_spans(side, 2**layer, overlap) for side in (width, height))
        crops += [(layer, (x0, y0, x1, y1)) for y0, y1 in rows for x0, x1 in columns]
    return crops


def _spans(length: int, count: int, overlap: float) -> list[tuple[int, int]]:
    """`count` spans of one size that cover `length`, each sharing `overlap` of itself with the next."""
    size = min(length, math.ceil(length / (count - (count - 1) * overlap)))
    starts = np.linspace(0, length - size, count).round().astype(int)
    return sorted({(int(start), int(start) + size) for start in starts})


def stability_scores(logits: Tensor, offset: float) -> Tensor:
    """IoU of the masks at thresholds +offset and -offset: how little a mask depends on where it is cut.

    Args:
        logits: (N, h, w).
        offset: in logits, >= 0.

    Returns:
        (N,) float32 in [0, 1]; 0 where both masks are empty.
    """
    inner = (logits > offset).sum(dim=(1, 2)).float()
    outer = (logits > -offset).sum(dim=(1, 2)).float()
    return inner / outer.clamp(min=1)


def holds_point(logits: Tensor, points: Tensor, side: int) -> Tensor:
    """Whether a mask covers the point that asked for it; one that does not answers something else.

    Args:
        logits: (N, h, h).
        points: (N, 2) x, y in canvas pixels.
        side: of the canvas, in pixels.

    Returns:
        (N,) bool.
    """
    cells = ((points + 0.5) * (logits.shape[-1] / side)).long().clamp(0, logits.shape[-1] - 1)
    return logits[torch.arange(len(logits), device=logits.device), cells[:, 1], cells[:, 0]] > 0


def touches_crop_edge(boxes: FloatArray, crop: Box, height: int, width: int) -> BoolArray:
    """(N,) whether boxes (N, 4) in pixels of a crop reach a border of it that is not one of the picture."""
    x0, y0, x1, y1 = crop
    tolerance = _EDGE_TOLERANCE * max(x1 - x0, y1 - y0)
    distance = np.abs(boxes - np.array([0, 0, x1 - x0, y1 - y0]))
    inner = np.array([x0 > 0, y0 > 0, x1 < width, y1 < height])
    return ((distance <= tolerance) & inner).any(axis=1)


def segment_everything(
    model: Any,
    processor: Any,
    image: Image.Image | EncodedImage,
    config: EverythingConfig | None = None,
    progress: bool = False,
) -> EverythingResult:
    """Find all regions of one picture.

    Args:
        model: a [`TapModel`] or [`TapForConditionalGeneration`] in eval mode.
        processor: its [`TapProcessor`].
        image: upright RGB picture, or one already encoded; each crop is encoded once.
        config: settings.
        progress: show a progress bar on stderr.

    Returns:
        [`EverythingResult`].
    """
    config = config or EverythingConfig()
    picture = image.image if isinstance(image, EncodedImage) else image
    crops = crop_boxes(picture.height, picture.width, config.crop_layers, config.crop_overlap)
    grids = [_layer_grid(config, layer, y1 - y0, x1 - x0) for layer, (x0, y0, x1, y1) in crops]
    found: list[_Found] = []
    with tqdm(total=sum(map(len, grids)), unit="point", desc="everything", disable=not progress) as bar:
        for (layer, box), grid in zip(crops, grids, strict=True):
            whole = image if layer == 0 and isinstance(image, EncodedImage) else None
            encoded = whole or encode_image(model, processor, picture.crop(box) if layer else picture)
            found += _segment_crop(model, processor, encoded, grid, box, picture, config, bar)
    return _result(_deduplicate(found, config), model.config.mask_decoder_config)


def _segment_crop(
    model: Any,
    processor: Any,
    encoded: EncodedImage,
    grid: FloatArray,
    crop: Box,
    picture: Image.Image,
    config: EverythingConfig,
    bar: Any,
) -> list[_Found]:
    """Regions of one crop, at full resolution."""
    parts = []
    for batch in np.split(grid, range(config.points_per_batch, len(grid), config.points_per_batch)):
        part = _candidates(model, processor, encoded, batch, config)
        cut = touches_crop_edge(part.boxes.numpy(), crop, picture.height, picture.width)
        parts.append(part.take(np.flatnonzero(~cut)))
        bar.update(len(batch))
    together = _Candidates.join(parts)
    kept = together.take(box_nms(together.boxes, together.scores, config.box_nms_threshold))
    return list(_at_full_size(processor, encoded, kept, crop, config.min_area))


@torch.no_grad()
def _candidates(
    model: Any, processor: Any, encoded: EncodedImage, points: FloatArray, config: EverythingConfig
) -> _Candidates:
    """Decode one batch of points and keep the slots that are good and stable."""
    regions = [{"points": [point]} for point in points.tolist()]
    rows, labels = (rows.to(model.device) for rows in prompt_rows(processor, regions, encoded.original_size))
    out = model(input_points=rows, input_labels=labels, image_embeddings=encoded.image_embeddings)
    slots = _POINT_SLOTS.stop - _POINT_SLOTS.start
    scores = out.iou_scores[:, _POINT_SLOTS].flatten()
    picked = torch.nonzero(scores >= config.pred_iou_threshold).flatten()
    logits = out.pred_masks[:, _POINT_SLOTS].flatten(0, 1)[picked].float()
    visible = _without_padding(processor, logits, encoded)
    stable = stability_scores(visible, config.stability_offset) >= config.stability_threshold
    stable &= holds_point(logits, rows[picked // slots, 0], canvas_side(processor.image_processor))
    picked, logits, visible = picked[stable], logits[stable], visible[stable]
    tokens, embeds = (
        per_slot[:, _POINT_SLOTS].flatten(0, 1)[picked].cpu() for per_slot in (out.semantic_tokens, out.semantic_embeds)
    )
    return _Candidates(
        points=torch.from_numpy(points)[picked.cpu() // slots],
        logits=logits.clamp(-3e4, 3e4).half().cpu(),  # half the memory; the zero crossing moves by under 0.1%
        boxes=cell_boxes(visible).double() * _pixels_per_cell(processor, logits, encoded),
        scores=scores[picked].float().cpu(),
        tokens=tokens,
        embeds=embeds,
    )


def _without_padding(processor: Any, logits: Tensor, encoded: EncodedImage) -> Tensor:
    """The part of (K, 4G, 4G) that shows the picture; a cell that is part padding counts as picture."""
    cells_per_pixel = logits.shape[-1] / canvas_side(processor.image_processor)
    height, width = (math.ceil(side * cells_per_pixel) for side in encoded.resized_size)
    return logits[:, :height, :width]


def _pixels_per_cell(processor: Any, logits: Tensor, encoded: EncodedImage) -> float:
    """Side of a low-resolution cell in pixels of the crop."""
    side = canvas_side(processor.image_processor)
    return side / logits.shape[-1] / resize_factor(*encoded.original_size, side)


def _at_full_size(
    processor: Any, encoded: EncodedImage, kept: _Candidates, crop: Box, min_area: int
) -> Iterator[_Found]:
    """Candidates as masks of the whole picture."""
    left, top = crop[:2]
    logits = kept.logits.to(encoded.image_embeddings.device)
    for index, mask in enumerate(tight_masks(processor, logits, encoded)):
        if mask.box is None or np.count_nonzero(mask.pixels) < min_area:
            continue
        x, y = kept.points[index].tolist()
        mask = mask.shifted(left, top)
        score = float(kept.scores[index])
        yield _Found((x + left, y + top), score, mask, kept.tokens[index], kept.embeds[index])


def _deduplicate(found: list[_Found], config: EverythingConfig) -> list[_Found]:
    """Suppression across crops, best first: tight boxes, then masks exactly."""
    boxes = np.array([item.mask.box for item in found], dtype=np.int64).reshape(-1, 4)
    order = box_nms(boxes, [item.score for item in found], config.box_nms_threshold)
    found, boxes = [found[index] for index in order], boxes[order]
    areas = np.array([np.count_nonzero(item.mask.pixels) for item in found])
    kept: list[int] = []
    for index, item in enumerate(found):
        shared = np.minimum(_shared_areas(boxes[index], boxes[kept]), np.minimum(areas[index], areas[kept]))
        likely = shared / (areas[index] + areas[kept] - shared) > config.mask_nms_threshold
        rivals = [found[kept[rival]] for rival in np.flatnonzero(likely)]
        if all(_mask_iou(item.mask, rival.mask) <= config.mask_nms_threshold for rival in rivals):
            kept.append(index)
    return [found[index] for index in kept]


def _shared_areas(box: IntArray, boxes: IntArray) -> IntArray:
    """Pixels that a box (4,) shares with each of (N, 4)."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    return np.clip(high - low, 0, None).prod(axis=1)


def _mask_iou(a: TightMask, b: TightMask) -> float:
    """Exact IoU of two masks whose boxes overlap."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box or (0, 0, 0, 0), b.box or (0, 0, 0, 0)
    x0, y0, x1, y1 = max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1)
    part_a = a.pixels[y0 - ay0 : y1 - ay0, x0 - ax0 : x1 - ax0]
    part_b = b.pixels[y0 - by0 : y1 - by0, x0 - bx0 : x1 - bx0]
    shared = np.count_nonzero(part_a & part_b)
    return shared / (np.count_nonzero(a.pixels) + np.count_nonzero(b.pixels) - shared)


def _result(found: Sequence[_Found], decoder: Any) -> EverythingResult:
    tokens = [item.token[None] for item in found] or [torch.zeros(0, decoder.hidden_size)]
    embeds = [item.embed[None] for item in found] or [torch.zeros(0, decoder.semantic_embed_dim)]
    return EverythingResult(
        regions=[{"points": [list(item.point)], "labels": [1]} for item in found],
        masks=[item.mask for item in found],
        iou_scores=[item.score for item in found],
        semantic_tokens=torch.cat(tokens),
        semantic_embeds=torch.cat(embeds),
    )


__all__ = ["EverythingConfig", "EverythingResult", "segment_everything"]
