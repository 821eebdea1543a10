"""A small tokenizer for language models that start from nothing: byte-level BPE that knows a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tap_llm.errors import InputError
from tap_llm.region_llm.templates import BUNDLED_TEMPLATES

PAD, BEGIN, END = "<|pad|>", "<|im_start|>", "<|im_end|>"  # begin and end as the template "chatml" writes them
REGION = "<|region_placeholder|>"  # `find_placeholder` knows it by its name
SPECIAL = (PAD, BEGIN, END, REGION)
LEAST = len(SPECIAL) + 256  # every byte has a token


def train_chat_tokenizer(texts: Iterable[str], vocabulary: int, template: str = "chatml") -> PreTrainedTokenizerFast:
    """Train byte-level BPE.

    Args:
        texts: what will be said.
        vocabulary: number of tokens, at most; few texts give fewer.
        template: bundled chat template, "plain" or "chatml", which becomes the tokenizer's own.

    Returns:
        A tokenizer with pad 0, begin 1, end 2, and token 3, which no text needs, for regions.

    Raises:
        InputError: an unknown template, or a vocabulary without room for every byte.
    """
    if template not in BUNDLED_TEMPLATES:
        raise InputError(f"model.template must be one of {', '.join(BUNDLED_TEMPLATES)}, got {template!r}")
    if vocabulary < LEAST:
        raise InputError(f"model.vocabulary must be at least {LEAST}: every byte needs a token; got {vocabulary}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BEGIN, eos_token=END)
    tokenizer.chat_template = BUNDLED_TEMPLATES[template]
    return tokenizer


def load_chat_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that `save_pretrained` wrote.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # damaged files surface as nearly any exception type
        raise InputError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}") from error
