"""Placeholders: found in any tokenizer, never something that is needed, and safe from the user's text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tap_llm import InputError
from tap_llm.region_llm import find_placeholder
from tap_llm.region_llm.placeholders import gather_parts


def word_tokenizer(*words: str, **options: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **options)


def name_of(tokenizer: Any, **options: Any) -> str:
    return tokenizer.convert_ids_to_tokens(find_placeholder(tokenizer, **options))


@pytest.mark.parametrize("reserved", ["<|reserved_special_token_9|>", "<unused42>", "<|image_pad|>", "<|placeholder1|>",
                                      "<SPECIAL_20>", "[control_8]"])  # fmt: skip
def test_reserved_tokens_come_first(reserved: str) -> None:
    assert name_of(word_tokenizer("<unk>", reserved, "a", "<0xFF>")) == reserved


def test_never_what_is_needed() -> None:
    names = [f"<|reserved_{i}|>" for i in range(4)]
    tokenizer = word_tokenizer("<unk>", *names, pad_token=names[3], eos_token=names[2], bos_token=names[1])
    assert name_of(tokenizer) == names[0]
    tokenizer.add_tokens(names[0])
    tokenizer.chat_template = "{{ '" + names[0] + "' }}"
    with pytest.raises(InputError, match="no token to spare"):
        find_placeholder(tokenizer)


def test_without_reserved_tokens_a_byte_that_text_cannot_contain(bare_tokenizer: Any) -> None:
    chosen = find_placeholder(bare_tokenizer)
    assert bare_tokenizer.convert_ids_to_tokens(chosen) == "ÿ"
    every_character = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x11000)])) + "🙂"
    assert chosen not in bare_tokenizer.encode(every_character)


def test_a_character_of_the_vocabulary_is_not_a_byte() -> None:
    assert (
        name_of(word_tokenizer("<unk>", "ÿ", "<0xFF>", "x", eos_token="</s>", additional_special_tokens=["<a>"]))
        == "<a>"
    )


def test_the_users_choice(chat_tokenizer: Any) -> None:
    assert find_placeholder(chat_tokenizer, token="<|reserved_0|>") == 3
    assert find_placeholder(chat_tokenizer, token=3) == 3
    assert find_placeholder(chat_tokenizer, token=1000) == 1000  # an embedding beyond the tokenizer
    for token, problem in (("<none>", "not in the tokenizer's vocabulary"), ("<|endoftext|>", "pad_token"),
                           ("<|im_end|>", "eos_token"), ("<|im_start|>", "the chat template writes it")):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            find_placeholder(chat_tokenizer, token=token)


def test_parts_are_gathered_in_the_order_of_the_text() -> None:
    regions = torch.arange(6.0).view(3, 2, 1)
    images = torch.arange(10.0, 16.0).view(2, 3, 1)
    rows = gather_parts(regions, images, torch.tensor([-2, 1, -1, 1, 0]))
    assert rows.flatten().tolist() == [13, 14, 15, 2, 3, 10, 11, 12, 2, 3, 0, 1]
    assert gather_parts(regions, images[:, :0], None).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert gather_parts(regions, images, torch.tensor([], dtype=torch.long)).shape == (0, 1)
