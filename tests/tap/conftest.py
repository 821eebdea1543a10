"""A small TAP; a small official checkpoint, written down from the published names and shapes, not from our table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from small_tap import SIDE, randomize, small_config
from torch import Tensor

from tap_llm import TapForConditionalGeneration

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int, batch: bool = False) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var") if batch else ("weight", "bias")
    yield from ((f"{name}.{part}", (width,)) for part in names)
    if batch:
        yield f"{name}.num_batches_tracked", ()


def encoder_shapes(width: int, depth: int, heads: int, window: int, grid: int, patch: int, out: int) -> Shapes:
    yield "image_encoder.patch_embed.proj.weight", (width, 3, patch, patch)
    yield "image_encoder.patch_embed.proj.bias", (width,)
    yield "image_encoder.pos_embed.weight", (grid * grid, width)
    for i in range(depth):
        block = f"image_encoder.blocks.{i}"
        yield from norm(f"{block}.norm1", width)
        yield from norm(f"{block}.norm2", width)
        yield from linear(f"{block}.attn.qkv", 3 * width, width)
        yield from linear(f"{block}.attn.proj", width, width)
        yield f"{block}.attn.rel_pos_embed.weight", (heads, (2 * window - 1) ** 2)
        yield f"{block}.attn.rel_pos_embed.index", (window**2, window**2)
        yield from linear(f"{block}.mlp.fc1", 4 * width, width)
        yield from linear(f"{block}.mlp.fc2", width, 4 * width)
    yield from norm("image_encoder.norm", width)
    for c in range(4):
        cross, half = f"image_encoder.cross_conv.{c}", width // 2
        yield f"{cross}.conv1.weight", (half, width, 1, 1)
        yield f"{cross}.conv2.weight", (half, half, 3, 3)
        yield f"{cross}.conv3.weight", (width, half, 1, 1)
        yield from norm(f"{cross}.norm1", half, batch=True)
        yield from norm(f"{cross}.norm2", half, batch=True)
        yield from norm(f"{cross}.norm3", width, batch=True)
    yield "image_encoder.neck.lateral_conv.0.0.weight", (out, width, 1, 1)
    yield from norm("image_encoder.neck.lateral_conv.0.1", out, batch=True)
    yield "image_encoder.neck.output_conv.0.0.weight", (out, out, 3, 3)
    yield from norm("image_encoder.neck.output_conv.0.1", out, batch=True)


def attention_shapes(name: str, width: int, inner: int) -> Shapes:
    for part in ("q_proj", "k_proj", "v_proj"):
        yield from linear(f"{name}.{part}", inner, width)
    yield from linear(f"{name}.proj", width, inner)


def decoder_shapes(width: int, embed: int, mlp: int) -> Shapes:
    yield "prompt_encoder.coord_matrix", (2, width // 2)
    yield "prompt_encoder.point_embed.weight", (5, width)
    decoder = "image_decoder.transformer"
    for j in range(2):
        block = f"{decoder}.blocks.{j}"
        yield from attention_shapes(f"{block}.self_attn", width, width)
        yield from attention_shapes(f"{block}.cross_attn_token_to_image", width, width // 2)
        yield from attention_shapes(f"{block}.cross_attn_image_to_token", width, width // 2)
        for k in (1, 2, 3, 4):
            yield from norm(f"{block}.norm{k}", width)
        yield from linear(f"{block}.mlp.fc1", mlp, width)
        yield from linear(f"{block}.mlp.fc2", width, mlp)
    yield from attention_shapes(f"{decoder}.final_attn_token_to_image", width, width // 2)
    yield from norm(f"{decoder}.norm", width)
    yield "image_decoder.iou_token.weight", (1, width)
    yield "image_decoder.sem_tokens.weight", (4, width)
    yield "image_decoder.mask_tokens.weight", (4, width)
    up = width // 4
    yield "image_decoder.output_conv.0.weight", (width, up, 2, 2)
    yield "image_decoder.output_conv.0.bias", (up,)
    yield from norm("image_decoder.output_conv.1", up)
    yield "image_decoder.output_conv.3.weight", (up, up // 2, 2, 2)
    yield "image_decoder.output_conv.3.bias", (up // 2,)
    heads = [
        *((f"mask_pred.{k}", width, up // 2) for k in range(4)),
        ("iou_pred", width, 4),
        ("sem_pred", embed, embed),
    ]
    for head, hidden, outputs in heads:
        yield from linear(f"image_decoder.{head}.layers.0", hidden, width)
        yield from linear(f"image_decoder.{head}.layers.1", hidden, hidden)
        yield from linear(f"image_decoder.{head}.layers.2", outputs, hidden)


def text_shapes(prefix: int, width: int, depth: int, vocabulary: int) -> Shapes:
    decoder = "text_decoder.transformer"
    yield "text_decoder.encoder.weight", (width, prefix)
    yield f"{decoder}.tok_embeddings.weight", (vocabulary, width)
    yield f"{decoder}.text_proj.weight", (vocabulary, width)
    for i in range(depth):
        yield from norm(f"{decoder}.blocks.{i}.norm1", width)
        yield from norm(f"{decoder}.blocks.{i}.norm2", width)
        yield from linear(f"{decoder}.blocks.{i}.attn.qkv", 3 * width, width)
        yield from linear(f"{decoder}.blocks.{i}.attn.proj", width, width)
        yield from linear(f"{decoder}.blocks.{i}.mlp.fc1", 4 * width, width)
        yield from linear(f"{decoder}.blocks.{i}.mlp.fc2", width, 4 * width)
    yield from norm(f"{decoder}.norm", width)


def make_official_arrays() -> dict[str, Any]:
    """A small official checkpoint, written down from the published list of names."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"pixel_mean": np.array([103.53, 116.28, 123.675], np.float32),
              "pixel_rsig": 1 / np.array([57.375, 57.12, 58.395], np.float32)}  # fmt: skip
    parts = (
        encoder_shapes(width=32, depth=4, heads=2, window=2, grid=4, patch=8, out=64),
        decoder_shapes(width=64, embed=24, mlp=48),
        text_shapes(prefix=64, width=128, depth=2, vocabulary=50),
    )
    for part in parts:
        for name, shape in part:
            arrays[name] = np.asarray(rng.standard_normal(shape) * 0.2, np.float32)
            if name.endswith("running_var"):
                arrays[name] = np.abs(arrays[name]) + 1
            if name.endswith("num_batches_tracked"):
                arrays[name] = np.array(rng.integers(1000))
            if name.endswith(".index"):
                arrays[name] = index_by_definition(2)
    return arrays


