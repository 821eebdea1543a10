"""A checked conversation to ids: text through the tokenizer, marks to placeholders, assistant turns to labels.

The text is cut at its marks and at the edges of assistant turns, and the pieces are tokenized on their own. So a turn
has the same ids while it is generated, in training and as history; ids of earlier turns never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..conversations import Conversation
from ..errors import InputError
from .templates import Span, assistant_spans, render

IGNORED = -100


@dataclass(eq=False)
class Encoded:
    """One conversation as ids.

    Attributes:
        ids: of text and placeholders.
        labels: the ids of assistant turns, -100 elsewhere.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: list[int], learned: bool) -> None:
        """Append ids."""
        self.ids += ids
        self.labels += ids if learned else [IGNORED] * len(ids)


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations for one LLM.

    Args:
        tokenizer: of the LLM.
        template: text of the chat template.
        region_token_id: placeholder.
        tokens_per_region: placeholders of a region.
        tokens_per_image: placeholders of an image.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    region_token_id: int
    tokens_per_region: int
    tokens_per_image: int

    def encode(self, conversation: Conversation, prompt: bool, need_labels: bool, **variables: Any) -> Encoded:
        """Ids of a conversation.

        Args:
            conversation: from `read_conversation`.
            prompt: end with the header of an assistant turn.
            need_labels: assistant turns must be told apart.
            variables: of the chat template.

        Raises:
            InputError: the template does not fit the messages, text contains the placeholder, or labels are needed
                and there is nothing to learn, or the template hides where turns begin.
        """
        text, marked = render(self.tokenizer, self.template, conversation.messages, prompt, **variables)
        spans = marked or assistant_spans(self.tokenizer, self.template, conversation.messages, text, **variables)
        if need_labels and not spans:
            raise InputError(_no_labels(spans))
        found = sorted(int(match[1]) for match in conversation.pattern.finditer(text))
        if found != list(range(len(conversation.parts))):
            raise InputError("the chat template drops or repeats what a message contains: choose another one")
        result = Encoded()
        for piece, part, start in _pieces(text, conversation, spans or []):
            learned = any(first <= start < stop for first, stop in spans or [])
            if part is None:
                result.add(self._text_ids(piece, first=not result.ids), learned)
            else:
                count = self.tokens_per_region if conversation.parts[part] >= 0 else self.tokens_per_image
                result.add([self.region_token_id] * count, learned=False)
        return result

    def _text_ids(self, piece: str, first: bool) -> list[int]:
        ids = encode_piece(self.tokenizer, piece, first)
        if self.region_token_id in ids:
            token = self.tokenizer.convert_ids_to_tokens(self.region_token_id)
            raise InputError(f"the text contains {token!r}, which keeps the place of regions in this model: rewrite it")
        return ids


def _no_labels(spans: list[Span] | None) -> str:
    if spans is None:
        return (
            "the chat template writes earlier turns anew when turns are added, so labels cannot be told: use one with "
            "{% generation %} blocks, or a bundled one (chat_template='chatml' or 'plain')"
        )
    return "labels need an assistant turn, and this conversation has none"


def _pieces(text: str, conversation: Conversation, spans: list[Span]) -> Iterator[tuple[str, int | None, int]]:
    """Text or number of a part, and where it starts."""
    edges = sorted({edge for span in spans for edge in span})
    position = 0
    for match in [*conversation.pattern.finditer(text), None]:
        stop = match.start() if match else len(text)
        cuts = [position, *(edge for edge in edges if position < edge < stop), stop]
        yield from ((text[start:end], None, start) for start, end in pairwise(cuts) if start < end)
        if match:
            yield "", int(match[1]), match.start()
            position = match.end()


def encode_piece(tokenizer: PreTrainedTokenizerBase, piece: str, first: bool) -> list[int]:
    """Ids of a piece of text. SentencePiece puts a space before any text; inside a conversation it must not."""
    ids = tokenizer.encode(piece, add_special_tokens=False)
    if first or not _adds_space(tokenizer):
        return ids
    newline = tokenizer.encode("\n", add_special_tokens=False)
    after_newline = tokenizer.encode("\n" + piece, add_special_tokens=False)
    return after_newline[len(newline) :] if after_newline[: len(newline)] == newline else ids


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return bool(tokens) and tokens[0].startswith("▁")


__all__ = ["IGNORED", "ConversationEncoder", "Encoded", "encode_piece"]
