"""A dialogue about pictures: turn by turn, regions as you go, nothing computed twice.

    session = ChatSession(model, processor)
    session.add_image("photo.jpg")
    session.add_region({"box": [40, 30, 300, 280]})
    session.ask("What is this?")
    session.add_region({"points": [[120, 80]]})
    session.ask("Is region 2 to the left of region 1?", stream=print)
    session.save("talk.json")

TAP encodes a picture once. The LLM's cache is kept from turn to turn: only what is new of the conversation is read,
as far as the chat template leaves earlier turns as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import TextStreamer

from ..errors import InputError
from ..images import load_image
from ..regions import Region
from .seen import SeenRegions
from .session_files import read_messages, write_messages
from .turn_cache import TurnCache

Message = dict[str, Any]
Part = dict[str, Any]
MAX_NEW_TOKENS = 128


class ChatSession:
    """One dialogue.

    Args:
        model: a [`TapLlmForConditionalGeneration`], in eval mode.
        processor: its [`TapLlmProcessor`].
        chat_template: in place of the processor's own: a bundled name, a file or the template itself.
        system: text of a system message in front, for LLMs that take one.
        generation: options of `generate`; by default greedy, up to 128 new tokens.

    Attributes:
        messages: the conversation so far, as [`TapLlmProcessor`] takes it.
    """

    def __init__(
        self, model: Any, processor: Any, chat_template: str | None = None, system: str | None = None, **generation: Any
    ) -> None:
        self.model, self.processor, self.chat_template = model, processor, chat_template
        self.generation = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, **generation}
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._pending: list[Part] = []  # of the next question
        self._seen = SeenRegions(model, processor)
        self._cache = TurnCache()

    def add_image(self, image: Any) -> int:
        """Show a picture, with the next question. TAP encodes it now.

        Args:
            image: anything that [`load_image`] takes.

        Returns:
            Its number, from 0.

        Raises:
            InputError: not an image, or damaged.
        """
        self._pending.append(self._image_part(image))
        return self._seen.num_images - 1

    def add_region(self, region: Region, image: int | None = None) -> int:
        """Point at something, with the next question.

        Args:
            region: a region dict.
            image: number of its picture; the last one by default.

        Returns:
            Its number, from 1: questions and answers speak of "region 1".

        Raises:
            InputError: there is no such picture, or the region cannot be used on it.
        """
        part = self._region_part(region, image)
        number = self._seen.num_regions
        self._pending += [_text(f"region {number}: "), part, _text("\n")]
        return number

    def ask(self, question: str, stream: Callable[[str], None] | None = None, **generation: Any) -> str:
        """Ask, and get the answer; both become part of the conversation.

        Args:
            question: text.
            stream: called with each piece of the answer, as soon as it is there.
            generation: options of `generate`, in place of the session's.

        Raises:
            InputError: an empty question, one that the chat template refuses, or a conversation too long for the LLM.
                The conversation is then as it was.
        """
        if not question.strip():
            raise InputError("the question is empty: ask something")
        messages = [*self.messages, {"role": "user", "content": [*self._pending, _text(question)]}]
        inputs, parts = self._inputs(messages)
        ids: Tensor = inputs["input_ids"]
        options = {"eos_token_id": self._ends(), **self.generation, **generation}
        options["max_new_tokens"] = self._room(ids.shape[1], options["max_new_tokens"])
        if stream is not None:
            options["streamer"] = _Streamer(self.processor.tokenizer, stream)
        reuse = (options.get("num_beams") or self.model.generation_config.num_beams or 1) == 1
        cache = self._cache.take(ids[0].tolist(), parts) if reuse else None
        output = self.model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, **options)
        sequence = output.sequences[0]
        if reuse:
            self._cache.keep(output.past_key_values, sequence.tolist(), parts)
        answer = self.processor.tokenizer.decode(sequence[ids.shape[1] :], skip_special_tokens=True).strip()
        self.messages, self._pending = [*messages, {"role": "assistant", "content": [_text(answer)]}], []
        return answer

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON: messages with their regions, pictures by their paths.

        Pictures that are not from files are written beside it.

        Raises:
            InputError: it cannot be written.
        """
        waiting = [{"role": "user", "content": self._pending}] if self._pending else []
        write_messages([*self.messages, *waiting], Path(path))

    @classmethod
    def load(cls, path: str | Path, model: Any, processor: Any, **settings: Any) -> Self:
        """Go on with a saved conversation.

        Args:
            path: from [`ChatSession.save`].
            model: see the class, as the rest.
            processor: of the model.
            settings: of the session.

        Raises:
            InputError: not such a file, or a picture is not there any more.
        """
        session = cls(model, processor, **settings)
        session.messages = [session._restored(message) for message in read_messages(Path(path))]
        if session.messages and session.messages[-1]["role"] == "user":  # added, but nothing was asked yet
            session._pending = session.messages.pop()["content"]
        return session

    def _image_part(self, image: Any) -> Part:
        picture = load_image(image)
        self._seen.add_image(picture)
        return {"type": "image", "image": picture, **({"path": str(image)} if isinstance(image, str | Path) else {})}

    def _region_part(self, region: Region, image: int | None) -> Part:
        form, number = self._seen.add_region(region, image)
        return {**form, "type": "region", "image": number}

    def _restored(self, message: Message) -> Message:
        """A message from a file, after its pictures and regions went through TAP."""
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            form = {key: value for key, value in part.items() if key not in ("type", "image")}
            if part["type"] == "image":
                part = self._image_part(part["path"])
            elif part["type"] == "region":
                part = self._region_part(form, part.get("image"))
            parts.append(part)
        return {**message, "content": parts}

    def _inputs(self, messages: list[Message]) -> tuple[dict[str, Any], list[int]]:
        """Tensors of the whole conversation, and its images and regions in order; TAP has seen them already."""
        known = {"region_features": [self._seen.features()]} if self._seen.num_images else {}
        inputs = self.processor(
            [_numbered(messages)], chat_template=self.chat_template, add_generation_prompt=True, **known
        )
        parts = inputs["part_index"].tolist() if known else []
        if not self._seen.num_regions and not self.model.config.tokens_per_image:  # nothing of a picture is read
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        device = self.model.get_input_embeddings().weight.device
        return {key: value.to(device) for key, value in inputs.items()}, parts

    def _room(self, length: int, wanted: int) -> int:
        """Tokens that an answer may have."""
        limits = (self.processor.max_length, getattr(self.model.config.text_config, "max_position_embeddings", None))
        room = min([limit - length for limit in limits if limit], default=wanted)
        if room < 1:
            raise InputError(f"the conversation takes {length} tokens, all that the LLM reads: begin a new one")
        return min(room, wanted)

    def _ends(self) -> list[int] | None:
        """Ids that end an answer: the LLM's own, and the tokenizer's."""
        own = self.model.generation_config.eos_token_id
        ids = [*(own if isinstance(own, list) else [own]), self.processor.tokenizer.eos_token_id]
        return sorted({index for index in ids if index is not None}) or None


class _Streamer(TextStreamer):
    """Hands on an answer word by word, without blanks in front."""

    def __init__(self, tokenizer: Any, callback: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.callback, self.begun = callback, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate`."""
        text = text if self.begun else text.lstrip()
        if text:
            self.begun = True
            self.callback(text)


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _numbered(messages: list[Message]) -> list[Message]:
    """The conversation with numbers in place of pictures and regions."""
    result, regions = [], 0
    for message in messages:
        parts = []
        for part in message["content"] if isinstance(message["content"], list) else [_text(message["content"])]:
            if part["type"] == "region":
                parts.append({"type": "region", "index": regions, "image": part["image"]})
                regions += 1
            else:
                parts.append({"type": "image"} if part["type"] == "image" else part)
        result.append({**message, "content": parts})
    return result


__all__ = ["ChatSession"]
