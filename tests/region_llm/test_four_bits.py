"""LLMs in 4 bits: a step, generation, saving, merging; and LLMs that cannot be loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import logits, randomise

from tap_llm import InputError, TapImageProcessor, TapLlmForConditionalGeneration, TapLlmProcessor
from tap_llm.region_llm.adapters import attach_lora, load_adapter, load_llm, lora_config, merge, save_adapter

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


class TestFourBits:
    @pytest.fixture
    def make_four_bit(self, make_llm: Any, tap: Any, chat_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
        def make(family: str, **sizes: Any) -> Any:
            make_llm(family, **sizes).save_pretrained(tmp_path / "llm")
            llm = load_llm(tmp_path / "llm", four_bit=True, dtype="float32")
            torch.manual_seed(2)
            model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, llm, roi_grid=2)
            image_processor = TapImageProcessor(size={"longest_edge": 64})
            return model, TapLlmProcessor.for_model(model, image_processor, chat_tokenizer)

        return make

    @needs_bitsandbytes
    @pytest.mark.parametrize(
        ("family", "sizes"),
        [
            ("llama", {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}),  # 96 is no multiple of a block
            ("qwen2", {"hidden_size": 64, "intermediate_size": 128}),
            ("gpt2", {"n_embd": 64}),
        ],
    )
    def test_a_step_generation_saving_and_merging(
        self, family: str, sizes: Any, make_four_bit: Any, talks: Any, tap: Any, tmp_path: Path
    ) -> None:
        model, processor = make_four_bit(family, **sizes)
        attach_lora(model, lora_config(model, r=4, alpha=8))
        randomise(model, seed=1)
        inputs = processor(talks[0][:2], return_labels=True)
        model.eval()(**inputs)  # a step in eval mode must not stop gradients
        model.train()(**inputs).loss.backward()
        learning = [value for value in model.parameters() if value.requires_grad]
        assert all(value.grad is not None for value in learning) and len(learning) > 20
        torch.optim.SGD(learning, lr=0.01).step()
        assert model.eval().generate(**processor(talks[:2]), max_new_tokens=3).shape[0] == 2
        expected = logits(model, processor, talks)
        save_adapter(model, tmp_path / "adapter", processor)
        loaded, _ = load_adapter(tmp_path / "adapter", tap=tap, four_bit=True, dtype="float32")
        assert torch.equal(logits(loaded, processor, talks), expected)
        load_adapter(tmp_path / "adapter", tap=tap)  # the same base in full precision fits as well

        merged = merge(model)
        assert torch.allclose(logits(merged, processor, talks), expected, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
        plain = TapLlmForConditionalGeneration.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits(plain, processor, talks), logits(merged, processor, talks))

    def test_refusals(self, make_llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_llm("llama").save_pretrained(tmp_path)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"need bitsandbytes: pip install 'tap-llm\[quant\]'"):
            load_llm(tmp_path, four_bit=True)
        with pytest.raises(InputError, match="4-bit models run on CUDA and on the CPU, not on 'meta'"):
            load_llm(tmp_path, four_bit=True, device="meta")

    def test_llms_that_cannot_be_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}')
        with pytest.raises(InputError, match="cannot be loaded: OSError"):
            load_llm(tmp_path)
        with pytest.raises(InputError, match="there is no LLM tap-nothing"):
            load_llm("tap-nothing")
