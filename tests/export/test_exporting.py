"""The exported folder: what is in it, that it computes what torch computes, and that it is there only when right."""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import exported, run
from small_tap import BOX, BOX_AND_POINTS, FIELDS, NINE_POINTS, POINT, randomize, rows, small_config
from tokenizers import Tokenizer
from torch import nn

from tap_llm.errors import InputError
from tap_llm.export import export_onnx, exporting
from tap_llm.export.checking import Checker, prompt_labels
from tap_llm.export.graphs import Graph, image_encoder_graph
from tap_llm.export.writing import write_graph
from tap_llm.hub import ASSETS
from tap_llm.loading import load_tap
from tap_llm.tap import TapForConditionalGeneration

TINY = ASSETS / "tap-tiny"
ONNX = ("image_encoder.onnx", "region_decoder.onnx", "caption_step.onnx")


@pytest.fixture(scope="module")
def tiny() -> Any:
    """Model, processor and concepts of tap-tiny."""
    return load_tap("tap-tiny", dtype="float32")


@pytest.fixture
def ready_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is replaced by the files of tap-tiny, which were traced before."""
    folder = exported().folder
    monkeypatch.setattr(exporting, "write_graph", lambda graph, path: shutil.copy(folder / path.name, path))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(7))


def test_the_folder_tells_all_about_itself(tiny: Any) -> None:
    model, processor, space = tiny
    folder = exported().folder
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*ONNX, "concepts.npz", "export.json", "tokenizer.json"]
    )
    assert about["source"]["model"] == "tap-tiny" and len(about["source"]["sha256"]) == 64
    assert about["image"] == {
        "size": 256,
        "resample": "bilinear",
        "fill": [123, 116, 103],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert about["captions"] == {
        "prompt": [0, 1], "eos": [2], "suppressed": [0, 1023], "max_new_tokens": 38, "empty_cache": [2, 1, 2, 0, 64],
    }  # fmt: skip
    decoder = about["graphs"]["region_decoder"]
    assert decoder["file"] == "region_decoder.onnx"
    assert decoder["inputs"]["input_labels"] == {"dtype": "int64", "shape": ["regions", "points"]}
    assert decoder["outputs"]["pred_masks"] == {"dtype": "float32", "shape": ["regions", 4, 64, 64]}
    caches = about["graphs"]["caption_step"]["outputs"]["keys"]["shape"]
    assert caches == [2, "regions", 2, "past + new", 64]
    differences = [value for graph in about["graphs"].values() for value in graph["largest_difference"].values()]
    assert len(differences) == 9 and 0 < max(differences) < 1e-4

    concepts = np.load(folder / "concepts.npz")  # no pickles inside
    assert concepts["names"].tolist() == space.names
    assert np.array_equal(concepts["weights"], space.weights.numpy())
    words = "a red bus in the top left"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = processor.tokenizer(words).input_ids
    assert tokenizer.encode(words).ids == ids and tokenizer.decode(ids) == words


def test_opset_and_weights_are_inside_the_files() -> None:
    import onnx

    about = json.loads((exported().folder / "export.json").read_text(encoding="utf-8"))
    for name in ONNX:
        written = onnx.load(exported().folder / name)
        onnx.checker.check_model(written)
        assert {entry.domain: entry.version for entry in written.opset_import}[""] == about["made_with"]["opset"]


@pytest.mark.parametrize(
    ("prompts", "index"),
    [([BOX], [1]), ([NINE_POINTS, BOX, POINT, BOX_AND_POINTS, BOX], [1, 0, 0, 1, 1]), ([POINT] * 12, [0] * 12)],
)
@torch.no_grad()
def test_a_chain_of_files_is_the_model(tiny: Any, pixels: torch.Tensor, prompts: list, index: list[int]) -> None:
    model, folder = tiny[0], exported().folder
    inputs = {**rows(*prompts), "region_image_index": torch.tensor(index)}
    inputs["input_points"] = inputs["input_points"].float()
    expected = model(pixel_values=pixels, **inputs)
    embeddings = run(folder / ONNX[0], pixel_values=pixels)["image_embeddings"]
    found = run(folder / ONNX[1], image_embeddings=embeddings, **inputs)
    assert list(found) == list(FIELDS)
    for name in FIELDS:
        np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=1e-4, atol=1e-4)


def test_no_regions_are_no_rows() -> None:
    about = json.loads((exported().folder / "export.json").read_text(encoding="utf-8"))["captions"]
    found = run(
        exported().folder / ONNX[1],
        image_embeddings=np.zeros((1, 128, 16, 16), np.float32),
        input_points=np.zeros((0, 2, 2), np.float32),
        input_labels=np.zeros((0, 2), np.int64),
        region_image_index=np.zeros(0, np.int64),
    )
    assert found["pred_masks"].shape == (0, 4, 64, 64) and found["slots"].shape == (0,)
    empty = np.zeros(about["empty_cache"], np.float32).repeat(0, axis=1)
    step = {"semantic_tokens": np.zeros((0, 128), np.float32), "input_ids": np.zeros((0, 2), np.int64)}
    assert run(exported().folder / ONNX[2], **step, past_keys=empty, past_values=empty)["logits"].shape == (0, 1024)


def test_the_check_tries_every_kind_of_prompt() -> None:
    labels = prompt_labels(7, 9).tolist()
    assert labels[0] == [2, 3] + [1] * 7 and labels[1] == [1] * 8 + [4] and labels[2] == [2, 3] + [4] * 7
    assert prompt_labels(1, 3).tolist() == [[2, 3, 1]]


def test_an_encoder_of_the_official_structure(tmp_path: Path) -> None:
    """Windows with relative positions, several blocks between the bottlenecks; the tables have their part in it."""
    model = randomize(TapForConditionalGeneration(small_config(num_hidden_layers=4, num_bottlenecks=2)))
    path = tmp_path / ONNX[0]
    model.set_attn_implementation("eager")
    write_graph(image_encoder_graph(model.model), path)
    model.set_attn_implementation("sdpa")
    assert 0 < Checker(model).check("image_encoder", path)["image_embeddings"] < 1e-4
    with torch.no_grad():
        model.model.vision_encoder.layers[2].attention.rel_pos_bias.mul_(1.1)
    with pytest.raises(InputError, match=r"image_embeddings of image_encoder\.onnx, on pixel_values .* differs from"):
        Checker(model).check("image_encoder", path)


@pytest.mark.parametrize(
    ("layer", "file"),
    [
        ("model.vision_encoder.layer_norm", ONNX[0]),
        ("model.mask_decoder.layer_norm", ONNX[1]),
        ("caption_decoder.model.layer_norm", ONNX[2]),
    ],
)
def test_a_file_that_differs_leaves_nothing(
    tiny: Any, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch, layer: str, file: str
) -> None:
    model = deepcopy(tiny[0])
    with torch.no_grad():
        model.get_submodule(layer).weight.mul_(1.05)
    monkeypatch.setattr(exporting, "load_tap", lambda *options: (model, *tiny[1:]))
    with pytest.raises(InputError, match=rf"the check failed: .* of {file}, on .* differs from torch by"):
        export_onnx("tap-tiny", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "write_graph", lambda graph, path: path.write_bytes(b"not a graph"))
    with pytest.raises(InputError, match=r"the check failed: image_encoder\.onnx does not run: .*Protobuf"):
        export_onnx("tap-tiny", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_trace_is_named(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
            return (values if values.sum() > 0 else -values,)

    graph = Graph("branching", Branching(), {"values": torch.ones(3)}, {"values": {0: "rows"}}, ("result",))
    with pytest.raises(InputError, match=r"torch 2\.\S+ cannot export branching: \w+: .*data-dependent"):
        write_graph(graph, tmp_path / "branching.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_words(tmp_path: Path, ready_made: None) -> None:
    absent = shutil.ignore_patterns("tokenizer*", "concepts*")
    bare = shutil.copytree(TINY, tmp_path / "bare", ignore=absent)
    about = export_onnx(bare, tmp_path / "out")
    assert about["tokenizer"] is None and about["concepts"] is None
    assert about["source"] == {**json.loads((exported().folder / "export.json").read_text())["source"], "model": "bare"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*ONNX, "export.json"])


def test_overwriting_replaces_an_earlier_export(tmp_path: Path, ready_made: None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_onnx("tap-tiny", out)  # an empty folder is free
    first = (out / "export.json").read_bytes()
    (out / "export.json").write_text("old")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        export_onnx("tap-tiny", out)
    assert (out / "export.json").read_text() == "old"
    (out / "image_encoder.onnx.data").write_bytes(b"of a larger model")
    export_onnx("tap-tiny", out, overwrite=True)
    assert (out / "export.json").read_bytes() == first
    assert not (out / "image_encoder.onnx.data").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_overwriting_spares_other_files(tmp_path: Path) -> None:
    shutil.copy(exported().folder / "export.json", tmp_path)
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"also holds thesis\.tex"):
        export_onnx("tap-tiny", tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"export needs {package} \(.*\): pip install 'tap-llm\[export\]'"):
        export_onnx("tap-tiny", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_optional_is_imported_at_load() -> None:
    package = Path(exporting.__file__).parent
    for path in [package.parent / "cli_export.py", *package.glob("*.py")]:
        at_load = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert [line for line in at_load if "onnx" in line.replace("export_onnx", "")] == []
