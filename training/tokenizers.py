"""A small tokenizer for caption decoders that start fresh."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tap_llm.errors import InputError
from tap_llm.tap.tokenization import load_sentencepiece_tokenizer

# Plain words, so that the tokenizer does not fall apart on other English.
_WORDS = """
the a an of and or in on is are was at to by with without it this that there no not left right top bottom center
middle front behind near next under over above below inside outside picture photo image drawing object thing shape
background sky grass water person man woman child hand face head dog cat bird horse car bus train bike road house door
window wall floor table chair bed book cup bottle bowl plate food fruit apple banana tree flower leaf light dark
bright gray big little long short round flat old new one two three four five many some wooden metal glass paper
plastic shirt pants shoes hat bag standing sitting walking running holding wearing looking made color
"""
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
# TAP pads with the last piece. Pieces of one character end the vocabulary, the rarest last, and of those the highest:
_PAD = "\U0010fffd"  # so this one is it, whatever the captions hold


def train_tokenizer(
    captions: Iterable[str], vocabulary: int, folder: Path, again: bool = False
) -> PreTrainedTokenizerFast:
    """Train a SentencePiece BPE on captions and plain words; ids: unk 0, bos 1, eos 2, pad last.

    Args:
        captions: what will be said.
        vocabulary: number of pieces.
        folder: where the SentencePiece model is put; one that is there already is taken instead.
        again: train in any case.

    Returns:
        The tokenizer.

    Raises:
        InputError: the captions do not give that many pieces, or need more.
    """
    model = folder / "tokenizer.model"
    if again or not model.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [*captions, *_WORDS.split() * 20, *_CHARACTERS * 2, _PAD]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _train("\n".join(lines), vocabulary, Path(scratch))
            os.replace(Path(scratch) / model.name, model)
    return load_sentencepiece_tokenizer(model, vocabulary)


def _train(corpus: str, vocabulary: int, folder: Path) -> None:
    """Put `tokenizer.model` into a folder."""
    import sentencepiece

    (folder / "corpus.txt").write_text(corpus, encoding="utf-8")
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe",
            vocab_size=vocabulary, character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity",
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(
            f"the captions make no tokenizer of {vocabulary} pieces ({error}); set "
            "model.overrides.text_config.vocab_size, or give more captions"
        ) from None
