"""Processor of a region language model: messages, images and regions to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from ..conversations import Conversation, read_conversation
from ..errors import InputError
from ..regions import Region
from ..tap.image_processing_tap import TapImageProcessor
from ..tap.processing_tap import TapProcessor
from .encoding import IGNORED, ConversationEncoder, Encoded
from .features import RegionFeatures
from .placeholders import check_tokenizer, find_placeholder
from .templates import template_of

UNLIMITED = 10**7  # tokenizers without a limit state one beyond this


class TapLlmProcessor(ProcessorMixin):
    """TAP's image processor, the LLM's tokenizer, and what a region costs.

    Make it with [`TapLlmProcessor.for_model`], which reads the costs off the model.

    Args:
        image_processor: a [`TapImageProcessor`].
        tokenizer: of the LLM.
        chat_template: name of a bundled template, a file, or the template itself; the tokenizer's own by default.
        region_token_id: placeholder; chosen by [`find_placeholder`] if None.
        tokens_per_region: placeholders of a region.
        tokens_per_image: placeholders of an image.
        max_length: longest conversation that the LLM reads, in tokens; the tokenizer's limit if None.
    """

    def __init__(
        self,
        image_processor: TapImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        region_token_id: int | None = None,
        tokens_per_region: int = 17,
        tokens_per_image: int = 0,
        max_length: int | None = None,
    ) -> None:
        given = chat_template if chat_template is not None else tokenizer.chat_template
        template = template_of(tokenizer, given) if given else None
        super().__init__(image_processor, tokenizer, chat_template=template)
        check_tokenizer(tokenizer)
        if region_token_id is None:
            region_token_id = find_placeholder(tokenizer, template)
        self.region_token_id = region_token_id
        self.tokens_per_region, self.tokens_per_image = tokens_per_region, tokens_per_image
        self.max_length = max_length

    @classmethod
    def for_model(
        cls,
        model: Any,
        tap_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        region_token: str | int | None = None,
    ) -> Self:
        """The processor that fits a model. Chooses the model's placeholder (`config.region_token_id`) if it has none.

        Args:
            model: a [`TapLlmForConditionalGeneration`].
            tap_processor: [`TapProcessor`] or [`TapImageProcessor`] of the TAP.
            tokenizer: of the LLM.
            chat_template: see the class.
            region_token: placeholder by text or id, in place of the automatic choice.

        Raises:
            InputError: the placeholder cannot be used, or is beyond the LLM's vocabulary.
        """
        config = model.config
        given = chat_template if chat_template is not None else tokenizer.chat_template
        template = template_of(tokenizer, given) if given else None
        if region_token is not None or config.region_token_id is None:
            config.region_token_id = find_placeholder(tokenizer, template, region_token)
        chosen, rows = config.region_token_id, model.get_input_embeddings().weight.shape[0]
        if chosen >= rows:
            raise InputError(f"region token {chosen} is beyond the LLM's {rows} embeddings: name another")
        return cls(
            getattr(tap_processor, "image_processor", tap_processor),
            tokenizer,
            chat_template=template,
            region_token_id=chosen,
            tokens_per_region=config.tokens_per_region,
            tokens_per_image=config.tokens_per_image,
            max_length=getattr(config.text_config, "max_position_embeddings", None),
        )

    def __call__(
        self,
        messages: Any = None,
        images: Any = None,
        regions: Any = None,
        return_labels: bool = False,
        add_generation_prompt: bool | None = None,
        padding_side: str | None = None,
        chat_template: str | None = None,
        max_length: int | None = None,
        allow_unused_regions: bool = False,
        region_features: Sequence[RegionFeatures] | None = None,
        return_tensors: str | None = "pt",
        **variables: Any,
    ) -> BatchFeature:
        """Prepare conversations.

        Args:
            messages: one conversation (a list of messages) or a list of them. Content is text or a list of parts:
                `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` (PIL, path, array),
                `{"type": "region", "box": ...}` (any region dict, on the last image before it, or on `"image": k`) and
                `{"type": "region", "index": i}` (region i of `regions`).
            images: pictures for image parts without one; without image parts they come before the first user turn.
                For one conversation a picture or a list, for several a list with one of these each.
            regions: for one conversation a list of region dicts, for several a list of lists.
            return_labels: for training: `labels` on assistant turns, padding on the right.
            add_generation_prompt: end with the header of an assistant turn; by default where the last message is not
                the assistant's and no labels are asked for.
            padding_side: "left" or "right"; by default left, right with labels.
            chat_template: in place of the processor's own.
            max_length: refuse longer conversations, in tokens; the processor's limit by default.
            allow_unused_regions: leave regions out that no part points at, instead of refusing them.
            region_features: in place of images and regions, what was extracted of each conversation's before; parts
                `{"type": "region", "index": i}` point at row i.
            return_tensors: `"pt"`, `"np"` or None.
            variables: of the chat template.

        Returns:
            `input_ids`, `attention_mask` (B, L) and with `return_labels` `labels` (B, L), -100 outside of assistant
            turns; `region_features` and `part_index` where features were given; else, where there are images, also
            `pixel_values`, `original_sizes`, `resized_sizes`, `input_points`, `input_labels`, `region_image_index` of
            [`TapProcessor`], over the images of all conversations, and `part_index` (M,), see
            [`TapLlmModel.get_image_features`].

        Raises:
            InputError: a conversation, image or region that cannot be used, or that is too long.
        """
        template = template_of(self.tokenizer, chat_template if chat_template is not None else self.chat_template)
        encoder = ConversationEncoder(
            self.tokenizer, template, self.region_token_id, self.tokens_per_region, self.tokens_per_image
        )
        limit = max_length if max_length is not None else self._limit()
        conversations, texts = [], []
        if region_features is not None:
            images, regions = _stand_ins(region_features, images, regions)
        batch = _batch(messages, images, regions)
        for index, given in enumerate(batch):
            with _naming(index, len(batch)):
                conversation = read_conversation(*given, allow_unused_regions=allow_unused_regions)
                ends_open = not return_labels and conversation.messages[-1]["role"] != "assistant"
                prompt = ends_open if add_generation_prompt is None else add_generation_prompt
                text = encoder.encode(conversation, prompt, return_labels, **variables)
                _check_length(len(text.ids), limit)
            conversations.append(conversation)
            texts.append(text)
        data = self._pad(texts, padding_side or ("right" if return_labels else "left"))
        if not return_labels:
            del data["labels"]
        if region_features is None:
            return BatchFeature({**data, **self._pictures(conversations)}, tensor_type=return_tensors)
        batch_features = BatchFeature({**data, "part_index": _part_index(conversations)}, tensor_type=return_tensors)
        return BatchFeature({**batch_features, "region_features": _chosen(conversations, region_features)})

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> BatchFeature:
        """The call of the processor, under the name that Transformers has for it; always gives tensors.

        Raises:
            InputError: text is asked for; regions have none.
        """
        if not (kwargs.pop("tokenize", True) and kwargs.pop("return_dict", True)):
            raise InputError("regions are no text: leave tokenize and return_dict at True")
        return self(conversation, chat_template=chat_template, **kwargs)

    def _limit(self) -> int:
        """Longest conversation, in tokens."""
        return min(self.max_length or UNLIMITED, self.tokenizer.model_max_length or UNLIMITED)

    def _pad(self, texts: list[Encoded], side: str) -> dict[str, NDArray[np.int64]]:
        """(B, L) ids, mask and labels."""
        if side not in ("left", "right"):
            raise InputError(f'padding_side must be "left" or "right", got {side!r}')
        length = max(len(text.ids) for text in texts)
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        ids, labels = (np.full((len(texts), length), value, dtype=np.int64) for value in (pad, IGNORED))
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            count = len(text.ids)
            place = slice(0, count) if side == "right" else slice(length - count, length)
            ids[row, place], labels[row, place], mask[row, place] = text.ids, text.labels, 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _pictures(self, conversations: list[Conversation]) -> dict[str, Any]:
        """Tensors of all images and regions; none for text alone."""
        images = [image for conversation in conversations for image in conversation.images]
        if not images:
            return {}
        nested: list[list[Region]] = [[] for _ in images]
        places: list[tuple[int, int]] = []  # image, and number on it, of each region in reading order
        parts: list[tuple[bool, int]] = []
        first_image = 0
        for conversation in conversations:
            first_region = len(places)
            for region, image in zip(conversation.regions, conversation.region_images, strict=True):
                places.append((first_image + image, len(nested[first_image + image])))
                nested[first_image + image].append(region)
            parts += [(p >= 0, first_region + p if p >= 0 else p - first_image) for p in conversation.parts]
            first_image += len(conversation.images)
        row_of = {place: row for row, place in enumerate(sorted(places))}
        part_index = [row_of[places[number]] if is_region else number for is_region, number in parts]
        tensors = TapProcessor(self.image_processor)(images, nested, return_tensors="np")
        return {**tensors, "part_index": np.array(part_index, dtype=np.int64)}

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        rows = ["input_points", "input_labels", "region_image_index", "part_index"]
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, *rows]


def _stand_ins(features: Sequence[RegionFeatures], images: Any, regions: Any) -> tuple[list[Any], list[Any]]:
    """Images without pixels, and regions that are numbers of rows, for conversations whose features are known."""
    if images is not None or regions is not None:
        raise InputError("give either region_features, or images and regions")
    return [[None] * f.num_images for f in features], [[{"row": row} for row in range(len(f))] for f in features]


def _chosen(conversations: Sequence[Conversation], features: Sequence[RegionFeatures]) -> RegionFeatures:
    """Features of the regions that are spoken of, in the order of their first mention."""
    return RegionFeatures.cat(
        [
            rows.select([region["row"] for region in talk.regions])
            for talk, rows in zip(conversations, features, strict=True)
        ]
    )


def _part_index(conversations: Sequence[Conversation]) -> NDArray[np.int64]:
    """(M,) parts of all conversations, where rows are regions in the order of first mention."""
    parts: list[int] = []
    first_image = first_region = 0
    for conversation in conversations:
        parts += [first_region + part if part >= 0 else part - first_image for part in conversation.parts]
        first_image += len(conversation.images)
        first_region += len(conversation.regions)
    return np.array(parts, dtype=np.int64)


@contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Put the number of the conversation in front of an error's message, where there are several."""
    try:
        yield
    except InputError as error:
        if count == 1:
            raise
        raise type(error)(f"conversation {index}: {error}") from error


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise InputError(
            f"the conversation takes {length} tokens, but the LLM reads {limit}: leave out earlier turns, or regions"
        )


def _batch(messages: Any, images: Any, regions: Any) -> list[tuple[Any, Any, Any]]:
    """Per conversation: messages, its list of images or None, its list of regions or None."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("the conversation is empty: give at least one message")
    if not isinstance(messages[0], list | tuple):
        return [(messages, _as_list(images), regions)]
    columns = []
    for name, values in (("images", images), ("regions", regions)):
        if values is not None and (not isinstance(values, list | tuple) or len(values) != len(messages)):
            count = len(values) if isinstance(values, list | tuple) else 1
            raise InputError(f"{name}: got {count} for {len(messages)} conversations; give a list with one entry each")
        columns.append(values if values is not None else [None] * len(messages))
    return [(turns, _as_list(own), rows) for turns, own, rows in zip(messages, *columns, strict=True)]


def _as_list(images: Any) -> list[Any] | None:
    if images is None:
        return None
    return list(images) if isinstance(images, list | tuple) else [images]


__all__ = ["TapLlmProcessor"]
