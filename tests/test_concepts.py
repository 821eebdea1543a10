"""Concept spaces: reading embeddings, files, and building from text."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from tap_llm import concepts
from tap_llm.concepts import ConceptSpace
from tap_llm.download import NotInRepositoryError, download
from tap_llm.errors import InputError, MissingFileError
from tap_llm.loading import load_concepts

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "goldens" / "tap_tiny"


def space() -> ConceptSpace:
    return ConceptSpace(["cat", "dog", "bus"], torch.eye(4)[:, :3] * 10)


def test_probabilities_follow_the_formula() -> None:
    embeds = torch.tensor([[3.0, 0.0, 0.0, 4.0], [0.0, 1.0, 1.0, 0.0]])
    names, probabilities = space().classify(embeds, top_k=2)
    assert [row[0] for row in names] == ["cat", "dog"] and names[1] == ["dog", "bus"]
    first = np.exp(6.0) / (np.exp(6.0) + 2)  # the unit vector is 0.6, the weight 10
    assert probabilities[0].tolist() == pytest.approx([first, (1 - first) / 2])
    assert probabilities[1, 0] == probabilities[1, 1]


@pytest.mark.parametrize("shape", [(4,), (0, 4), (5, 4), (2, 3, 4)])
def test_names_nest_like_the_leading_axes(shape: tuple[int, ...]) -> None:
    names, probabilities = space().classify(torch.rand(shape), top_k=2)
    assert np.array(names, dtype=object).reshape(-1).size == probabilities.numel()
    assert probabilities.shape == (*shape[:-1], 2)
    if len(shape) == 3:
        assert len(names) == 2 and len(names[0]) == 3 and len(names[0][0]) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_is_read_in_float32(dtype: torch.dtype) -> None:
    embeds = torch.randn(3, 4)
    _, probabilities = space().classify(embeds.to(dtype), top_k=3)
    assert probabilities.dtype == torch.float32
    _, expected = space().classify(embeds.to(dtype).float(), top_k=3)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, under_autocast = space().classify(embeds.to(dtype), top_k=3)
    torch.testing.assert_close(under_autocast, expected, rtol=0, atol=1e-6)


def test_length_of_embeddings_does_not_matter_and_gradients_flow() -> None:
    embeds = torch.randn(2, 4, requires_grad=True)
    torch.testing.assert_close(space().logits(embeds * 1e-4), space().logits(embeds))
    space().logits(embeds)[:, 0].sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference numbers are not in shared/goldens")
@pytest.mark.parametrize("kind", ["scaled", "unit"])
def test_reference_probabilities(kind: str) -> None:
    reference = np.load(GOLDEN / "text.npz")
    concepts = ConceptSpace.from_official(GOLDEN / f"concepts_{kind}.pkl")
    probabilities = concepts.logits(torch.from_numpy(reference["concept_embeds"])).softmax(-1)
    np.testing.assert_allclose(probabilities.numpy(), reference[f"concept_{kind}_prob"], atol=1e-5)


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_top_k_bounds(top_k: int) -> None:
    with pytest.raises(InputError, match="between 1 and 3"):
        space().classify(torch.rand(2, 4), top_k=top_k)


def test_width_must_agree() -> None:
    with pytest.raises(InputError, match=r"width 4.*width 5"):
        space().classify(torch.rand(2, 5))


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["a", "a"], torch.zeros(4, 2), "'a' occurs more than once"),
        (["a", 3], torch.zeros(4, 2), "non-empty strings, got 3"),
        (["a", " "], torch.zeros(4, 2), "non-empty strings"),
        ([], torch.zeros(4, 0), "at least one name"),
        (["a", "b"], torch.zeros(2, 4), r"must be \(E, 2\).*got \(2, 4\)"),
        (["a", "b"], torch.tensor([[1.0, torch.nan]]), "NaN"),
    ],
)
def test_bad_spaces(names: list[str], weights: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConceptSpace(names, weights)


def test_repr_says_what_it_is() -> None:
    assert repr(space()) == "ConceptSpace(3 concepts of width 4: 'cat', 'dog', 'bus')"
    assert len(space()) == 3 and space().to("cpu").weights.device.type == "cpu"


def test_save_and_load(tmp_path: Path) -> None:
    original = ConceptSpace(["café", "dog"], np.random.default_rng(0).random((4, 2)), {"logit_scale": 100.0})
    original.save_pretrained(tmp_path / "model")
    loaded = ConceptSpace.from_pretrained(tmp_path / "model")
    assert loaded.names == ["café", "dog"] and loaded.info == {"logit_scale": 100.0}
    assert torch.equal(loaded.weights, original.weights) and loaded.weights.dtype == torch.float32


def test_official_files_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.pkl").write_bytes(pickle.dumps([np.eye(3, 2), ["a", "b"]]))
    assert ConceptSpace.from_pretrained(tmp_path / "c.pkl").names == ["a", "b"]
    space().save_pretrained(tmp_path / "cached")
    calls: list[tuple[str, str, dict]] = []

    def fake_download(repo: str, file: str, **options: str) -> Path:
        calls.append((repo, file, options))
        return tmp_path / "cached" / file

    monkeypatch.setattr(concepts, "download", fake_download)
    assert ConceptSpace.from_pretrained("someone/model", revision="v2").names == ["cat", "dog", "bus"]
    assert calls[0] == ("someone/model", "concepts.safetensors", {"revision": "v2"}) and len(calls) == 2


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="give a folder, a .pkl file or a hub id"):
        ConceptSpace.from_pretrained(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=r"no concepts\.safetensors"):
        ConceptSpace.from_pretrained(tmp_path)
    space().save_pretrained(tmp_path)
    for content in ("not json", json.dumps({"no": "names"}), json.dumps(["a"])):
        (tmp_path / "concepts.json").write_text(content)
        with pytest.raises(InputError, match="damaged"):
            ConceptSpace.from_pretrained(tmp_path)
    (tmp_path / "concepts.json").write_text(json.dumps({"names": ["a"]}))
    with pytest.raises(InputError, match="one column per name"):
        ConceptSpace.from_pretrained(tmp_path)
    (tmp_path / "c.pkl").write_bytes(pickle.dumps([np.eye(3, 2), ["a", "a"]]))
    with pytest.raises(InputError, match=r"c\.pkl: .*more than once"):
        ConceptSpace.from_official(tmp_path / "c.pkl")


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "</s>", "a", "photo", "of", "cat", "dog", "bus", "red", "<unk>"]
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    text = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1,
            "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return CLIPModel(config).eval(), tokenizer


def embed(clip: tuple[CLIPModel, PreTrainedTokenizerFast], text: str) -> torch.Tensor:
    model, tokenizer = clip
    with torch.no_grad():
        hidden = model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output
        feature = model.text_projection(hidden)[0]
    return feature / feature.norm()


def test_from_text_normalises_averages_and_scales(clip: tuple[CLIPModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = clip
    names, templates = ["cat", "red bus", "dog"], ("a {}", "a photo of a {}")
    built = ConceptSpace.from_text(names, templates, model, tokenizer, batch_size=4)
    scale = model.logit_scale.exp().item()
    for column, name in enumerate(names):
        mean = torch.stack([embed(clip, template.replace("{}", name)) for template in templates]).mean(0)
        torch.testing.assert_close(built.weights[:, column], mean / mean.norm() * scale, rtol=1e-4, atol=1e-4)
    assert built.info == {"templates": list(templates), "logit_scale": pytest.approx(scale)}
    default = ConceptSpace.from_text(names, model=model, tokenizer=tokenizer)
    torch.testing.assert_close(default.weights[:, 0], embed(clip, "a cat") * scale, rtol=1e-4, atol=1e-4)
    assert default.classify(embed(clip, "a red bus"))[0] == ["red bus"]


def test_from_text_errors(clip: tuple[CLIPModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = clip
    with pytest.raises(InputError, match=r"'a photo'"):
        ConceptSpace.from_text(["cat"], ["a photo", "a {}"], model, tokenizer)
    with pytest.raises(InputError, match="templates must be texts"):
        ConceptSpace.from_text(["cat"], "a {}", model, tokenizer)
    with pytest.raises(InputError, match="needs the CLIP model"):
        ConceptSpace.from_text(["cat"])
    with pytest.raises(InputError, match="more than once"):
        ConceptSpace.from_text(["cat", "cat"], ["a {}"], model, tokenizer)


def test_the_callers_array_stays_the_callers() -> None:
    array, tensor = np.eye(4, 3, dtype=np.float32), torch.eye(4, 3)
    spaces = [ConceptSpace(["a", "b", "c"], weights) for weights in (array, tensor)]
    array[:], tensor[:] = 7, 7
    assert all(torch.equal(own.weights, torch.eye(4, 3)) for own in spaces)


def test_classify_leaves_the_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    own = space()
    before = own.weights
    monkeypatch.setattr(ConceptSpace, "to", lambda self, device: pytest.fail("moved for everyone"))
    with contextlib.suppress(RuntimeError):  # there is no autocast on the meta device; the weights have moved by then
        own.logits(torch.ones(2, 4, device="meta"))
    assert own.weights is before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_embeddings_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="NaN or infinite.*float32"):
        space().classify(torch.tensor([[1.0, 0.0, 0.0, value]]))


@pytest.mark.parametrize("absent", ["concepts.json", "concepts.safetensors"])
def test_one_file_without_the_other_is_no_missing_file(tmp_path: Path, absent: str) -> None:
    space().save_pretrained(tmp_path)
    (tmp_path / absent).unlink()
    with pytest.raises(InputError, match=f"incomplete: there is no {absent}"):
        load_concepts(None, str(tmp_path))


def test_a_model_has_no_concepts_only_where_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(error: Exception) -> None:
        def fail(*args: str) -> None:
            raise error

        monkeypatch.setattr(concepts, "download", fail)

    assert load_concepts(None, str(tmp_path)) is None
    fail_with(NotInRepositoryError("no such file"))
    assert load_concepts(None, "someone/model") is None
    fail_with(MissingFileError("cannot download: no network"))
    with pytest.raises(InputError, match="no network"):
        load_concepts(None, "someone/model")


def test_downloads_tell_absent_from_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = hub_errors.RemoteEntryNotFoundError.__new__(hub_errors.RemoteEntryNotFoundError)  # else needs a response
    for error, kind in (
        (remote, NotInRepositoryError),
        (hub_errors.LocalEntryNotFoundError("offline"), MissingFileError),
    ):

        def fail(*args: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(MissingFileError) as caught:
            download("someone/model", "concepts.json")
        assert type(caught.value) is kind
