"""A region language model as benchmarks use it: a picture is read once, many questions are answered at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from tap_llm.concepts import ConceptSpace
from tap_llm.data.messages import Message
from tap_llm.errors import InputError
from tap_llm.hub import resolve_model
from tap_llm.loading import load_concepts
from tap_llm.region_llm.chat_loading import load_chat_model
from tap_llm.region_llm.features import RegionFeatures
from tap_llm.region_llm.modeling_tap_llm import TapLlmForConditionalGeneration
from tap_llm.region_llm.processing_tap_llm import TapLlmProcessor
from tap_llm.regions import Region
from tap_llm.tap.outputs import take_slots
from tap_llm.tap.processing_tap import TapProcessor


@dataclass(frozen=True, eq=False)
class Reading:
    """What TAP knows of the regions of a picture.

    Attributes:
        features: of N regions on one picture.
        names: N names that TAP itself gives them; None without a concept space.
    """

    features: RegionFeatures
    names: list[str] | None


class ChatModel:
    """See the module's head.

    Args:
        model: in eval mode.
        processor: its own.
        concepts: names for TAP's own answers; they are left out without.
        max_new_tokens: longest answer.
        batch_size: questions answered at a time.
    """

    def __init__(
        self,
        model: TapLlmForConditionalGeneration,
        processor: TapLlmProcessor,
        concepts: ConceptSpace | None = None,
        max_new_tokens: int = 48,
        batch_size: int = 64,
    ) -> None:
        self.model, self.processor, self.concepts = model, processor, concepts
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @classmethod
    def from_pretrained(
        cls, name: str, concepts: str | None = None, device: str | None = None, dtype: str | None = None, **options: int
    ) -> Self:
        """Load a model.

        Args:
            name: adapter, folder or hub id of a whole model, or a bundled name.
            concepts: concept space; by default that of the TAP which the model was made from, if it can be found.
            device: as [`load_chat_model`].
            dtype: likewise.
            options: see the class.

        Raises:
            InputError: a model or concept space that cannot be used.
        """
        model, processor = load_chat_model(name, device, dtype)
        space = load_concepts(concepts, "") if concepts is not None else _concepts_of(model)
        return cls(model, processor, space, **options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @torch.no_grad()
    def read(self, image: Image.Image, regions: Sequence[Region]) -> Reading:
        """Run TAP; the picture is encoded once."""
        tap = self.model.model.tap
        inputs = dict(TapProcessor(self.processor.image_processor)([image], [list(regions)]))
        pixels: Tensor = inputs.pop("pixel_values")
        images = tap.get_image_embeddings(pixels.to(tap.device, tap.dtype))
        prompts = {key: inputs[key] for key in ("input_points", "input_labels", "region_image_index")}
        features = self.model.extract_features(
            image_embeddings=images, resized_sizes=inputs["resized_sizes"], **prompts
        )
        return Reading(features, self._names(images, prompts))

    def _names(self, images: Tensor, prompts: dict[str, Tensor]) -> list[str] | None:
        if self.concepts is None:
            return None
        tap = self.model.model.tap
        on_device = {key: value.to(tap.device) for key, value in prompts.items()}
        outputs = tap(image_embeddings=images, return_dict=True, **on_device)
        assert outputs.semantic_embeds is not None and outputs.slots is not None
        names, _ = self.concepts.classify(take_slots(outputs.semantic_embeds, outputs.slots))
        return [name for [name] in names]

    @torch.no_grad()
    def answer(self, dialogues: Sequence[list[Message]], features: Sequence[RegionFeatures]) -> list[str]:
        """Greedy answers to the last message of each dialogue, with the features of its regions."""
        answers: list[str] = []
        for start in range(0, len(dialogues), self.batch_size):
            rows = slice(start, start + self.batch_size)
            answers += self._answer(list(dialogues[rows]), list(features[rows]))
        return answers

    def _answer(self, dialogues: list[list[Message]], features: list[RegionFeatures]) -> list[str]:
        inputs = self.processor(dialogues, region_features=features, allow_unused_regions=True)
        on_device = {key: value.to(self.device) for key, value in inputs.items()}
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = self.model.generate(
            **on_device, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad,
            eos_token_id=self._ends(),
        )  # fmt: skip
        said = ids[:, on_device["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]

    def _ends(self) -> list[int] | None:
        """Ids that end an answer: the LLM's own, and the tokenizer's."""
        own: Any = self.model.generation_config.eos_token_id
        known = [*(own if isinstance(own, list) else [own]), self.processor.tokenizer.eos_token_id]
        return sorted({end for end in known if end is not None}) or None


def _concepts_of(model: TapLlmForConditionalGeneration) -> ConceptSpace | None:
    """The concept space of the TAP that a model was made from; None where that is nowhere now."""
    try:
        return load_concepts(None, resolve_model(model.config.tap_name_or_path))
    except InputError:
        return None
