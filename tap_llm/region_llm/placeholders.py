"""Placeholders: which token of the LLM keeps the place of images and regions, and how rows find their places.

The LLM's vocabulary never grows: a token that it has and that no text needs is put to use.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError

# Tokens that makers of LLMs keep free, or that stand for pictures in sister models.
_RESERVED = re.compile(r"reserved|unused|placeholder|(image|vision|video)_?pad|<SPECIAL_\d+>|\[control_\d+\]", re.I)
# Bytes that no UTF-8 text contains, as byte-level BPE and SentencePiece's byte fallback write them.
_IMPOSSIBLE_BYTES = ("ÿ", "þ", "ý", "ü", "û", "ú", "ù", "ø", "÷", "ö", "õ", "Á", "À", "<0xFF>", "<0xFE>", "<0xFD>")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a tokenizer without words: without its files, Transformers makes an empty one."""
    if not tokenizer.encode("a", add_special_tokens=False):
        where = str(tokenizer.name_or_path or "") or type(tokenizer).__name__
        raise InputError(f"the tokenizer {where} knows no text: its files, such as tokenizer.json, are missing there")


def find_placeholder(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, token: str | int | None = None
) -> int:
    """Id of the token that keeps the place of images and regions.

    Without a choice: a token that is reserved or unused by its name; else one of a byte that text cannot contain; else
    an added special token that nothing needs. Never a token that marks padding or ends, or that the template writes.

    Args:
        tokenizer: of the LLM.
        chat_template: the template in use; the tokenizer's own by default.
        token: the choice of the user, as text or id.

    Raises:
        InputError: the choice cannot be used, there is no such token, or the tokenizer is empty.
    """
    check_tokenizer(tokenizer)
    template = str(chat_template if chat_template is not None else tokenizer.chat_template or "")
    if token is not None:
        return _checked(tokenizer, template, token)
    vocabulary = tokenizer.get_vocab()
    added = sorted(vocabulary.keys() & tokenizer.added_tokens_encoder.keys(), key=lambda text: -vocabulary[text])
    reserved = [text for text in sorted(vocabulary, key=lambda text: -vocabulary[text]) if _RESERVED.search(text)]
    bytes_ = [text for text in _IMPOSSIBLE_BYTES if text in vocabulary and _never_read(tokenizer, vocabulary[text])]
    for text in (*reserved, *bytes_, *added):
        if _problem(tokenizer, template, vocabulary[text]) is None:
            return vocabulary[text]
    raise InputError(
        "this tokenizer has no token to spare for regions: name one that your text never contains (region_token=...)"
    )


def _checked(tokenizer: PreTrainedTokenizerBase, template: str, token: str | int) -> int:
    """The id of a token that the user chose."""
    found = tokenizer.get_vocab().get(token) if isinstance(token, str) else token
    if found is None or found < 0:
        raise InputError(f"region token {token!r} is not in the tokenizer's vocabulary: name one that is")
    problem = _problem(tokenizer, template, found)
    if problem is not None:
        raise InputError(f"region token {token!r} cannot be used: {problem}")
    return found


def _problem(tokenizer: PreTrainedTokenizerBase, template: str, token_id: int) -> str | None:
    """Why a token is needed for something else."""
    for name, text in tokenizer.special_tokens_map.items():
        values = text if isinstance(text, list) else [text]
        if not name.endswith("special_tokens") and token_id in tokenizer.convert_tokens_to_ids(values):
            return f"it is the tokenizer's {name}"
    text = tokenizer.convert_ids_to_tokens(token_id)
    if text and text in tokenizer.added_tokens_encoder and text in template:
        return "the chat template writes it"
    return None


def _never_read(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """The token's own text becomes other tokens: it names a byte, not a character."""
    text = tokenizer.convert_ids_to_tokens(token_id)
    return token_id not in tokenizer.encode(text, add_special_tokens=False)


def placeholder_mask(input_ids: Tensor, token_id: int | None, rows: int | None = None) -> Tensor:
    """Where the placeholders are.

    Args:
        input_ids: (B, L).
        token_id: of the placeholder; None while no processor has chosen it.
        rows: number of image and region tokens that are to take their places; None does not count.

    Returns:
        (B, L) bool.

    Raises:
        ValueError: another number of rows than of placeholders, or no placeholder was chosen.
    """
    if token_id is None:
        if rows:
            raise ValueError(
                "the model does not know its placeholder: set config.region_token_id, or make the processor with "
                "TapLlmProcessor.for_model"
            )
        return torch.zeros_like(input_ids, dtype=torch.bool)
    mask = input_ids == token_id
    if rows is not None and not torch.compiler.is_compiling():
        places = int(mask.sum())
        if places != rows:
            raise ValueError(
                f"the text has {places} placeholders for images and regions, but {rows} tokens were made of them: "
                "text and images must come from the same call of the processor"
            )
    return mask


def gather_parts(region_rows: Tensor, image_rows: Tensor, part_index: Tensor | None) -> Tensor:
    """Put the tokens of regions and images in the order in which the text names them.

    Args:
        region_rows: (N, k, d).
        image_rows: (B, m, d).
        part_index: (M,) region i as i, image b as -1 - b; None for all regions in their order.

    Returns:
        (P, d), one row per placeholder.

    Raises:
        ValueError: an index beyond the regions or images, or none where images have tokens.
    """
    (count, per_region, width), (images, per_image, _) = region_rows.shape, image_rows.shape
    if part_index is None:
        if per_image:
            raise ValueError("images have tokens here: give part_index, which says where in the text they are")
        return region_rows.reshape(-1, width)
    parts = part_index.to(region_rows.device)
    if len(parts) and not (-images <= int(parts.min()) and int(parts.max()) < count):
        raise ValueError(f"part_index names a region or image beyond the {count} regions and {images} images")
    is_region = parts >= 0
    starts = torch.where(is_region, parts * per_region, count * per_region - (1 + parts) * per_image)
    lengths = torch.where(is_region, per_region, per_image)
    firsts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    steps = torch.arange(len(firsts), device=parts.device) - firsts
    table = torch.cat([region_rows.reshape(-1, width), image_rows.reshape(-1, width)])
    return table[starts.repeat_interleave(lengths) + steps]


def prepared_rows(mm_encoder_outputs: dict[str, Any] | None) -> list[Tensor]:
    """Rows (1, d) that `generate` prepared, in a new list; chunks of a long prompt come with one block of rows."""
    prepared = (mm_encoder_outputs or {}).get("image")
    blocks = prepared.pooler_output if prepared is not None else []
    return [row for block in blocks for row in block.split(1)]


def cached_length(input_ids: Tensor, attention_mask: Tensor | None, past_key_values: Any) -> int:
    """How many of the ids (B, L) the cache holds already; 0 where only new ids are given (with a longer mask)."""
    if past_key_values is None:
        return 0
    whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
    return int(past_key_values.get_seq_length()) if whole else 0


__all__ = ["cached_length", "check_tokenizer", "find_placeholder", "gather_parts", "placeholder_mask", "prepared_rows"]
