"""The caption decoder's tokenizer: SentencePiece models become ordinary Transformers tokenizers, id by id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError, MissingFileError

TOKENIZER_FILE_NAME = "tokenizer.model"
TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
NO_TOKENIZER_MESSAGE = (
    "captions need the tokenizer of the official weights, which is not part of their checkpoint: "
    f"a SentencePiece file named {TOKENIZER_FILE_NAME} (32,000 pieces, sha256 {TOKENIZER_SHA256}). "
    f"Give it with --tokenizer PATH/{TOKENIZER_FILE_NAME}; masks and concepts work without it"
)

_SPACE = "▁"  # what SentencePiece writes for a space
_MANY = 10_000
# Every converted tokenizer must agree with SentencePiece on these before it is used.
_PROBES = ("a red bus", " two  spaces ", "A man's T-shirt.", "naïve café 漢字 🙂", "tab\tand\nline",
           "</s> <unk> <0x0A>", "ﬁne ½ ²", "", " ", "x▁y ▁ ")  # fmt: skip


@dataclass
class _ModelSpec:
    """The settings in a SentencePiece file that decide how text becomes ids."""

    model_type: int = 1  # 1 unigram, 2 BPE, as in SentencePiece's own format
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value (int or bytes) of each field of a protocol buffer message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
        yield number, message[position : position + size]
        position += size


def _model_spec(model: bytes) -> _ModelSpec:
    """Read the few settings needed from a serialised SentencePiece model; saves a dependency on protobuf."""
    spec = _ModelSpec()
    for number, value in _protobuf_fields(model):
        if number == 2:
            spec.model_type = dict(_protobuf_fields(value)).get(3, 1)
        if number == 3:
            settings = dict(_protobuf_fields(value))
            spec.charsmap = settings.get(2, b"")
            spec.add_dummy_prefix = bool(settings.get(3, 1))
            spec.remove_extra_whitespaces = bool(settings.get(4, 1))
    return spec


def _normalizer(spec: _ModelSpec) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.charsmap:
        steps.append(normalizers.Precompiled(spec.charsmap))
    if spec.remove_extra_whitespaces:
        edges = rf"\A |[ {_SPACE}]+\z"
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(edges), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(spec: _ModelSpec) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    # SentencePiece takes its own prefix off, and all leading spaces if it was told that they mean nothing.
    leading = _MANY if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    return decoders.Sequence([*steps, decoders.Strip(" ", leading, 0)])


def _build_backend(sp: Any, spec: _ModelSpec) -> Tokenizer:
    """The same BPE in the `tokenizers` library."""
    from transformers.tokenization_utils_base import generate_merges

    ids = range(sp.get_piece_size())
    vocab = {sp.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocab, {sp.id_to_piece(i): sp.get_score(i) for i in ids})
    unknown, bos, eos = (sp.id_to_piece(i) for i in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    has_bytes = any(map(sp.is_byte, ids))
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    backend = Tokenizer(model)
    backend.normalizer, backend.decoder = _normalizer(spec), _decoder(spec)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, sp.bos_id()), (eos, sp.eos_id())]
    )
    return backend


def _load_sentencepiece(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    if not path.is_file():
        raise MissingFileError(f"there is no tokenizer file {path}")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        hint = f"give the original {TOKENIZER_FILE_NAME}"
        raise InputError(f"{path} is not a SentencePiece model; {hint}") from None


def _check_vocabulary(path: Path, size: int, expected: int | None) -> None:
    if expected is not None and size != expected:
        reason = f"{path} has {size} pieces, but the caption decoder has {expected}"
        raise InputError(f"{reason}: it belongs to another model")


def load_sentencepiece_tokenizer(path: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece BPE model; ids and decoded text are those of SentencePiece.

    `tokenizer(text)` gives BOS, the pieces, EOS. BOS and EOS are those of the model; the pad is the last
    piece of the vocabulary, as in TAP. Names of special tokens inside a text are ordinary text.

    Args:
        path: the `.model` file.
        vocab_size: number of pieces that the model needs; not checked if None.

    Returns:
        A tokenizer that `save_pretrained` writes as `tokenizer.json`.

    Raises:
        InputError: not a SentencePiece BPE model with BOS and EOS, or of another size.
        MissingFileError: there is no such file.
    """
    path = Path(path)
    sp = _load_sentencepiece(path)
    _check_vocabulary(path, sp.get_piece_size(), vocab_size)
    spec = _model_spec(sp.serialized_model_proto())
    if spec.model_type != 2:
        raise InputError(f"{path} is not a BPE model; train SentencePiece with model_type=bpe")
    if min(sp.unk_id(), sp.bos_id(), sp.eos_id()) < 0:
        raise InputError(f"{path} lacks an unknown, begin or end piece (<unk>, <s>, </s>)")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_build_backend(sp, spec),
        unk_token=sp.id_to_piece(sp.unk_id()),
        bos_token=sp.id_to_piece(sp.bos_id()),
        eos_token=sp.id_to_piece(sp.eos_id()),
        pad_token=sp.id_to_piece(sp.get_piece_size() - 1),
        add_bos_token=True,
        add_eos_token=True,
        split_special_tokens=True,  # SentencePiece reads "</s>" in a text as five characters, and so do we
        clean_up_tokenization_spaces=False,
    )
    for probe in _PROBES:
        if tokenizer(probe, add_special_tokens=False).input_ids != sp.encode(probe):
            reason = f"uses SentencePiece settings that cannot be converted: {probe!r} gets other ids"
            raise InputError(f"{path} {reason}")
    return tokenizer


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a caption decoder from whatever a user has.

    Args:
        path: a SentencePiece `.model` file, or a folder with `tokenizer.json` (or with `tokenizer.model`).
        vocab_size: number of pieces that the model needs; not checked if None.

    Returns:
        The tokenizer.

    Raises:
        InputError: not a tokenizer, or of another size.
        MissingFileError: there is no such file.
    """
    path = Path(path)
    folder = path.parent if path.name == "tokenizer.json" else path
    if not (folder / "tokenizer.json").is_file():
        return load_sentencepiece_tokenizer(path / TOKENIZER_FILE_NAME if path.is_dir() else path, vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files surface as nearly any exception type
        reason = " ".join(str(error).split())
        raise InputError(f"the tokenizer {path} cannot be loaded: {reason}") from error
    _check_vocabulary(path, len(tokenizer), vocab_size)
    return tokenizer


def is_official_tokenizer(path: str | Path) -> bool:
    """Whether a file is, byte for byte, the SentencePiece model of the official weights."""
    path = Path(path)
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_SHA256


def encode_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> list[list[int]]:
    """Captions to ids as in TAP: BOS, pieces, EOS; what is too long is cut and ends with EOS all the same.

    Args:
        tokenizer: from [`load_tokenizer`].
        captions: texts.
        max_length: largest number of ids of a caption, BOS and EOS included; at least 2.

    Returns:
        One list of ids per caption.

    Raises:
        InputError: `max_length` leaves no place for BOS and EOS.
    """
    if max_length < 2:
        raise InputError(f"max_length must be at least 2 (begin and end), got {max_length}")
    if not captions:
        return []
    bos, eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    pieces = tokenizer(list(captions), add_special_tokens=False).input_ids
    return [[bos, *ids[: max_length - 2], eos] for ids in pieces]


__all__ = [
    "NO_TOKENIZER_MESSAGE",
    "TOKENIZER_FILE_NAME",
    "TOKENIZER_SHA256",
    "encode_captions",
    "is_official_tokenizer",
    "load_sentencepiece_tokenizer",
    "load_tokenizer",
]
