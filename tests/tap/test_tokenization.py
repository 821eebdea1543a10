"""Tokenizers converted from SentencePiece give the ids of SentencePiece."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tap_llm.errors import InputError, MissingFileError
from tap_llm.tap.tokenization import (
    encode_captions,
    is_official_tokenizer,
    load_sentencepiece_tokenizer,
    load_tokenizer,
)

SHARED = Path(__file__).resolve().parents[3] / "shared"
OFFICIAL = SHARED / "goldens" / "tokenizer" / "tokenizer.model"
STRINGS = SHARED / "goldens" / "tap_tiny" / "strings.json"
needs_official = pytest.mark.skipif(not OFFICIAL.is_file(), reason="the official tokenizer is not in shared/goldens")

COLOURS = ("red", "green", "blue", "white", "brown", "striped", "wooden", "small")
THINGS = ("bus", "dog", "chair", "café table", "kite", "umbrella", "man's hat", "T-shirt", "door")
ALPHABET = "  abcdefghijklmnopqrstuvwxyz ABC.,'-<>/s0123 éñ漢字🙂\t\n▁½ﬁ"


def train(path: Path, **options: Any) -> Path:
    rng = random.Random(0)
    lines = [f"a {rng.choice(COLOURS)} {rng.choice(THINGS)} on the {rng.choice(THINGS)}" for _ in range(2000)]
    model = io.BytesIO()
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, **identity, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


def random_texts(count: int, words: list[str]) -> list[str]:
    rng = random.Random(1)
    texts = []
    for number in range(count):
        letters = "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(30)))
        pieces = "".join(rng.choice(words) for _ in range(rng.randrange(8))).replace("▁", " ")
        texts.append(letters if number % 2 else pieces)
    return texts


def assert_same_ids(tokenizer: PreTrainedTokenizerBase, path: Path, count: int) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = random_texts(count, [sp.id_to_piece(i) for i in range(3, sp.get_piece_size()) if not sp.is_byte(i)])
    expected = [sp.encode(text) for text in texts]
    assert encode_captions(tokenizer, texts, 10_000) == [[1, *ids, 2] for ids in expected]
    without_unknown = [ids for ids in expected if 0 not in ids]
    assert [tokenizer.decode(ids) for ids in without_unknown] == [sp.decode(ids) for ids in without_unknown]


@pytest.mark.parametrize(
    "options",
    [{}, {"byte_fallback": False, "vocab_size": 120}, {"normalization_rule_name": "nmt_nfkc"},
     {"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}, {"split_digits": True}],
    ids=["plain", "no_bytes", "nfkc", "collapse_spaces", "no_prefix", "digits"],
)  # fmt: skip
def test_small_models(tmp_path: Path, options: dict[str, Any]) -> None:
    path = train(tmp_path / "tokenizer.model", **options)
    tokenizer = load_sentencepiece_tokenizer(path)
    assert_same_ids(tokenizer, path, 600)


def test_special_ids_and_saving(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model")
    tokenizer = load_sentencepiece_tokenizer(path, vocab_size=400)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (
        1,
        2,
        399,
        400,
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert reloaded.pad_token_id == 399
    assert reloaded("a red bus").input_ids == tokenizer("a red bus").input_ids
    assert reloaded("a red bus").input_ids[0] == 1 and reloaded("a red bus").input_ids[-1] == 2
    assert_same_ids(reloaded, path, 200)


def test_names_of_special_tokens_are_ordinary_text(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model")
    tokenizer = load_sentencepiece_tokenizer(path)
    ids = tokenizer(f"</s> {tokenizer.pad_token}", add_special_tokens=False).input_ids
    assert 2 not in ids and ids == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(
        f"</s> {tokenizer.pad_token}"
    )


def test_truncation_keeps_the_length_and_ends_with_eos(tmp_path: Path) -> None:
    tokenizer = load_sentencepiece_tokenizer(train(tmp_path / "tokenizer.model"))
    whole = encode_captions(tokenizer, ["a red bus on the chair"], 100)[0]
    for length in range(2, len(whole)):
        assert encode_captions(tokenizer, ["a red bus on the chair"], length)[0] == [*whole[: length - 1], 2]
    assert encode_captions(tokenizer, ["a red bus on the chair"], len(whole))[0] == whole
    assert encode_captions(tokenizer, [], 5) == [] and encode_captions(tokenizer, [""], 5) == [[1, 2]]
    with pytest.raises(InputError, match="at least 2"):
        encode_captions(tokenizer, ["a"], 1)


def test_load_tokenizer_takes_what_users_have(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model")
    expected = load_tokenizer(path)("a red bus").input_ids
    assert load_tokenizer(tmp_path)("a red bus").input_ids == expected  # a folder with tokenizer.model
    load_tokenizer(path).save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", 400)("a red bus").input_ids == expected
    assert load_tokenizer(tmp_path / "saved" / "tokenizer.json", 400)("a red bus").input_ids == expected
    with pytest.raises(InputError, match="has 400 pieces, but the caption decoder has 32000"):
        load_tokenizer(tmp_path / "saved", 32000)


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no tokenizer file"):
        load_sentencepiece_tokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"bad\.model is not a SentencePiece model"):
        load_sentencepiece_tokenizer(tmp_path / "bad.model")
    path = train(tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match="has 400 pieces, but the caption decoder has 32000"):
        load_sentencepiece_tokenizer(path, vocab_size=32000)
    with pytest.raises(InputError, match="not a BPE model"):
        load_sentencepiece_tokenizer(
            train(tmp_path / "unigram.model", model_type="unigram", vocab_size=45, byte_fallback=False)
        )
    with pytest.raises(InputError, match="lacks"):
        load_sentencepiece_tokenizer(train(tmp_path / "no_bos.model", bos_id=-1))
    with pytest.raises(InputError, match="cannot be converted"):
        load_sentencepiece_tokenizer(train(tmp_path / "odd.model", user_defined_symbols=["bus"]))
    assert not is_official_tokenizer(path)


@pytest.fixture(scope="module")
def official() -> PreTrainedTokenizerBase:
    return load_sentencepiece_tokenizer(OFFICIAL, vocab_size=32000)


@needs_official
def test_official_tokenizer_on_thousands_of_strings(official: PreTrainedTokenizerBase) -> None:
    assert is_official_tokenizer(OFFICIAL)
    assert (official.bos_token_id, official.eos_token_id, official.pad_token_id) == (1, 2, 31999)
    assert official("the rabbit is white and brown").input_ids == [
        1,
        278,
        27127,
        277,
        338,
        4796,
        322,
        17354,
        2,
    ]
    assert_same_ids(official, OFFICIAL, 4000)


@needs_official
@pytest.mark.skipif(not STRINGS.is_file(), reason="golden strings are not in shared/goldens")
def test_official_tokenizer_matches_the_reference(official: PreTrainedTokenizerBase) -> None:
    cases = json.loads(STRINGS.read_text(encoding="utf-8"))["text"]["tokenizer"]
    assert cases["pad_id"] == official.pad_token_id
    for case in cases["encode"]:
        assert encode_captions(official, [case["text"]], 10_000) == [case["ids"]]
        assert encode_captions(official, [case["text"]], 20) == [case["ids_limit_20"]]
    for case in cases["decode"]:
        words = case["ids"][1:]
        words = words[: words.index(2)] if 2 in words else words
        if 0 not in words:  # the unknown piece prints differently; captions never contain it
            assert official.decode(words) == case["text"]