def index_by_definition(window: int) -> np.ndarray:
    """idx(i, j) = (y_i - y_j + w - 1) (2 w - 1) + (x_i - x_j + w - 1)."""
    places = [(i // window, i % window) for i in range(window * window)]
    side = 2 * window - 1
    rows = [[(yi - yj + window - 1) * side + xi - xj + window - 1 for yj, xj in places] for yi, xi in places]
    return np.array(rows)


@pytest.fixture(scope="session")
def shared_official_arrays() -> dict[str, Any]:
    """The checkpoint, for fixtures that live long; not to be changed."""
    return make_official_arrays()


@pytest.fixture
def official_arrays(shared_official_arrays: dict[str, Any]) -> dict[str, Any]:
    """A copy that the test may change."""
    return {name: value.copy() for name, value in shared_official_arrays.items()}


@pytest.fixture
def official_state(official_arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same as tensors."""
    return {name: torch.from_numpy(value) for name, value in official_arrays.items()}


@pytest.fixture(scope="session")
def published_index() -> Callable[[int], np.ndarray]:
    """The published formula of the relative-position table, by window side."""
    return index_by_definition


@pytest.fixture(scope="session")
def shared_model() -> TapForConditionalGeneration:
    """A small TAP with random weights, not to be changed."""
    return randomize(TapForConditionalGeneration(small_config()))


@pytest.fixture
def model(shared_model: TapForConditionalGeneration) -> TapForConditionalGeneration:
    """A copy that the test may change."""
    return deepcopy(shared_model)


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def embeddings(shared_model: TapForConditionalGeneration, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return shared_model.get_image_embeddings(pixels)
