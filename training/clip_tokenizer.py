"""A small tokenizer in CLIP's form: lower-case byte-level BPE between a token of the start and one of the end."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast

from .byte_level import train_byte_level

# The end must not be token 2: Transformers then takes the text vector from the highest id, as for CLIPs of old.
PAD, START, UNUSED, END = SPECIAL = ("<|pad|>", "<|startoftext|>", "<|unused|>", "<|endoftext|>")


def train_clip_tokenizer(texts: Iterable[str], vocabulary: int, max_length: int = 77) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        texts: what will be said.
        vocabulary: number of tokens, at most; few texts give fewer.
        max_length: longest text in tokens, with start and end.

    Returns:
        A tokenizer with pad 0, start 1 and end 3, which puts start and end around every text; a word has the same
        tokens wherever it stands.

    Raises:
        InputError: a vocabulary without room for every byte.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    core = train_byte_level(texts, vocabulary, SPECIAL, normalizer, prefix_space=True)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, SPECIAL.index(START)), (END, SPECIAL.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=START, eos_token=END, model_max_length=max_length
    )
