"""A small tokenizer for caption decoders that start fresh."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

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
_PAD = "¤"  # TAP pads with the last piece: a character that no caption needs


def train_tokenizer(captions: Iterable[str], vocabulary: int, folder: Path) -> PreTrainedTokenizerFast:
    """Train a SentencePiece BPE on captions and plain words; ids: unk 0, bos 1, eos 2, pad last.

    Args:
        captions: what will be said.
        vocabulary: number of pieces.
        folder: where the SentencePiece model is put; one that is there already is taken instead.

    Returns:
        The tokenizer.
    """
    import sentencepiece

    model = folder / "tokenizer.model"
    if not model.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join([*captions, *_WORDS.split() * 20, *_CHARACTERS * 2, _PAD]), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(model.with_suffix("")), model_type="bpe", vocab_size=vocabulary,
            character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity",
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        )  # fmt: skip
        corpus.unlink()
    return load_sentencepiece_tokenizer(model, vocabulary)
