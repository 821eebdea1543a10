"""TAP of the official ViT-B size, with weights made by a formula, against numbers of the reference implementation.

No checkpoint is needed: every weight follows from its official name, so a tensor under a wrong name, in a wrong layout
or in a wrong place changes the numbers below. They are those of the reference in float32, rounded to five digits.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tap_llm import ConceptSpace, TapConfig, TapForConditionalGeneration, TapOutput
from tap_llm.tap.conversion import image_processor_from_official, model_from_official
from tap_llm.tap.official_keys import layout_to_official, official_name
from tap_llm.tap.vision_encoder import relative_position_index

pytestmark = pytest.mark.slow

PIXEL_MEAN = (103.53, 116.28, 123.675)  # BGR
PIXEL_STD = (57.375, 57.12, 58.395)
PAD_COLOUR = (103, 116, 123)
A, B, C = range(3)  # prompts: a point with its pad, two points, a box
PROMPTS = [[(420, 310, 1), (0, 0, 4)], [(100, 150, 1), (600.5, 700.25, 0)], [(163, 237, 2), (682, 722, 3)]]
HALF_RANGE = ("rel_pos_embed", "point_embed", "iou_token", "sem_tokens", "mask_tokens", "tok_embeddings")


def formula(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1): a hash of the index, started by the letters of the name."""
    start = 1000003 * sum(name.encode("ascii")) % 2**32
    x = np.arange(count, dtype=np.uint32)
    x += np.uint32(start)
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16
    return x / 2**31 - 1


def formula_weight(name: str, shape: torch.Size) -> Tensor:
    """Value of one tensor of the official checkpoint; each kind has its own range."""
    u = formula(name, shape.numel())
    if name.endswith("running_var"):
        values = 1 + 0.2 * u
    elif name.endswith("running_mean"):
        values = 0.05 * u
    elif name == "prompt_encoder.coord_matrix":
        values = u
    elif name.endswith(".bias"):
        values = 0.02 * u
    elif len(shape) == 1:
        values = 1 + 0.1 * u
    elif any(part in name for part in HALF_RANGE):
        values = 0.5 * u
    else:
        values = (0.1 if name == "image_encoder.pos_embed.weight" else 0.05) * u
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def formula_checkpoint() -> OrderedDict[str, Tensor]:
    """The official state dict of the ViT-B size."""
    with torch.device("meta"):
        model = TapForConditionalGeneration(TapConfig.from_variant("vit_b"))
    layout = layout_to_official(model.state_dict(), text_heads=8)
    shapes = {str(official_name(name)): value.shape for name, value in layout.items()}
    state = OrderedDict(pixel_mean=torch.tensor(PIXEL_MEAN), pixel_rsig=1 / torch.tensor(PIXEL_STD))
    for name, shape in shapes.items():
        counts = name.endswith("num_batches_tracked")
        state[name] = torch.tensor(0) if counts else formula_weight(name, shape)
        if name.endswith("rel_pos_embed.weight"):
            state[name.replace(".weight", ".index")] = relative_position_index(16)
    return state


