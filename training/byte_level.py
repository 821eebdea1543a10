"""Byte-level BPE of one's own, for models that start from nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tap_llm.errors import InputError

from .config import RunConfig
from .distributed import process_state


def train_byte_level(
    texts: Iterable[str], vocabulary: int, special: Sequence[str], normalizer: Any = None, prefix_space: bool = False
) -> Tokenizer:
    """Train byte-level BPE; every byte has a token.

    Args:
        texts: what will be said.
        vocabulary: number of tokens, at most; few texts give fewer.
        special: tokens 0, 1, …
        normalizer: of `tokenizers`, what happens to texts first.
        prefix_space: a word has the same tokens wherever it stands.

    Raises:
        InputError: a vocabulary without room for every byte.
    """
    least = len(special) + 256
    if vocabulary < least:
        raise InputError(f"model.vocabulary must be at least {least}: every byte needs a token; got {vocabulary}")
    core = Tokenizer(models.BPE())
    if normalizer is not None:
        core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return core


def kept_tokenizer(run: RunConfig, make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer in the folder of a run: made by the first process, or found there by a resumed run.

    Raises:
        InputError: it cannot be read.
    """
    folder = Path(run.output_dir) / "tokenizer"
    state = process_state()
    with state.main_process_first():  # the others read its files
        if state.is_main_process and not (run.resume and folder.is_dir()):
            make().save_pretrained(folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that `save_pretrained` wrote.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # damaged files surface as nearly any exception type
        raise InputError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}") from error
