"""Names become folders: bundled, official (checked and converted once), hub ids; and errors that help."""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from tap_llm import hub
from tap_llm.concepts import ConceptSpace
from tap_llm.errors import InputError, MissingFileError
from tap_llm.tap import TapConfig, TapForConditionalGeneration
from tap_llm.tap.conversion import save_official
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.tokenization import TOKENIZER_SHA256

NAME = "tap_vit_b_v1_1"
VOCABULARY = 120


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the official repository would hold, in miniature."""
    folder = tmp_path_factory.mktemp("remote")
    torch.manual_seed(0)
    config = TapConfig(
        vision_config={"image_size": 32, "patch_size": 8, "window_size": 2, "hidden_size": 32,
                       "num_hidden_layers": 4, "num_attention_heads": 2, "output_channels": 64},
        prompt_config={"hidden_size": 64, "image_size": 32},
        mask_decoder_config={"hidden_size": 64, "num_attention_heads": 2, "mlp_dim": 48, "upscale_dim": 16,
                             "head_hidden_size": 64, "semantic_hidden_size": 24, "semantic_embed_dim": 24},
        text_config={"vocab_size": VOCABULARY, "semantic_size": 64, "hidden_size": 64,
                     "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
    )  # fmt: skip
    processor = TapImageProcessor(size={"longest_edge": 32})
    save_official(TapForConditionalGeneration(config), processor, folder / "models" / f"{NAME}.pkl")
    (folder / "concepts").mkdir()
    for name, count in (("merged_2560", 4), ("coco_80", 2)):
        content = [np.eye(24, count, dtype=np.float32), [f"{name} {i}" for i in range(count)]]
        (folder / "concepts" / f"{name}.pkl").write_bytes(pickle.dumps(content))
    return folder


def train_tokenizer(path: Path, vocabulary: int) -> Path:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), size=6)) for _ in range(400)]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, model_type="bpe", vocab_size=vocabulary,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    return path


@pytest.fixture
def downloads(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache, published hashes of the miniature, and a hub that records what is asked of it."""
    monkeypatch.setenv("TAP_LLM_HOME", str(tmp_path / "home"))
    content = (remote / "models" / f"{NAME}.pkl").read_bytes()
    published = replace(
        hub.OFFICIAL_MODELS[NAME],
        md5_prefix=hashlib.md5(content).hexdigest()[:6],
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(hub.OFFICIAL_MODELS, NAME, published)
    asked: list[str] = []

    def fake(repo: str, file: str, **options: str) -> str:
        assert repo == "BAAI/tokenize-anything"
        asked.append(file)
        return str(remote / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    return asked


def offline(repo: str, file: str, **options: str) -> str:
    raise LocalEntryNotFoundError("cannot reach the hub\nsecond line")


def test_official_table_is_what_was_published() -> None:
    assert set(hub.OFFICIAL_MODELS) == {
        f"tap_vit_{size}" for size in ("b_v1_0", "l_v1_0", "b_v1_1", "l_v1_1", "h_v1_1")
    }
    model = hub.OFFICIAL_MODELS["tap_vit_l_v1_1"]
    assert (model.file, model.size, model.md5_prefix) == ("models/tap_vit_l_v1_1.pkl", 811_637_487, "c1d41f")
    assert model.url == "https://huggingface.co/BAAI/tokenize-anything" and model.licence == "Apache-2.0"
    assert all(entry.sha256 is None or len(entry.sha256) == 64 for entry in hub.OFFICIAL_MODELS.values())
    assert hub.OFFICIAL_CONCEPTS == ("merged_2560", "lvis_1203", "coco_80")


def test_official_name_is_downloaded_checked_and_converted_once(downloads: list[str]) -> None:
    folder = Path(hub.resolve_model(NAME))
    assert (folder / "model.safetensors").is_file() and folder.is_relative_to(hub.home())
    assert len(ConceptSpace.from_pretrained(folder)) == 4 and not (folder / "tokenizer.json").exists()
    assert sorted(downloads) == ["concepts/merged_2560.pkl", f"models/{NAME}.pkl"]
    assert hub.resolve_model(NAME) == str(folder) and len(downloads) == 2  # the second time nothing is fetched


def test_choices_get_their_own_folders(downloads: list[str], remote: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.pkl"
    own.write_bytes(pickle.dumps([np.eye(24, 3), ["x", "y", "z"]]))
    folders = {
        hub.resolve_model(NAME),
        hub.resolve_model(NAME, concepts="coco_80"),
        hub.resolve_model(NAME, concepts=own),
    }
    assert sorted(len(ConceptSpace.from_pretrained(folder)) for folder in folders) == [2, 3, 4]
    own.write_bytes(pickle.dumps([np.eye(24, 5), list("abcde")]))  # another content is another choice
    assert len(ConceptSpace.from_pretrained(hub.resolve_model(NAME, concepts=own))) == 5


def test_tokenizer_of_the_wrong_size_is_refused(downloads: list[str], tmp_path: Path) -> None:
    wrong = train_tokenizer(tmp_path / "tokenizer.model", VOCABULARY + 1)
    with pytest.raises(InputError, match=f"has {VOCABULARY + 1} pieces, but .* has {VOCABULARY}"):
        hub.resolve_model(NAME, tokenizer=wrong)
    with pytest.raises(MissingFileError, match="no tokenizer at"):
        hub.resolve_model(NAME, tokenizer=tmp_path / "absent.model")
    assert not (hub.home() / "converted").exists()


@pytest.fixture
def fitting_tokenizer(tmp_path: Path) -> Path:
    return train_tokenizer(tmp_path / "tokenizer.model", VOCABULARY)


def test_another_tokenizer_warns(
    downloads: list[str], fitting_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tap_llm"):
        folder = Path(hub.resolve_model(NAME, tokenizer=fitting_tokenizer))
    assert TOKENIZER_SHA256 in caplog.text and (folder / "tokenizer.json").is_file()


def test_tokenizer_in_the_download_folder_is_found(downloads: list[str], fitting_tokenizer: Path) -> None:
    without = hub.resolve_model(NAME)
    placed = hub.home() / "downloads" / "tokenizer.model"
    placed.parent.mkdir(parents=True)
    placed.write_bytes(fitting_tokenizer.read_bytes())
    folder = Path(hub.resolve_model(NAME))
    assert str(folder) != without and (folder / "tokenizer.json").is_file()


def test_files_that_the_user_placed_are_used_offline(
    downloads: list[str], remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for file in (f"models/{NAME}.pkl", "concepts/merged_2560.pkl"):
        placed = hub.home() / "downloads" / file
        placed.parent.mkdir(parents=True, exist_ok=True)
        placed.write_bytes((remote / file).read_bytes())
    assert (Path(hub.resolve_model(NAME)) / "config.json").is_file()


def test_offline_message_says_what_to_put_where(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(MissingFileError) as error:
        hub.resolve_model(NAME)
    message = str(error.value)
    assert f"models/{NAME}.pkl" in message and "HF_ENDPOINT" in message and "\n" not in message
    assert str(hub.home() / "downloads" / "concepts" / "merged_2560.pkl") in message
    assert str(hub.home() / "downloads" / "models" / f"{NAME}.pkl") in message


@pytest.mark.parametrize("wrong", [{"md5_prefix": "000000"}, {"sha256": "0" * 64}])
def test_wrong_hash_is_refused(downloads: list[str], monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    monkeypatch.setitem(hub.OFFICIAL_MODELS, NAME, replace(hub.OFFICIAL_MODELS[NAME], **wrong))
    with pytest.raises(InputError, match="not the published tap_vit_b_v1_1: its (MD5|SHA-256) is") as error:
        hub.resolve_model(NAME)
    assert "000000" in str(error.value) and "download it again" in str(error.value)
    assert not (hub.home() / "converted").exists()


def test_unknown_sha256_is_not_checked(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.OFFICIAL_MODELS, NAME, replace(hub.OFFICIAL_MODELS[NAME], sha256=None))
    assert (Path(hub.resolve_model(NAME)) / "config.json").is_file()


def test_concurrent_conversions_share_the_result(downloads: list[str]) -> None:
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(hub.resolve_model(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == 1
    assert [path.name for path in (hub.home() / "converted").iterdir()] == [Path(results[0]).name]


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAP_LLM_HOME", str(tmp_path / "a"))
    assert hub.home() == tmp_path / "a"
    monkeypatch.delenv("TAP_LLM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert hub.home() == tmp_path / "b" / "tap_llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.home() == Path.home() / ".cache" / "tap_llm"


def test_folders_hub_ids_and_bundled_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        hub.resolve_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert hub.resolve_model(tmp_path / "model") == str(tmp_path / "model")
    assert hub.resolve_model("someone/some-model.v2") == "someone/some-model.v2"
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    assert hub.bundled_models() == ["model"] and hub.resolve_model("model") == str(tmp_path / "model")
    with pytest.raises(InputError, match="official names only"):
        hub.resolve_model("model", concepts="coco_80")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tap_vit_b_v11", "did you mean tap_vit_b_v1_1?"),
        ("TAP_ViT_L_v1_1", "did you mean tap_vit_l_v1_1?"),
        ("zebra", r"unknown model 'zebra'\. Known names: .*tap_vit_h_v1_1"),
        ("./no/such/folder", "unknown model"),
        ("/no/such/folder", "or a hub id"),
        ("a/b/c", "unknown model"),
        ("", "unknown model"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hub.resolve_model(name)


def test_a_checkpoint_file_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(b"x")
    with pytest.raises(InputError, match="tap-llm convert"):
        hub.resolve_model(tmp_path / "w.pkl")


def test_unknown_concepts(downloads: list[str]) -> None:
    with pytest.raises(MissingFileError, match="one of merged_2560, lvis_1203, coco_80"):
        hub.resolve_model(NAME, concepts="coco80")


@pytest.mark.parametrize("error", [OSError("no route"), ConnectionError(), LocalEntryNotFoundError("x")])
def test_download_errors_become_one_message(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(repo: str, file: str, **options: str) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(MissingFileError, match="cannot download config.json from https://huggingface.co/a/b"):
        hub.download("a/b", "config.json")
