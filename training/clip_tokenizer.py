"""A small tokenizer in CLIP's form: lower-case byte-level BPE between a token of the start and one of the end."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tap_llm.errors import InputError

# The end must not be token 2: Transformers then takes the text vector from the highest id, as for CLIPs of old.
PAD, START, UNUSED, END = SPECIAL = ("<|pad|>", "<|startoftext|>", "<|unused|>", "<|endoftext|>")
LEAST = len(SPECIAL) + 256  # every byte has a token


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
    if vocabulary < LEAST:
        raise InputError(f"model.vocabulary must be at least {LEAST}: every byte needs a token; got {vocabulary}")
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, SPECIAL.index(START)), (END, SPECIAL.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=START, eos_token=END, model_max_length=max_length
    )
