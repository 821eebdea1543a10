"""A small tokenizer for language models that start from nothing: byte-level BPE that knows a chat template."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from tap_llm.errors import InputError
from tap_llm.region_llm.templates import BUNDLED_TEMPLATES

from .byte_level import train_byte_level

PAD, BEGIN, END = "<|pad|>", "<|im_start|>", "<|im_end|>"  # begin and end as the template "chatml" writes them
REGION = "<|region_placeholder|>"  # `find_placeholder` knows it by its name
SPECIAL = (PAD, BEGIN, END, REGION)


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
    core = train_byte_level(texts, vocabulary, SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BEGIN, eos_token=END)
    tokenizer.chat_template = BUNDLED_TEMPLATES[template]
    return tokenizer
