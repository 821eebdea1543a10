"""Adapters: what is trained, saved and loaded, which base they need, switching, merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import logits, randomise
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tap_llm import InputError, TapLlmForConditionalGeneration
from tap_llm.region_llm.adapter_files import RECORD
from tap_llm.region_llm.adapters import (
    adapter_names,
    add_adapter,
    attach_lora,
    freeze_for_alignment,
    is_adapter,
    load_adapter,
    lora_config,
    merge,
    save_adapter,
    use_adapter,
)

Join = Callable[..., Any]
ALL_FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "smollm3", "gpt2"]
CHAT_FAMILIES = ["llama", "qwen2", "gpt2"]  # usual, tied embeddings, Conv1D


def in_half_precision(model: Any) -> None:
    """All but TAP, which other tests use too."""
    model.model.language_model.to(torch.bfloat16)
    model.model.projector.to(torch.bfloat16)


@pytest.fixture
def make_adapter(join: Join, tmp_path: Path) -> Callable[..., Any]:
    """A model whose LLM was loaded from a folder, with a trained adapter saved in another."""

    def make(family: str = "llama", seed: int = 0, **options: Any) -> tuple[Any, Any, Path]:
        model, processor = join(family, **options)
        model.model.language_model.save_pretrained(tmp_path / "llm")
        model.config.llm_name_or_path = str(tmp_path / "llm")
        attach_lora(model, lora_config(model, r=4, alpha=8))
        randomise(model, seed)
        save_adapter(model.eval(), tmp_path / "adapter", processor)
        return model, processor, tmp_path / "adapter"

    return make


class TestTargets:
    @pytest.mark.parametrize("family", ALL_FAMILIES)
    def test_all_linear_layers_of_the_llm_and_nothing_else(self, family: str, join: Join) -> None:
        model, _ = join(family, tokenizer=join("llama")[1].tokenizer)
        llm = model.model.language_model
        expected = {
            name for name, module in llm.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and module is not llm.get_output_embeddings()
        }  # fmt: skip
        attach_lora(model)
        adapted = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
        assert adapted == {f"model.language_model.{name}" for name in expected} and len(adapted) >= 8
        assert type(model) is TapLlmForConditionalGeneration
        learning = {name for name, value in model.named_parameters() if value.requires_grad}
        assert learning == {n for n, _ in model.named_parameters() if ".lora_" in n or n.startswith("model.projector.")}

    def test_some_layers(self, join: Join) -> None:
        model, _ = join("llama")
        attach_lora(model, lora_config(model, targets=["q_proj", "down_proj"]))
        adapted = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        assert len(adapted) == 4 and {name.rpartition(".")[2] for name in adapted} == {"q_proj", "down_proj"}
        with pytest.raises(InputError, match="no linear layer c_attn; it has q_proj, k_proj"):
            lora_config(model, targets=["q_proj", "c_attn"])

    def test_a_second_configuration_is_that_of_the_bare_llm(self, join: Join) -> None:
        model, _ = join("llama")
        first = lora_config(model)
        attach_lora(model, first)
        assert lora_config(model) == first
        assert (first.r, first.lora_alpha, first.lora_dropout) == (64, 128, 0.05)

    def test_peft_around_the_whole_model_adapts_the_llm_alone(self, join: Join) -> None:
        model, _ = join("llama")
        wrapped = peft.get_peft_model(model, lora_config(model, r=2))
        adapted = [name for name, module in wrapped.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        assert len(adapted) == 14 and all("language_model" in name for name in adapted)

    def test_a_step_moves_lora_and_projector_alone(self, join: Join, talks: Any) -> None:
        model, processor = join("llama")
        in_half_precision(model)
        attach_lora(model, lora_config(model, r=2))
        before = {name: value.clone() for name, value in model.named_parameters()}
        learning = [value for value in model.parameters() if value.requires_grad]
        assert {value.dtype for value in learning} == {torch.float32}
        optimizer = torch.optim.SGD(learning, lr=1.0)
        for _ in range(2):  # half of LoRA learns only when the other half is not zero any more
            optimizer.zero_grad()
            model.train()(**processor(talks[0][:2], return_labels=True)).loss.backward()
            optimizer.step()
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if ".lora_" in name or name.startswith("model.projector.")}

    def test_alignment_leaves_the_projector_alone(self, join: Join) -> None:
        model, _ = join("llama")
        in_half_precision(model)
        freeze_for_alignment(model)
        learning = {name for name, value in model.named_parameters() if value.requires_grad}
        assert learning == {f"model.projector.{name}" for name, _ in model.model.projector.named_parameters()}
        assert next(model.model.projector.parameters()).dtype == torch.float32


class TestSaving:
    @pytest.mark.parametrize("family", CHAT_FAMILIES)
    def test_it_loads_to_identical_logits(
        self, family: str, make_adapter: Any, tap: Any, talks: Any, bare_tokenizer: Any
    ) -> None:
        options = {"tokenizer": bare_tokenizer, "chat_template": "plain"} if family == "gpt2" else {}
        model, processor, folder = make_adapter(family, **options)
        expected = logits(model, processor, talks)
        loaded, loaded_processor = load_adapter(folder, tap=tap)
        assert torch.equal(logits(loaded, loaded_processor, talks), expected)
        assert not any(value.requires_grad for value in loaded.parameters()) and not loaded.training

    def test_it_holds_lora_projector_and_configurations_only(self, make_adapter: Any) -> None:
        model, _, folder = make_adapter()
        tensors = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        assert tensors.keys() == {"adapter_model.safetensors", "projector.safetensors"}
        assert len(tensors["adapter_model.safetensors"]) == 2 * 14
        assert all(".lora_" in name for name in tensors["adapter_model.safetensors"])
        assert tensors["projector.safetensors"].keys() == model.model.projector.state_dict().keys()
        assert not {path.suffix for path in folder.iterdir()} & {".bin", ".pt", ".pkl"}
        assert is_adapter(folder) and not is_adapter(folder.parent)

    def test_the_state_of_a_training_loop_is_saved_in_place_of_the_weights(
        self, make_adapter: Any, tap: Any, talks: Any, tmp_path: Path
    ) -> None:
        model, processor, _ = make_adapter()
        expected = logits(model, processor, talks)
        state = {name: value.clone() for name, value in model.state_dict().items()
                 if ".lora_" in name or ".projector." in name}  # fmt: skip
        randomise(model, seed=5)
        save_adapter(model, tmp_path / "state", processor, state_dict=state)
        assert torch.equal(logits(*load_adapter(tmp_path / "state", tap=tap), talks), expected)
        with pytest.raises(
            InputError, match=r"lacks 14 tensors of the adapter, first model\.layers\.0\.mlp\.down_proj"
        ):
            partial = {name: value for name, value in state.items() if "lora_A" not in name}
            save_adapter(model, tmp_path / "part", state_dict=partial)

    def test_without_a_processor_it_takes_the_tokenizer_of_the_llm(
        self, make_adapter: Any, tap: Any, talks: Any, tmp_path: Path
    ) -> None:
        model, processor, _ = make_adapter()
        save_adapter(model, tmp_path / "bare")
        processor.tokenizer.save_pretrained(tmp_path / "llm")
        _, loaded = load_adapter(tmp_path / "bare", tap=tap)
        assert loaded(talks)["input_ids"].equal(processor(talks)["input_ids"])

    def test_a_projector_alone_goes_on_to_lora(self, join: Join, tap: Any, talks: Any, tmp_path: Path) -> None:
        model, processor = join("llama")
        freeze_for_alignment(model)
        randomise(model, seed=3)
        save_adapter(model, tmp_path / "aligned", processor)
        assert not (tmp_path / "aligned" / "adapter_model.safetensors").exists()
        loaded, _ = load_adapter(tmp_path / "aligned", tap=tap, llm=join("llama")[0].model.language_model)
        assert torch.equal(logits(loaded, processor, talks), logits(model, processor, talks))
        attach_lora(loaded)
        assert adapter_names(loaded) == ["default"]
        with pytest.raises(InputError, match="'default' has LoRA already"):
            attach_lora(loaded)
        save_adapter(loaded, tmp_path / "aligned", processor)
        assert (tmp_path / "aligned" / "adapter_model.safetensors").exists()

    def test_training_goes_on(self, make_adapter: Any, tap: Any) -> None:
        _, _, folder = make_adapter()
        loaded, _ = load_adapter(folder, tap=tap, trainable=True)
        learning = {name for name, value in loaded.named_parameters() if value.requires_grad}
        assert learning and all(".lora_" in name or ".projector." in name for name in learning)

    @torch.no_grad()
    def test_peft_loads_its_lora_onto_the_bare_llm(self, make_adapter: Any, talks: Any, tmp_path: Path) -> None:
        model, processor, folder = make_adapter()
        served = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llm"), folder)
        (prompt,) = model.to_prompt_embeds(**processor(talks[0]))
        served_logits = served(inputs_embeds=prompt["prompt_embeds"][None]).logits
        assert torch.allclose(served_logits, logits(model, processor, talks[0]), atol=1e-5)

    def test_bundled_and_official_models_go_by_their_names(
        self, join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tap_llm.hub import ASSETS, home

        monkeypatch.setenv("TAP_LLM_HOME", str(tmp_path))
        model, _ = join("llama")
        names = {str(ASSETS / "tap-tiny"): "tap-tiny", "org/model": "org/model", "": "",
                 str(home() / "converted/tap_vit_b_v1_1-merged_2560-no-captions-v1"): "tap_vit_b_v1_1",
                 str(tmp_path): str(tmp_path.resolve())}  # fmt: skip
        for path, name in names.items():
            model.config.tap_name_or_path = path
            save_adapter(model, tmp_path / "a")
            assert json.loads((tmp_path / "a/tap_llm_adapter.json").read_text())["tap"]["name"] == name

    def test_the_whole_model_is_not_saved_with_adapters_in_it(self, make_adapter: Any, tmp_path: Path) -> None:
        model, _, _ = make_adapter()
        with pytest.raises(InputError, match="save_adapter, or merge"):
            model.save_pretrained(tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
        merge(model).save_pretrained(tmp_path / "whole")

    def test_a_missing_lora_file_is_never_looked_for_elsewhere(self, make_adapter: Any, tap: Any) -> None:
        _, _, folder = make_adapter()
        (folder / "adapter_config.json").unlink()
        with pytest.raises(InputError, match="is damaged: it has no adapter_config.json"):
            load_adapter(folder, tap=tap)


class TestBases:
    def test_the_same_base_in_another_dtype_fits(self, make_adapter: Any, tap: Any, talks: Any) -> None:
        model, processor, folder = make_adapter()
        for dtype in (torch.bfloat16, torch.float16):
            loaded, _ = load_adapter(folder, tap=deepcopy(tap).to(dtype), dtype=dtype)
            assert loaded.model.language_model.dtype == dtype
            assert loaded.config.embedding_rms == model.config.embedding_rms
            difference = logits(loaded, processor, talks).float() - logits(model, processor, talks)
            assert difference.abs().mean() < 0.1

    @pytest.mark.parametrize("kind", ["tap", "llm"])
    def test_another_base_is_refused(self, kind: str, make_adapter: Any, tap: Any, make_llm: Any) -> None:
        _, _, folder = make_adapter()
        parts = {"tap": deepcopy(tap), "llm": make_llm("llama")}
        with torch.no_grad():
            for name, value in parts[kind].named_parameters():
                if ".1." in name:
                    value.mul_(1.1)
        parts[kind].config._name_or_path = "somewhere/else"
        with pytest.raises(InputError, match=f"trained with the {kind.upper()} .* somewhere/else: .*other weights"):
            load_adapter(folder, **parts)

    def test_a_bundled_tap_of_another_version_is_told(self, make_adapter: Any, make_llm: Any) -> None:
        _, _, folder = make_adapter()
        record = json.loads((folder / RECORD).read_text())
        record["tap"]["name"] = "tap-tiny"
        (folder / RECORD).write_text(json.dumps(record))
        with pytest.raises(InputError, match="trained with the TAP tap-tiny of another version of this package"):
            load_adapter(folder, llm=make_llm("llama"))

    def test_an_llm_of_another_size_is_refused(self, make_adapter: Any, tap: Any, make_llm: Any) -> None:
        _, _, folder = make_adapter()
        with pytest.raises(InputError, match="does not fit LlamaForCausalLM: num_hidden_layers is 1, not 2"):
            load_adapter(folder, tap=tap, llm=make_llm("llama", num_hidden_layers=1))

    def test_a_base_without_a_name_must_be_given(self, join: Join, tap: Any, tmp_path: Path) -> None:
        save_adapter(join("llama")[0], tmp_path / "a")
        with pytest.raises(InputError, match=r"does not say where its TAP is: give it \(tap=\.\.\.\)"):
            load_adapter(tmp_path / "a")
        with pytest.raises(InputError, match=r"does not say where its LLM is"):
            load_adapter(tmp_path / "a", tap=tap)
        with pytest.raises(InputError, match="there is no LLM nowhere"):
            load_adapter(tmp_path / "a", tap=tap, llm="nowhere")

    def test_damaged_folders(self, make_adapter: Any, tap: Any, tmp_path: Path) -> None:
        _, _, folder = make_adapter()
        with pytest.raises(InputError, match="holds no adapter"):
            load_adapter(tmp_path / "llm", tap=tap)
        damages: list[tuple[str, Callable[[bytes], bytes]]] = [
            ("adapter_model.safetensors", lambda data: data[:100]),
            ("projector.safetensors", lambda data: b""),
            ("adapter_config.json", lambda data: b"{"),
            ("tap_llm_adapter.json", lambda data: b'{"version": 1}'),
            ("tap_llm_adapter.json", lambda data: data.replace(b'"version": 1', b'"version": 2')),
            ("tokenizer.json", lambda data: b"["),
        ]
        for name, damage in damages:
            intact = (folder / name).read_bytes()
            (folder / name).write_bytes(damage(intact))
            with pytest.raises(InputError, match=r"is damaged|has version 2"):
                load_adapter(folder, tap=tap)
            (folder / name).write_bytes(intact)
        load_adapter(folder, tap=tap)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "projector.safetensors"])
    def test_a_missing_file_is_looked_for_nowhere_else(
        self, name: str, make_adapter: Any, tap: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def network(*_: Any, **__: Any) -> None:
            pytest.fail("asked the hub")

        _, _, folder = make_adapter()
        (folder / name).unlink()
        monkeypatch.setattr("peft.config.hf_hub_download", network)
        with pytest.raises(InputError, match=f"is damaged.*{name}"):
            load_adapter(folder, tap=tap)


class TestSwitching:
    @pytest.fixture
    def two(self, make_adapter: Any, tmp_path: Path, tap: Any) -> Any:
        """Folders of two adapters of one base, one with LoRA, one aligned alone; what they say; processor."""
        model, processor, folder = make_adapter(seed=1)
        attach_lora(model, lora_config(model, r=2, targets=["q_proj"]), "other")
        randomise(model, seed=2)
        save_adapter(model.eval(), tmp_path / "other", name="other")
        freeze_for_alignment(model)
        return folder, tmp_path / "other", model, processor

    def test_adapters_swap_with_their_projectors(self, two: Any, tap: Any, talks: Any) -> None:
        first, second, trained, processor = two
        expected = {}
        for name in ("default", "other"):
            use_adapter(trained, name)
            expected[name] = logits(trained, processor, talks)
        assert not torch.allclose(expected["default"], expected["other"], atol=0.01)
        model, _ = load_adapter(first, tap=tap)
        add_adapter(model, second, "other")
        assert adapter_names(model) == ["default", "other"]
        for name in ("default", "other", "default"):
            assert torch.equal(logits(model, processor, talks), expected["default"])
            use_adapter(model, name)
            assert torch.equal(logits(model, processor, talks), expected[name])
            use_adapter(model, "default")
        with pytest.raises(InputError, match="no adapter 'third'; there are default, other"):
            use_adapter(model, "third")
        with pytest.raises(InputError, match="cannot be called 'other': the name is taken"):
            add_adapter(model, first, "other")

    def test_one_without_lora_switches_lora_off(self, join: Join, tap: Any, talks: Any, tmp_path: Path) -> None:
        model, processor = join("llama")
        save_adapter(model, tmp_path / "plain")
        expected = logits(model, processor, talks)
        attach_lora(model)
        randomise(model.eval(), seed=1)
        changed = logits(model, processor, talks)
        add_adapter(model, tmp_path / "plain", "plain")
        use_adapter(model, "plain")
        assert torch.equal(logits(model, processor, talks), expected)
        use_adapter(model, "default")
        assert torch.equal(logits(model, processor, talks), changed)

    def test_another_preset_is_refused(self, join: Join, tap: Any, tmp_path: Path) -> None:
        save_adapter(join("llama", "lite")[0], tmp_path / "lite")
        with pytest.raises(InputError, match="its projector is 'lite', not 'base'"):
            add_adapter(join("llama", "base")[0], tmp_path / "lite", "lite")


class TestMerging:
    @pytest.mark.parametrize("family", CHAT_FAMILIES)
    def test_a_plain_checkpoint_with_the_same_logits(
        self, family: str, join: Join, talks: Any, tmp_path: Path, bare_tokenizer: Any
    ) -> None:
        options = {"tokenizer": bare_tokenizer, "chat_template": "plain"} if family == "gpt2" else {}
        model, processor = join(family, **options)
        attach_lora(model, lora_config(model, r=4, alpha=8))
        randomise(model.eval(), seed=1)
        names = {name for name in model.state_dict() if ".lora_" not in name}
        expected = logits(model, processor, talks)
        merged = merge(model)
        assert {name.replace(".base_layer", "") for name in names} == set(merged.state_dict())
        assert torch.allclose(logits(merged, processor, talks), expected, atol=1e-5, rtol=1e-5)
        merged.save_pretrained(tmp_path)
        loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert torch.equal(logits(loaded.eval(), processor, talks), logits(merged, processor, talks))
        table, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
        assert (table is head) == (family != "llama")

    def test_the_adapter_in_use_is_merged(self, join: Join, talks: Any) -> None:
        model, processor = join("llama")
        for seed, name in enumerate(("a", "b")):
            attach_lora(model, lora_config(model, r=2, alpha=4), name)
            randomise(model.eval(), seed)
        use_adapter(model, "a")
        expected = logits(model, processor, talks)
        assert torch.allclose(logits(merge(model), processor, talks), expected, atol=1e-5)
        attach_lora(model)  # and it starts anew
        assert adapter_names(model) == ["default"]

    def test_other_kinds_of_lora_are_refused(self, join: Join) -> None:
        model, _ = join("llama")
        config = lora_config(model, r=2)
        config.use_dora = True
        attach_lora(model, config)
        with pytest.raises(InputError, match="only plain LoRA can be merged"):
            merge(model)
