"""Models for the recipes: settings are checked, names are read only if needed, what is saved loads again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tap_llm.concepts import ConceptSpace
from tap_llm.errors import InputError
from tap_llm.loading import load_tap
from training.config import from_dict
from training.models import ModelConfig, build_tap, save_tap


def config_of(settings: dict[str, Any], **changes: Any) -> ModelConfig:
    return from_dict(ModelConfig, {**settings["model"], **changes})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_set_without_a_warning(
    settings: dict[str, Any], attention: str, caplog: pytest.LogCaptureFixture
) -> None:
    tap, _, _ = build_tap(config_of(settings, attention=attention), ["a"])
    for part in ("vision_config", "mask_decoder_config", "text_config"):
        assert getattr(tap.config, part)._attn_implementation == attention
    assert "attention implementation" not in caplog.text
    assert tap.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "eagre"}, "model.attention"),
        ({"variant": "vit_x"}, "unknown TAP size 'vit_x'"),
        ({"overrides": {"vison_config": {}}}, "unknown part 'vison_config'"),
        ({"overrides": {"vision_config": {"drop_path": 0.1}}}, "vision_config: unknown field 'drop_path'"),
        ({"overrides": {"vision_config": 3}}, "must be a group of settings"),
        ({"overrides": {"vision_config": {"image_size": 100}}}, "image_size 100 is not a multiple"),
        ({"start": "absent", "overrides": {"vision_config": {}}}, "overrides are for fresh models"),
    ],
)
def test_models_that_cannot_be(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_tap(config_of(settings, **changes), ["a"])


def test_names_are_asked_for_only_where_there_are_no_concepts(settings: dict[str, Any], tmp_path: Path) -> None:
    def unwanted() -> Iterator[str]:
        raise AssertionError("millions of samples are read for nothing")
        yield ""

    ConceptSpace(["a", "b"], torch.randn(16, 2)).save_pretrained(tmp_path)
    _, _, concepts = build_tap(config_of(settings, concepts=str(tmp_path)), unwanted())
    assert concepts.names == ["a", "b"]
    _, _, concepts = build_tap(config_of(settings, concept_scale=20.0), iter(["dog", "cat", "dog"]))
    assert concepts.names == ["cat", "dog"]
    torch.testing.assert_close(concepts.weights.norm(dim=0), torch.full((2,), 20.0))
    with pytest.raises(InputError, match="no names: set model.concepts"):
        build_tap(config_of(settings))
    ConceptSpace(["a"], torch.randn(5, 1)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="width 5"):
        build_tap(config_of(settings, concepts=str(tmp_path)))


@pytest.mark.parametrize("half", [False, True])
def test_what_is_saved_loads_again(tiny: Any, tmp_path: Path, half: bool) -> None:
    """A recipe gives the parts that it trained; the others are those of the model."""
    tap, processor, concepts = tiny
    trained = {f"model.{key}": value + 1 for key, value in tap.model.state_dict().items()}
    save_tap(tmp_path / "out", tap, trained, processor, concepts, half)
    loaded, _, space = load_tap(tmp_path / "out", dtype="float32")
    state, fresh = loaded.state_dict(), tap.state_dict()
    assert state.keys() == fresh.keys() and space is not None and space.names == concepts.names
    for key, value in state.items():
        expected = trained.get(key, fresh[key])
        if half and value.ndim > 1 and "coord_matrix" not in key:
            expected = expected.half().float()
        assert torch.equal(value, expected), key
