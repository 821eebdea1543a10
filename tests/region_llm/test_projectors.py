"""What every projector must do; own projectors can be checked with the same class."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from tap_llm import RegionFeatures, TapLlmConfig, TapLlmForConditionalGeneration, TapModel
from tap_llm.region_llm import PROJECTORS, RegionProjector, register_projector
from tap_llm.region_llm.projectors import box_code

COSTS = {"lite": (1, 0), "base": (1 + 4, 0), "full": (1 + 4, 4), "pair": (2, 0)}


@register_projector("pair")
class PairProjector(RegionProjector):
    """An own projector: the semantic token, twice."""

    @classmethod
    def count_region_tokens(cls, config: TapLlmConfig) -> int:
        return 2

    def forward(self, features: RegionFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        regions, images = super().forward(features)
        return regions.expand(-1, 2, -1), images


def make_features(regions: int, images: int = 3, seed: int = 0) -> RegionFeatures:
    generator = torch.Generator().manual_seed(seed)
    return RegionFeatures(
        semantic_tokens=5 * torch.randn(regions, 32, generator=generator),
        boxes=torch.rand(regions, 4, generator=generator),
        roi=3 * torch.randn(regions, 4, 32, generator=generator),
        global_tokens=torch.randn(images, 4, 32 * 16, generator=generator),
        region_image_index=torch.zeros(regions, dtype=torch.long),
    )


@pytest.mark.parametrize("name", list(COSTS))
class TestEveryProjector:
    @pytest.fixture
    def model(self, name: str, tap: TapModel, make_llm: Any) -> TapLlmForConditionalGeneration:
        torch.manual_seed(3)
        return TapLlmForConditionalGeneration.from_tap_and_llm(
            tap, make_llm("gemma", hidden_size=64), name, roi_grid=2, global_grid=2
        )

    @pytest.fixture
    def projector(self, model: TapLlmForConditionalGeneration) -> RegionProjector:
        return model.model.projector

    @pytest.mark.parametrize("regions", [0, 1, 5])
    def test_costs_and_shapes(self, name: str, regions: int, model: Any, projector: RegionProjector) -> None:
        per_region, per_image = COSTS[name]
        assert (projector.tokens_per_region, projector.tokens_per_image) == COSTS[name]
        assert (model.config.tokens_per_region, model.config.tokens_per_image) == COSTS[name]
        rows, images = projector(make_features(regions))
        assert rows.shape == (regions, per_region, 64) and images.shape == (3, per_image, 64)

    @torch.no_grad()
    def test_starts_at_the_size_of_the_llms_embeddings(self, name: str, model: Any, projector: Any) -> None:
        embeddings = model.get_input_embeddings()(torch.arange(320))
        target = embeddings.square().mean().sqrt()
        assert target > 0.3  # Gemma scales what it looks up
        for rows in projector(make_features(200, images=100)):
            if rows.numel():
                per_place = rows.square().mean(dim=(0, 2)).sqrt() / target
                assert ((per_place > 0.8) & (per_place < 1.25)).all()

    def test_its_layers_may_be_wider_than_the_llm(self, name: str, tap: TapModel, make_llm: Any) -> None:
        """And the size at the start is the same."""
        torch.manual_seed(3)
        wide = TapLlmForConditionalGeneration.from_tap_and_llm(
            tap, make_llm("llama", hidden_size=64), name, roi_grid=2, global_grid=2, projector_hidden_size=512
        )
        layers = wide.model.projector.semantic.feature
        assert layers.linear_1.weight.shape == (512, 32) and layers.linear_2.weight.shape == (64, 512)
        for rows in wide.model.projector(make_features(200, images=100)):
            if rows.numel():
                assert rows.square().mean().sqrt().item() == pytest.approx(wide.model.projector.scale, rel=0.2)

    def test_every_weight_learns(self, name: str, projector: RegionProjector) -> None:
        rows, images = projector(make_features(4))
        (rows.square().sum() + images.square().sum()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())

    @torch.no_grad()
    def test_rows_do_not_see_each_other(self, name: str, projector: RegionProjector) -> None:
        together, alone = make_features(5), make_features(5)
        for field in ("semantic_tokens", "boxes", "roi"):
            setattr(alone, field, getattr(alone, field)[3:4])
        torch.testing.assert_close(projector(together)[0][3:4], projector(alone)[0])

    @torch.no_grad()
    def test_the_box_moves_the_first_token(self, name: str, projector: RegionProjector) -> None:
        features, moved = make_features(2), make_features(2)
        moved.boxes = moved.boxes + torch.tensor([0.02, 0, 0, 0])
        change = projector(moved)[0][:, 0] - projector(features)[0][:, 0]
        assert change.square().mean().sqrt() > 0.05 * projector.scale

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_dtypes(self, name: str, dtype: torch.dtype, projector: RegionProjector) -> None:
        exact = projector(make_features(4))
        rounded = projector.to(dtype)(make_features(4).to(dtype=dtype))
        for one, other in zip(rounded, exact, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.float(), other, atol=0.05 * projector.scale, rtol=0.05)

    @torch.no_grad()
    def test_weights_make_the_round_trip(self, name: str, model: Any, projector: RegionProjector) -> None:
        other = PROJECTORS[name](model.config)
        other.load_state_dict(projector.state_dict())
        for one, two in zip(projector(make_features(4)), other(make_features(4)), strict=True):
            assert torch.equal(one, two)


def test_features_of_other_grids_are_refused(tap: TapModel) -> None:
    small = {"model_type": "llama", "hidden_size": 32}
    projector = PROJECTORS["full"](TapLlmConfig(tap_config=tap.config, text_config=small, roi_grid=3, global_grid=2))
    with pytest.raises(ValueError, match=r"hold 4 roi per row, this projector reads 9 \(3 x 3\)"):
        projector(make_features(1))


def test_box_code_keeps_near_boxes_apart() -> None:
    boxes = torch.rand(50, 4)
    codes = box_code(boxes)
    assert codes.shape == (50, 64)
    torch.testing.assert_close(codes.square().sum(dim=1), torch.full((50,), 32.0))
    assert torch.cdist(codes, box_code(boxes + 1 / 256)).diagonal().min() > math.sqrt(0.5)


def test_bad_configurations(tap: TapModel) -> None:
    refused = StrictDataclassClassValidationError
    with pytest.raises(refused, match="unknown projector 'huge': choose one of lite, base, full"):
        TapLlmConfig(projector="huge")
    with pytest.raises(refused, match="global_grid 3 does not divide the side of TAP's grid, 8"):
        TapLlmConfig(tap_config=tap.config, projector="full", global_grid=3)
    with pytest.raises(refused, match="at least 1"):
        TapLlmConfig(roi_grid=0)
