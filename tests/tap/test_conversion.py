"""Official checkpoints convert one-to-one, in both directions, or are refused with the reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tap_llm.concepts import ConceptSpace
from tap_llm.errors import InputError, MissingFileError
from tap_llm.tap import TapConfig, TapForConditionalGeneration, conversion
from tap_llm.tap.conversion import (
    convert_checkpoint,
    export_official,
    image_processor_from_official,
    infer_config,
    model_from_official,
    save_official,
)
from tap_llm.tap.official_keys import REL_POS_INDEX, layout_from_official, our_name
from tap_llm.tap.processing_tap import TapProcessor
from tap_llm.tap.unpickle import read_state_dict
from tap_llm.tap.vision_encoder import relative_position_index

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "goldens" / "tap_tiny"
KEY_LISTS = SHARED / "goldens" / "official_keys"
TOKENIZER = SHARED / "goldens" / "tokenizer" / "tokenizer.model"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference checkpoint is not in shared/goldens")


def write(path: Path, arrays: Any) -> Path:
    path.write_bytes(pickle.dumps(arrays, protocol=4))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, shared_official_arrays: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    report = convert_checkpoint(write(folder / "w.pkl", shared_official_arrays), folder / "out")
    assert report.fits and str(report) == ""
    return folder / "out"


def load(folder: Path) -> TapForConditionalGeneration:
    config = TapConfig.from_pretrained(folder)
    model = TapForConditionalGeneration(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def test_sizes_are_read_off_the_tensors(official_state: dict[str, Tensor]) -> None:
    config = infer_config(official_state)
    expected = TapConfig(
        vision_config={"image_size": 32, "patch_size": 8, "window_size": 2, "hidden_size": 32,
                       "num_hidden_layers": 4, "num_attention_heads": 2, "output_channels": 64},
        prompt_config={"hidden_size": 64, "image_size": 32},
        mask_decoder_config={"hidden_size": 64, "num_attention_heads": 2, "mlp_dim": 48, "upscale_dim": 16,
                             "head_hidden_size": 64, "semantic_hidden_size": 24, "semantic_embed_dim": 24},
        text_config={"vocab_size": 50, "semantic_size": 64, "hidden_size": 128, "intermediate_size": 512,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 49},
    )  # fmt: skip
    assert config.to_diff_dict() == expected.to_diff_dict()


@pytest.mark.parametrize("size", ["b", "l", "h"])
@pytest.mark.skipif(not KEY_LISTS.is_dir(), reason="the official key lists are not in shared/goldens")
def test_official_key_lists_map_one_to_one(size: str) -> None:
    entries = json.loads((KEY_LISTS / f"tap_vit_{size}.json").read_text())["entries"]
    state = {entry["name"]: torch.empty(entry["shape"], device="meta") for entry in entries}
    assert infer_config(state).to_diff_dict() == TapConfig.from_variant(f"vit_{size}").to_diff_dict()
    with torch.device("meta"):
        needed = TapForConditionalGeneration(TapConfig.from_variant(f"vit_{size}")).state_dict()
    rest = {name for name in state if not name.startswith("pixel_") and not REL_POS_INDEX.fullmatch(name)}
    renamed = {our_name(name): state[name] for name in rest}
    assert None not in renamed and len(renamed) == len(rest)
    ours = layout_from_official({str(name): value for name, value in renamed.items()}, text_heads=8)
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in needed.items()}


def test_relative_index_is_the_published_formula(published_index: Callable[[int], np.ndarray]) -> None:
    for window in (1, 2, 4, 16):
        np.testing.assert_array_equal(relative_position_index(window).numpy(), published_index(window))


def test_patch_embedding_sees_the_same_colours(converted: Path, official_state: dict[str, Tensor]) -> None:
    ours, official = load(converted).model.vision_encoder.patch_embeddings.projection, official_state
    weight, bias = (official[f"image_encoder.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    rgb = torch.rand(1, 3, 32, 32)
    expected = torch.nn.functional.conv2d(rgb.flip(1), weight, bias, stride=8)
    torch.testing.assert_close(ours(rgb), expected)


def interleaved_rotary(states: Tensor) -> Tensor:
    """Official rotary code on (heads, L, d): neighbouring channels (2i, 2i + 1) turn together."""
    length, dim = states.shape[-2:]
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    a, b = states[..., 0::2], states[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.stack(turned, dim=-1).flatten(-2)


def test_caption_attention_equals_the_official_formula(converted: Path, official_state: dict[str, Tensor]) -> None:
    model, official = load(converted), official_state
    decoder, block = model.caption_decoder.model, "text_decoder.transformer.blocks.1.attn"
    hidden = torch.randn(1, 7, 128)
    qkv = hidden[0] @ official[f"{block}.qkv.weight"].T + official[f"{block}.qkv.bias"]
    query, key, value = qkv.view(7, 3, 2, 64).permute(1, 2, 0, 3)
    scores = interleaved_rotary(query) @ interleaved_rotary(key).transpose(1, 2) / 8
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(7, 128)
    expected = mixed @ official[f"{block}.proj.weight"].T + official[f"{block}.proj.bias"]

    from tap_llm.tap.caption_decoder import rotary_angles

    angles = rotary_angles(decoder.config, torch.arange(7)[None])[:, None]
    causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    actual, _ = decoder.layers[1].self_attn(hidden, (angles.cos(), angles.sin()), causal)
    torch.testing.assert_close(actual[0], expected, rtol=1e-4, atol=1e-5)


def test_pixel_statistics_become_rgb_in_unit_range(converted: Path) -> None:
    stored = json.loads((converted / "processor_config.json").read_text())["image_processor"]
    assert stored["image_mean"] == [0.485, 0.456, 0.406] and stored["image_std"] == [0.229, 0.224, 0.225]
    assert stored["size"] == {"longest_edge": 32}


def test_folder_is_complete_and_alone(converted: Path) -> None:
    names = {path.name for path in converted.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= names
    assert not any("token" in name for name in names - {"tokenizer_config.json"})
    assert {path.name for path in converted.parent.iterdir()} == {"w.pkl", "out"}
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["TapForConditionalGeneration"] and config["dtype"] == "float32"


def test_folder_loads_with_from_pretrained(converted: Path) -> None:
    from_pretrained: Any = TapForConditionalGeneration.from_pretrained
    model, report = from_pretrained(converted, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    expected = load(converted).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    processor = TapProcessor.from_pretrained(converted)
    assert processor.tokenizer is None
    batch = processor(np.zeros((20, 30, 3), np.uint8), [{"points": [[3, 4]]}])
    with torch.no_grad():
        assert model(**batch).pred_masks.shape == (1, 4, 16, 16)


def test_round_trip_is_bitwise(
    tmp_path: Path, official_state: dict[str, Tensor], official_arrays: dict[str, Any]
) -> None:
    original = official_arrays
    model, _ = model_from_official(official_state)
    save_official(model, image_processor_from_official(official_state), tmp_path / "back.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["back.pkl"]
    back = pickle.loads((tmp_path / "back.pkl").read_bytes())
    assert set(back) == set(original)
    for name, value in original.items():
        assert back[name].dtype == value.dtype and back[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("values", [[103.5, 116.25, 123.6875], [1.0, 2.0, 254.3], [0.1234567, 99.99, 17.3]])
def test_any_pixel_statistics_survive_the_round_trip(values: list[float], official_state: dict[str, Tensor]) -> None:
    state = official_state | {"pixel_mean": torch.tensor(values), "pixel_rsig": 1 / torch.tensor(values)}
    model, _ = model_from_official(state)
    back = export_official(model, image_processor_from_official(state))
    np.testing.assert_array_equal(back["pixel_mean"], state["pixel_mean"].numpy())
    np.testing.assert_array_equal(back["pixel_rsig"], state["pixel_rsig"].numpy())


def test_released_files_have_half_weights_and_no_counters(official_state: dict[str, Tensor]) -> None:
    released = {
        name: value.half() if value.is_floating_point() and "norm" not in name and "coord" not in name else value
        for name, value in official_state.items()
        if not name.endswith("num_batches_tracked")
    }
    model, report = model_from_official(released)
    assert report.fits
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    norm1 = model.model.vision_encoder.neck.norm1
    assert norm1.num_batches_tracked.item() == 0
    torch.testing.assert_close(
        model.caption_decoder.lm_head.weight,
        released["text_decoder.transformer.text_proj.weight"].float(), rtol=0, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_of_the_whole_model_but_the_frequencies(
    tmp_path: Path, dtype: str, official_arrays: dict[str, Any]
) -> None:
    convert_checkpoint(write(tmp_path / "w.pkl", official_arrays), tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    dtypes = {name: value.dtype for name, value in stored.items() if value.is_floating_point()}
    assert dtypes.pop("model.prompt_encoder.coord_matrix") == torch.float32
    assert set(dtypes.values()) == {getattr(torch, dtype)}
    model, _ = model_from_official(
        {name: torch.from_numpy(value) for name, value in official_arrays.items()}, dtype=dtype
    )
    assert {name: value.dtype for name, value in model.state_dict().items()} == {n: v.dtype for n, v in stored.items()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        convert_checkpoint(tmp_path / "w.pkl", tmp_path / "other", dtype="int8")


def without(prefix: str) -> Callable[[dict[str, Any]], list[Any]]:
    return lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith(prefix)]


def with_array(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.__setitem__(name, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("text_decoder"), r"no text_decoder\.\* tensors: the caption decoder is missing"),
        (without("image_encoder"), "not an official TAP checkpoint: it has no image_encoder"),
        (without("image_encoder.blocks.2.norm1"), "not a multiple of num_bottlenecks"),
        (
            without("image_decoder.transformer.blocks.0.mlp"),
            r"has no image_decoder\.transformer\.blocks\.0\.mlp",
        ),
        (
            without("image_decoder.transformer.norm"),
            r"2 missing \(image_decoder\.transformer\.norm\.weight, ",
        ),
        (with_array("image_decoder.mask_tokens.weight", (3, 64)), "4 mask tokens, this checkpoint has 3"),
        (with_array("image_encoder.pos_embed.weight", (15, 32)), "15 entries, which is no square"),
        (with_array("extra.weight", (2,)), r"1 unexpected \(extra\.weight\)"),
        (with_array("image_encoder.patch_embed.proj.lora", (2,)), r"1 unexpected \(image_encoder"),
        (
            with_array("image_encoder.norm.bias", (31,)),
            r"image_encoder\.norm\.bias is \(31,\) instead of \(32,\)",
        ),
        (
            with_array("text_decoder.transformer.blocks.0.attn.qkv.bias", (7,)),
            r"is \(7,\) instead of \(384,\)",
        ),
        (
            with_array("image_encoder.blocks.1.attn.rel_pos_embed.index", (4, 4)),
            "table of relative positions",
        ),
        (with_array("pixel_rsig", (3,)), "pixel_rsig must be three positive numbers"),
        (with_array("pixel_mean", (4,)), "pixel_mean must be three positive numbers"),
        (with_array("text_decoder.transformer.tok_embeddings.weight", (50, 100)), "not a multiple of 64"),
    ],
)
def test_checkpoints_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str, official_arrays: dict[str, Any]
) -> None:
    arrays = official_arrays
    change(arrays)
    path = write(tmp_path / "w.pkl", arrays)
    with pytest.raises(InputError, match=message) as error:
        convert_checkpoint(path, tmp_path / "deep" / "out")
    assert "w.pkl" in str(error.value) and len(str(error.value)) < 500
    assert [item.name for item in tmp_path.iterdir()] == ["w.pkl"]  # nothing half-written


def test_not_strict_reports_and_fills_in(tmp_path: Path, official_arrays: dict[str, Any]) -> None:
    arrays = official_arrays | {"extra": np.zeros(2), "image_encoder.norm.bias": np.zeros(31)}
    del arrays["image_decoder.transformer.norm.weight"]
    report = convert_checkpoint(write(tmp_path / "w.pkl", arrays), tmp_path / "out", strict=False)
    assert report.missing == ["image_decoder.transformer.norm.weight"] and report.unexpected == ["extra"]
    assert report.mismatched == [("image_encoder.norm.bias", (31,), (32,))] and not report.fits
    model = load(tmp_path / "out")
    assert torch.equal(model.model.mask_decoder.layer_norm.weight, torch.ones(64))
    assert torch.equal(model.model.vision_encoder.layer_norm.bias, torch.zeros(32))


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_and_prefixed_checkpoints(wrapper: str, tmp_path: Path, official_arrays: dict[str, Any]) -> None:
    prefixed = {f"module.{name}": value for name, value in official_arrays.items()}
    state = read_state_dict(write(tmp_path / "w.pkl", {wrapper: prefixed, "epoch": 1}))
    assert model_from_official(state)[1].fits


def test_output_must_be_new_or_empty(tmp_path: Path, official_arrays: dict[str, Any]) -> None:
    path = write(tmp_path / "w.pkl", official_arrays)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for taken in (tmp_path / "full", path):
        with pytest.raises(InputError, match="choose another output"):
            convert_checkpoint(path, taken)
    assert (tmp_path / "full" / "note.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert_checkpoint(path, tmp_path / "empty")
    convert_checkpoint(path, tmp_path / "deep" / "er")
    assert (tmp_path / "empty" / "config.json").is_file() and (tmp_path / "deep" / "er" / "config.json").is_file()


def test_failing_to_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official_arrays: dict[str, Any]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    path = write(tmp_path / "w.pkl", official_arrays)
    monkeypatch.setattr(TapForConditionalGeneration, "save_pretrained", full)
    with pytest.raises(InputError, match="cannot write .*out: no space left"):
        convert_checkpoint(path, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["w.pkl"]


def test_concepts_travel_along_and_must_fit(tmp_path: Path, official_arrays: dict[str, Any]) -> None:
    path = write(tmp_path / "w.pkl", official_arrays)
    good = write(tmp_path / "c.pkl", [np.eye(24, 3, dtype=np.float32), ["a", "b", "c"]])
    convert_checkpoint(path, tmp_path / "out", concepts=good)
    assert ConceptSpace.from_pretrained(tmp_path / "out").names == ["a", "b", "c"]
    bad = write(tmp_path / "d.pkl", [np.eye(25, 3, dtype=np.float32), ["a", "b", "c"]])
    with pytest.raises(InputError, match=r"width 25.*width 24"):
        convert_checkpoint(path, tmp_path / "other", concepts=bad)
    with pytest.raises(MissingFileError):
        convert_checkpoint(path, tmp_path / "other", tokenizer=tmp_path / "absent.model")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c.pkl", "d.pkl", "out", "w.pkl"]


def test_export_refuses_what_official_files_cannot_say(official_state: dict[str, Tensor]) -> None:
    model, _ = model_from_official(official_state)
    processor = image_processor_from_official(official_state)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"no place for extra\.weight"):
        export_official(model, processor)
    del model.extra
    text: Any = model.config.text_config
    text.num_attention_heads = 4
    with pytest.raises(InputError, match="heads of 64 channels in the caption decoder, not 32"):
        export_official(model, processor)
    text.num_attention_heads = 2
    with pytest.raises(InputError, match="BatchNorm was folded"):
        export_official(model.fold_batch_norm(), processor)


def golden_arrays() -> dict[str, np.ndarray]:
    arrays = pickle.loads((GOLDEN / "weights.pkl").read_bytes())
    generated = {7: ("tok_embeddings", 0.03125), 8: ("text_proj", 0.125)}
    for seed, (name, scale) in generated.items():
        values = np.random.RandomState(seed).standard_normal((32000, 128)).astype(np.float32) * np.float32(scale)
        arrays[f"text_decoder.transformer.{name}.weight"] = values
    arrays["text_decoder.transformer.text_proj.weight"][2] *= 2.5
    return arrays


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    concepts, tokenizer = GOLDEN / "concepts_scaled.pkl", TOKENIZER if TOKENIZER.is_file() else None
    checkpoint = write(folder / "weights.pkl", golden_arrays())
    assert convert_checkpoint(checkpoint, folder / "out", concepts, tokenizer).fits
    return folder / "out"


@needs_golden
def test_reference_checkpoint_computes_the_reference_numbers(golden: Path) -> None:
    model = load(golden)
    images, encoder, text = (np.load(GOLDEN / f"{name}.npz") for name in ("images", "encoder", "text"))
    with torch.no_grad():
        features = model.get_image_embeddings(torch.from_numpy(images["network_input"]).flip(1))
    np.testing.assert_allclose(features.numpy(), encoder["features"], atol=1e-4)
    captions = model.generate(semantic_tokens=torch.from_numpy(text["visual_tokens"])[:, 0])
    for ours, expected in zip(captions.tolist(), text["greedy_tokens"].tolist(), strict=True):
        stop = expected.index(2) + 1 if 2 in expected else len(expected)
        assert ours[:stop] == expected[:stop]


@needs_golden
def test_reference_checkpoint_round_trip(golden: Path) -> None:
    arrays, model = golden_arrays(), load(golden)
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    back = export_official(model, image_processor_from_official(state))
    assert set(back) == set(arrays)
    assert [name for name in arrays if back[name].tobytes() != arrays[name].tobytes()] == []


@needs_golden
def test_reference_concepts(golden: Path) -> None:
    space, text = ConceptSpace.from_pretrained(golden), np.load(GOLDEN / "text.npz")
    names, probabilities = space.classify(torch.from_numpy(text["concept_embeds"]), top_k=5)
    np.testing.assert_allclose(probabilities.numpy(), text["concept_scaled_top5_score"], atol=1e-4)
    expected = [[space.names[i] for i in row] for row in text["concept_scaled_top5_index"]]
    assert names == expected


def test_index_tables_are_compared_by_shape_first(
    official_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(window: int) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(conversion, "relative_position_index", build)
    without = {name: value for name, value in official_state.items() if not REL_POS_INDEX.fullmatch(name)}
    assert model_from_official(without)[1].fits
    table = "image_encoder.blocks.0.attn.rel_pos_embed.index"
    with pytest.raises(InputError, match="not TAP's table of relative positions for windows of 2"):
        model_from_official({**official_state, table: torch.zeros(9, 9, dtype=torch.long)})
    with pytest.raises(AssertionError, match="built"):
        model_from_official(official_state)