def canvas() -> Tensor:
    """(1, 3, 1024, 1024) RGB, normalised: a picture of 1024 x 768 with its padding."""
    y, x, channel = np.ogrid[:1024, :1024, :3]
    pixels = (x * y // 64 + 2 * x + 37 * channel) % 256
    pixels[:, 768:] = PAD_COLOUR
    normalised = (pixels - np.float32(PIXEL_MEAN)) * (1 / np.float32(PIXEL_STD))
    return torch.from_numpy(normalised.astype(np.float32)).permute(2, 0, 1).flip(0)[None]


def prompts() -> tuple[Tensor, Tensor]:
    """Points (3, 2, 2) and labels (3, 2)."""
    rows = torch.tensor(PROMPTS)
    return rows[..., :2], rows[..., 2].long()


def close(ours: Tensor, *expected: float) -> None:
    torch.testing.assert_close(ours.double(), torch.tensor(expected).double(), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint() -> OrderedDict[str, Tensor]:
    return formula_checkpoint()


@pytest.fixture(scope="module")
def model(checkpoint: OrderedDict[str, Tensor]) -> TapForConditionalGeneration:
    converted, report = model_from_official(checkpoint)
    assert report.fits
    return converted


@pytest.fixture(scope="module")
def outputs(model: TapForConditionalGeneration) -> TapOutput:
    points, labels = prompts()
    with torch.no_grad():
        return model(pixel_values=canvas(), input_points=points, input_labels=labels)


def test_checkpoint_has_the_published_size(checkpoint: OrderedDict[str, Tensor]) -> None:
    assert len(checkpoint) == 537
    assert sum(name.endswith("num_batches_tracked") for name in checkpoint) == 14


def test_image_encoder(outputs: TapOutput) -> None:
    features = outputs.image_embeddings
    assert features.shape == (1, 256, 64, 64)
    close(torch.stack([features.mean(), features.std()]), 0.05497, 1.23032)
    close(features[0, 0, 0, :4], -0.39735, 0.11128, -0.12437, -1.15639)
    close(features[0, 255, 63, 60:64], 0.19626, 0.13570, 0.41940, 0.54069)


def test_prompt_encoder(model: TapForConditionalGeneration) -> None:
    encoder = model.model.prompt_encoder
    with torch.no_grad():
        tokens = encoder(*prompts())
        grid = encoder.grid_encoding(64)[0]
    close(tokens[A, 0, :3], -0.23131, 0.65743, 0.65905)
    close(tokens[A, 0, 128:131], -1.46045, 0.76731, 0.12143)
    close(tokens[A, 1, :3], -0.09440, 0.36828, 0.11278)
    close(tokens[C, 1, :3], -0.16167, -0.62259, -1.10702)
    close(grid[0, :3], -0.08327, -0.91627, -0.69179)
    close(grid[65, :3], -0.37085, -0.96905, -0.59718)


def test_region_decoder(outputs: TapOutput) -> None:
    close(outputs.iou_scores[A], -0.13520, 0.00916, -0.01807, -0.02829)
    close(outputs.iou_scores[B], -0.07184, 0.02744, -0.00390, -0.01156)
    close(outputs.iou_scores[C], -0.07250, 0.00104, 0.02367, 0.01885)
    close(outputs.pred_masks[A, 0, 0, :3], -0.02172, -0.00504, 0.00470)
    close(outputs.pred_masks[B, 2, 128, 128:131], -0.00002, -0.00197, 0.02359)
    close(outputs.pred_masks[C, 3, 255, 253:], -0.00925, -0.00813, 0.00907)
    close(outputs.semantic_tokens[C, 0, :4], 0.53834, -1.98416, 1.33630, 0.79828)
    close(outputs.semantic_embeds[C, 0, :4], 0.11923, -0.20484, -0.40699, 0.20012)
    close(outputs.semantic_embeds[A, 3, 1020:], -0.15238, 0.33181, 0.12419, -0.25869)
    assert outputs.slots.tolist() == [1, 1, 0]


def test_concepts(outputs: TapOutput) -> None:
    weights = torch.from_numpy(4 * formula("concept", 1024 * 5)).float().view(1024, 5)
    space = ConceptSpace(list("abcde"), weights)
    names, probabilities = space.classify(outputs.semantic_embeds[C, 0], top_k=5)
    by_name = dict(zip(names, probabilities, strict=True))
    close(torch.stack([by_name[name] for name in "abcde"]), 0.41709, 0.04792, 0.36643, 0.10690, 0.06167)


def test_caption_decoder(model: TapForConditionalGeneration, outputs: TapOutput) -> None:
    tokens = outputs.semantic_tokens[:, 0]
    with torch.no_grad():
        logits = model.caption_decoder(torch.tensor([[0, 1]]), semantic_tokens=tokens[A : A + 1]).logits
    close(logits[0, -1, :4], -0.19618, -0.94579, -0.51369, 0.77952)
    ids = model.generate(semantic_tokens=tokens, max_new_tokens=11)
    assert ids.tolist() == [
        [1, 18493, 16847, 27111, 675, 27111, 675, 2066, 13600, 2136, 27831, 19637],
        [1, 27111, 9998, 2300, 2958, 13144, 3260, 6427, 14800, 31249, 2958, 13144],
        [1, 27111, 11627, 13515, 6873, 28001, 16156, 26501, 1933, 26828, 17539, 113],
    ]


def test_masks_on_the_photo(checkpoint: OrderedDict[str, Tensor], outputs: TapOutput) -> None:
    processor: Any = image_processor_from_official(checkpoint)
    rows, slots = torch.tensor([C, A, B]), torch.tensor([0, 1, 2])
    masks = processor.post_process_masks(outputs.pred_masks[rows], [(1280, 960)], [(1024, 768)], slots=slots)
    for mask, pixels in zip(masks, (641815, 752398, 560585), strict=True):
        assert mask.shape == (1280, 960)
        assert abs(int(mask.sum()) - pixels) <= 50
