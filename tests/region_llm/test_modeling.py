"""Any causal LM reads regions: alone or in company, from pixels or stored features, greedy or with beams."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, TextStreamer

from tap_llm import (
    InputError,
    RegionFeatures,
    TapForConditionalGeneration,
    TapLlmForConditionalGeneration,
    TapLlmModel,
    TapLlmProcessor,
    TapModel,
)

NAMES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "smollm3", "gpt2"]
PRESETS = ["lite", "base", "full"]
Join = Callable[..., tuple[TapLlmForConditionalGeneration, TapLlmProcessor]]


def new_ids(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    """What `generate` adds."""
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def feature_inputs(model: Any, inputs: Any) -> dict[str, Any]:
    """The same inputs with stored features in place of pixels and prompts."""
    names = ("pixel_values", "input_points", "input_labels", "region_image_index", "resized_sizes")
    features = model.extract_features(**{name: inputs[name] for name in names})
    rest = ("input_ids", "attention_mask", "part_index")
    return {**{name: inputs[name] for name in rest}, "region_features": features}


@pytest.fixture(scope="module")
def llama(join: Join) -> tuple[TapLlmForConditionalGeneration, TapLlmProcessor]:
    """With all kinds of tokens; not to be changed."""
    return join("llama", "full")


@pytest.mark.parametrize("name", NAMES)
class TestFamilies:
    @torch.no_grad()
    def test_text_alone_is_the_bare_llm_bit_for_bit(self, name: str, join: Join) -> None:
        model, processor = join(name)
        inputs = processor(
            [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "What is this? Yes."}]]
        )
        assert "pixel_values" not in inputs
        bare = model.model.language_model(**inputs).logits
        assert torch.equal(model(**inputs).logits, bare)
        ids = model.model.language_model.generate(**inputs, max_new_tokens=6, do_sample=False,
                                                  suppress_tokens=[processor.region_token_id])  # fmt: skip
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), ids)

    @torch.no_grad()
    def test_company_changes_nothing(self, name: str, join: Join, talks: Any) -> None:
        model, processor = join(name, "full")
        batch = processor(talks, padding_side="right")
        logits, lengths = model(**batch).logits, batch["attention_mask"].sum(dim=1).tolist()
        for row, (talk, length) in enumerate(zip(talks, lengths, strict=True)):
            alone = model(**processor(talk)).logits[0]
            torch.testing.assert_close(logits[row, :length], alone, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    def test_generation_in_a_batch_equals_single_runs(
        self, name: str, options: dict[str, Any], join: Join, talks: Any
    ) -> None:
        model, processor = join(name)
        singles = [new_ids(model, processor(talk), **options)[0] for talk in talks]
        assert new_ids(model, processor(talks), **options) == singles

    @torch.no_grad()
    def test_the_regions_are_read(self, name: str, join: Join, talks: Any) -> None:
        model, processor = join(name)
        inputs = processor(talks[0])
        before = model(**inputs).logits[0, -1]
        swapped = model(**{**inputs, "part_index": torch.tensor([-1, 1, 0])}).logits[0, -1]
        assert (before - swapped).abs().max() > 1e-3


class TestFeatures:
    @pytest.mark.parametrize("projector", PRESETS)
    @torch.no_grad()
    def test_stored_features_replace_pixels(self, projector: str, join: Join, talks: Any) -> None:
        model, processor = join("qwen3", projector)
        inputs = processor(talks)
        stored = feature_inputs(model, inputs)
        assert torch.equal(model(**stored).logits, model(**inputs).logits)
        assert new_ids(model, stored) == new_ids(model, inputs)
        twice = [new_ids(model, stored, num_beams=3) for _ in range(2)]
        assert twice[0] == twice[1] == new_ids(model, inputs, num_beams=3)

    def test_callers_objects_stay_as_they_are(self, llama: Any, talks: Any) -> None:
        model, processor = llama
        stored = feature_inputs(model, processor(talks))
        features = stored["region_features"]
        copies = {name: value.clone() for name, value in vars(features).items()}
        prepared = {"image": model.get_image_features(region_features=features, part_index=stored["part_index"])}
        count = len(prepared["image"].pooler_output)
        expected = new_ids(model, stored, num_beams=2)
        ids = {name: stored[name] for name in ("input_ids", "attention_mask")}
        assert new_ids(model, {**ids, "mm_encoder_outputs": prepared}, num_beams=2) == expected
        with torch.no_grad():
            model(input_ids=stored["input_ids"], mm_encoder_outputs=prepared)
        assert all(torch.equal(value, copies[name]) for name, value in vars(features).items())
        assert len(prepared["image"].pooler_output) == count

    def test_image_embeddings_replace_pixels_in_generate(self, llama: Any, talks: Any) -> None:
        model, processor = llama
        inputs = processor(talks)
        embeddings = model.model.tap.get_image_embeddings(inputs["pixel_values"]).detach()
        given = {name: value for name, value in inputs.items() if name != "pixel_values"}
        assert new_ids(model, {**given, "image_embeddings": embeddings}) == new_ids(model, inputs)

    def test_many_regions_cost_one_encoding(self, llama: Any, pictures: Any) -> None:
        model, processor = llama
        regions = [{"type": "region", "box": [i, i, i + 9, i + 9]} for i in range(7)]
        inputs = processor([{"role": "user", "content": [{"type": "image", "image": pictures[0]}, *regions]}])
        seen: list[tuple[int, ...]] = []
        hook = model.model.tap.vision_encoder.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
        new_ids(model, inputs, num_beams=2)
        hook.remove()
        assert seen == [(1, 3, 64, 64)]

    def test_images_without_a_token_are_not_encoded(self, join: Join, pictures: Any) -> None:
        model, processor = join("llama", "base")
        inputs = processor([{"role": "user", "content": [{"type": "image", "image": pictures[0]}]}])
        assert inputs["input_points"].shape[0] == 0
        hook = model.model.tap.vision_encoder.register_forward_hook(lambda *_: pytest.fail("encoded"))
        new_ids(model, inputs)
        hook.remove()

    @torch.no_grad()
    def test_an_image_alone_is_read_by_full(self, llama: Any, pictures: Any) -> None:
        model, processor = llama
        logits = [
            model(**processor([{"role": "user", "content": [{"type": "image", "image": picture}]}])).logits[0, -1]
            for picture in pictures[:2]
        ]
        assert (logits[0] - logits[1]).abs().max() > 1e-4

    def test_counts_that_differ_are_named(self, llama: Any, talks: Any) -> None:
        model, processor = llama
        inputs = dict(processor(talks))
        inputs["part_index"] = inputs["part_index"][:-1]
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="has 37 placeholders .* but 32 tokens"):
                call(**inputs)
        with pytest.raises(ValueError, match="has 37 placeholders .* but 0 tokens"):
            model(input_ids=inputs["input_ids"])
        with pytest.raises(ValueError, match="beyond the 5 regions and 3 images"):
            model(**{**inputs, "part_index": torch.tensor([7])})
        with pytest.raises(ValueError, match="give part_index"):
            model(**{**inputs, "part_index": None})
        with pytest.raises(ValueError, match="region_features or images, not both"):
            model(**inputs, region_features=feature_inputs(model, processor(talks))["region_features"])
        with pytest.raises(ValueError, match="need input_ids"):
            model(**{**processor(talks), "input_ids": None}, inputs_embeds=torch.zeros(3, 4, 32))


class TestConversation:
    @pytest.mark.parametrize("all_features", [True, False], ids=["all features", "features of the new part"])
    def test_the_cache_of_earlier_turns_is_used_again(self, all_features: bool, llama: Any, pictures: Any) -> None:
        model, processor = llama
        image = {"type": "image", "image": pictures[1]}
        first, second = ({"type": "region", "box": box} for box in ([1, 2, 20, 20], [30, 5, 50, 28]))
        talk = [
            {"role": "user", "content": [image, {"type": "text", "text": "What is "}, first]},
            {"role": "assistant", "content": "a blue circle"},
            {"role": "user", "content": [{"type": "text", "text": "And "}, second]},
        ]
        start = processor(talk[:1])
        cache = model.generate(**start, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        inputs = feature_inputs(model, processor(talk))
        assert inputs["input_ids"][0, : cache.get_seq_length()].tolist() == start["input_ids"][0].tolist()
        expected = new_ids(model, inputs)
        if not all_features:
            inputs["part_index"] = inputs["part_index"][2:]
        read: list[int] = []
        hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
        assert new_ids(model, inputs, past_key_values=cache) == expected
        hook.remove()
        assert read[0] == inputs["input_ids"].shape[1] - start["input_ids"].shape[1]

    @pytest.mark.parametrize(
        "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}]
    )
    def test_ways_to_generate(self, options: dict[str, Any], llama: Any, talks: Any) -> None:
        model, processor = llama
        inputs = processor(talks)
        assert new_ids(model, inputs, **options) == new_ids(model, inputs)

    def test_streaming(self, llama: Any, talks: Any, capsys: pytest.CaptureFixture[str]) -> None:
        model, processor = llama
        inputs = processor(talks[0])
        new = new_ids(model, inputs, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))[0]
        assert capsys.readouterr().out == processor.decode(new) + "\n"

    def test_the_placeholder_is_never_generated(self, join: Join, talks: Any) -> None:
        model, processor = join("llama")
        settings = GenerationConfig(max_new_tokens=2, output_scores=True, return_dict_in_generate=True, pad_token_id=0)
        for options in ({}, {"suppress_tokens": [7]}):
            scores = model.generate(**processor(talks), generation_config=settings, **options).scores[0]
            assert (scores[:, processor.region_token_id] == -torch.inf).all()
        assert (scores[:, 7] == -torch.inf).all()

    @torch.no_grad()
    def test_prompt_embeddings_for_servers(self, llama: Any, talks: Any) -> None:
        model, processor = llama
        inputs = processor(talks)
        for prompt, talk in zip(model.to_prompt_embeds(**inputs), talks, strict=True):
            alone = processor(talk)
            assert prompt["prompt_token_ids"].tolist() == alone["input_ids"][0].tolist()
            logits = model.model.language_model(inputs_embeds=prompt["prompt_embeds"][None]).logits
            torch.testing.assert_close(logits, model(**alone).logits, atol=1e-4, rtol=1e-4)

    def test_an_llm_without_template_and_reserved_tokens(self, join: Join, bare_tokenizer: Any, talks: Any) -> None:
        model, processor = join("gpt2", tokenizer=bare_tokenizer, chat_template="plain")
        singles = [new_ids(model, processor(talk))[0] for talk in talks]
        assert new_ids(model, processor(talks)) == singles
        assert processor.max_length == 512


class TestTraining:
    def test_no_gradient_reaches_tap(self, join: Join, talks: Any) -> None:
        model, processor = join("llama", "full")
        model.train()
        assert not any(module.training for module in model.model.tap.modules())
        assert model.model.projector.training and model.model.language_model.training
        inputs = processor([talk[:2] for talk in (talks[0], talks[2])], return_labels=True)
        loss = model(**inputs).loss
        loss.backward()
        assert loss > 0
        assert all(p.grad is None and not p.requires_grad for p in model.model.tap.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.projector.parameters())
        assert model.model.language_model.get_input_embeddings().weight.grad is not None

    def test_gradient_checkpointing(self, join: Join, talks: Any) -> None:
        model, processor = join("llama")
        model.model.language_model.requires_grad_(False)
        inputs = processor(talks[0][:2], return_labels=True)
        grads = []
        for enable in (False, True):
            if enable:
                model.activation_checkpointing_enable()
            model.train().zero_grad()
            model(**inputs).loss.backward()
            grads.append([p.grad.clone() for p in model.model.projector.parameters()])
        for plain, checkpointed in zip(*grads, strict=True):
            torch.testing.assert_close(plain, checkpointed)
        assert all(p.grad is None for p in model.model.tap.parameters())

    @torch.no_grad()
    def test_the_loss_counts_assistant_turns_only(self, llama: Any, talks: Any) -> None:
        model, processor = llama
        inputs = processor(talks[0][:2], return_labels=True)
        output = model(**inputs)
        labels = inputs["labels"][0, 1:]
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels)
        torch.testing.assert_close(output.loss, expected)


class TestJoining:
    def test_no_weight_is_copied(self, tap: TapModel, make_llm: Any) -> None:
        llm = make_llm("qwen2")
        model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, llm, "lite")
        assert model.model.language_model is llm and model.model.tap is tap
        assert model.get_input_embeddings() is llm.get_input_embeddings()
        assert model.get_output_embeddings() is llm.get_output_embeddings()
        assert not any(value.is_meta for value in model.state_dict().values())

    def test_tap_keeps_its_attention(self, tap: TapModel, make_llm: Any) -> None:
        """Its caption decoder, which is not joined, too."""
        whole = TapForConditionalGeneration(deepcopy(tap.config))
        parts = ("vision_config", "mask_decoder_config", "text_config")
        before = [getattr(whole.config, part)._attn_implementation for part in parts]
        TapLlmForConditionalGeneration.from_tap_and_llm(whole, make_llm("llama"), "lite")
        assert [getattr(whole.config, part)._attn_implementation for part in parts] == before == ["sdpa"] * 3
        assert whole.caption_decoder.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_half_precision_llm_with_full_precision_tap(self, dtype: torch.dtype, join: Join, talks: Any) -> None:
        model, processor = join("llama", "full")
        exact = model(**processor(talks[0])).logits
        model.model.language_model.to(dtype)
        model.model.projector.to(dtype)
        rounded = model(**processor(talks[0])).logits
        assert rounded.dtype == dtype
        assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()

    def test_what_cannot_be_joined(self, tap: TapModel, make_llm: Any) -> None:
        join = TapLlmForConditionalGeneration.from_tap_and_llm
        with pytest.raises(InputError, match="tap must be a TapModel"):
            join(torch.nn.Linear(1, 1), make_llm("llama"))
        with pytest.raises(InputError, match="must be a causal LM"):
            join(tap, torch.nn.Linear(1, 1))
        with pytest.raises(InputError, match="unknown projector 'large'"):
            join(tap, make_llm("llama"), "large")

    def test_without_a_processor_there_is_no_placeholder(self, tap: TapModel, make_llm: Any) -> None:
        model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, make_llm("llama"), "lite")
        features = RegionFeatures(torch.zeros(1, 32), torch.zeros(1, 4), torch.zeros(1, 0, 32), torch.zeros(1, 0, 32),
                                  torch.zeros(1).long())  # fmt: skip
        with pytest.raises(ValueError, match="TapLlmProcessor.for_model"):
            model(input_ids=torch.tensor([[1, 2]]), region_features=features)
        assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 320)

    @pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
    @torch.no_grad()
    def test_round_trip(self, name: str, join: Join, talks: Any, tmp_path: Path) -> None:
        model, processor = join(name, "full")
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        reader = AutoProcessor.from_pretrained(tmp_path)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert isinstance(again, TapLlmForConditionalGeneration) and isinstance(reader, TapLlmProcessor)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
        assert not any(p.requires_grad for p in again.model.tap.parameters()) and not again.model.tap.training
        before, after = processor(talks), reader(talks)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(again(**after).logits, model(**before).logits)
        assert new_ids(again, after) == new_ids(model, before)

    @torch.no_grad()
    def test_loading_in_bfloat16_and_eager(self, join: Join, talks: Any, tmp_path: Path) -> None:
        model, processor = join("llama")
        model.save_pretrained(tmp_path)
        half = TapLlmForConditionalGeneration.from_pretrained(tmp_path, dtype="bfloat16", attn_implementation="eager")
        assert half.model.language_model.config._attn_implementation == "eager"
        inputs = processor(talks[0])
        exact, rounded = model(**inputs).logits, half(**inputs).logits
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()

    @torch.no_grad()
    def test_the_body_gives_hidden_states(self, llama: Any, talks: Any) -> None:
        model, processor = llama
        hidden: Tensor = model.model(**processor(talks)).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**processor(talks)).logits)
        assert isinstance(model.model, TapLlmModel)
