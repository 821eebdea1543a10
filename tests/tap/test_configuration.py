"""Sizes of the named models, and configurations that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tap_llm import TapConfig, TapForConditionalGeneration
from tap_llm.tap import TapMaskDecoderConfig, TapPromptConfig, TapTextConfig, TapVisionConfig

PARTS = ("vision_config", "prompt_config", "mask_decoder_config", "text_config")


def count(module: torch.nn.Module) -> int:
    """Trainable numbers; buffers (prompt frequencies, BatchNorm statistics) are none."""
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "encoder", "total"),
    [
        ("vit_b", 97_398_160, 174_549_876),
        ("vit_l", 322_163_072, 399_314_788),
        ("vit_h", 658_638_080, 735_789_796),
    ],
)
def test_official_sizes(name: str, encoder: int, total: int) -> None:
    with torch.device("meta"):
        model = TapForConditionalGeneration(TapConfig.from_variant(name))
    assert count(model.model.vision_encoder) == encoder
    assert count(model.model.prompt_encoder) == 1_280
    assert count(model.model.mask_decoder) == 6_421_732
    assert count(model.caption_decoder) == 70_728_704
    assert count(model.caption_decoder.model.layers) == 37_828_608
    assert count(model) == total


@pytest.mark.parametrize(("name", "heads"), [("vit_b", 12), ("vit_l", 16), ("vit_h", 16)])
def test_official_shapes(name: str, heads: int) -> None:
    config = TapConfig.from_variant(name)
    assert config.vision_config.num_attention_heads == heads
    assert config.vision_config.image_embedding_size == 64
    assert (config.text_config.pad_token_id, config.text_config.semantic_token_id) == (31999, 0)
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (1, 2)


def test_the_default_is_the_official_vit_b() -> None:
    assert TapConfig().to_dict() == TapConfig.from_variant("vit_b").to_dict()


def test_overrides_win_and_leave_the_size_as_it_is() -> None:
    config = TapConfig.from_variant("tiny", text_config={"vocab_size": 300}, vision_config={"drop_path_rate": 0.1})
    assert (config.text_config.vocab_size, config.text_config.hidden_size) == (300, 128)
    assert config.text_config.pad_token_id == 299
    assert config.vision_config.drop_path_rate == 0.1
    assert TapConfig.from_variant("tiny").text_config.vocab_size == 1024


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match=r"unknown TAP size 'vit_g'.*vit_b, vit_l, vit_h, tiny"):
        TapConfig.from_variant("vit_g")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prompt_config": {"hidden_size": 64}}, "prompt_config.hidden_size 64"),
        ({"mask_decoder_config": {"hidden_size": 64}}, "mask_decoder_config.hidden_size 64"),
        ({"text_config": {"semantic_size": 64}}, "text_config.semantic_size 64"),
        ({"vision_config": {"output_channels": 64}}, "vision_config.output_channels 64"),
        ({"prompt_config": {"image_size": 512}}, "prompt_config.image_size 512"),
        (
            {"vision_config": {"image_size": 200}, "prompt_config": {"image_size": 200}},
            "image_size 200 is not a multiple",
        ),
        ({"vision_config": {"num_hidden_layers": 6}}, "num_hidden_layers 6 is not a multiple"),
        ({"vision_config": {"num_attention_heads": 5}}, "num_attention_heads 5"),
        ({"mask_decoder_config": {"num_attention_heads": 3}}, "num_attention_heads 3"),
        ({"text_config": {"num_attention_heads": 3}}, "num_attention_heads 3"),
        ({"text_config": {"pad_token_id": 0}}, "must differ"),
    ],
)
def test_parts_that_do_not_fit(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        TapConfig.from_variant("tiny", **overrides)
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["vit_l", "tiny"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    config = TapConfig.from_variant(name, vision_config={"drop_path_rate": 0.2}, text_config={"vocab_size": 700})
    config.save_pretrained(tmp_path)
    for restored in (TapConfig(**config.to_dict()), TapConfig.from_pretrained(tmp_path)):
        for part in PARTS:
            assert getattr(restored, part).to_dict() == getattr(config, part).to_dict()
    assert TapVisionConfig.from_pretrained(tmp_path).hidden_size == config.vision_config.hidden_size


def test_parts_given_as_objects() -> None:
    config = TapConfig(
        vision_config=TapVisionConfig(output_channels=64),
        prompt_config=TapPromptConfig(hidden_size=64),
        mask_decoder_config=TapMaskDecoderConfig(hidden_size=64),
        text_config=TapTextConfig(semantic_size=64),
    )
    expected = [TapVisionConfig, TapPromptConfig, TapMaskDecoderConfig, TapTextConfig]
    assert [type(getattr(config, part)) for part in PARTS] == expected
    assert config.mask_decoder_config.hidden_size == 64
