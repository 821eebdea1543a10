"""Models that answer questions about regions: language models that chat, and TAP alone with its concept space."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tap_llm.errors import InputError
from tap_llm.hub import OFFICIAL_MODELS, resolve_model
from tap_llm.pipelines import RegionPipeline
from tap_llm.region_llm.adapter_files import is_adapter
from tap_llm.region_llm.chat_loading import load_chat_model
from tap_llm.region_llm.configuration_tap_llm import TapLlmConfig

from .base import describe_model
from .chat_model import ChatModel
from .command import load_pipeline, positive
from .questions import Answerer, Question


class ChatAnswerer:
    """A region language model, greedily; all questions of a batch go through it together.

    Args:
        chat: the model.
    """

    def __init__(self, chat: ChatModel) -> None:
        self.chat = chat

    def settings(self) -> dict[str, Any]:
        """Its longest answer."""
        return {"max_new_tokens": self.chat.max_new_tokens}

    def __call__(self, asked: Sequence[tuple[Image.Image, list[Question]]]) -> list[list[str]]:
        """Answers to the questions about each picture."""
        dialogues, features = [], []
        for image, questions in asked:
            if not questions:
                continue
            seen = self.chat.read(image, [region for question in questions for region in question.regions]).features
            start = 0
            for question in questions:
                rows = range(start, start + len(question.regions))
                dialogues.append(question.messages())
                features.append(seen.select(rows))
                start = rows.stop
        answers = iter(self.chat.answer(dialogues, features))
        return [[next(answers) for _ in questions] for _, questions in asked]


class ConceptAnswerer:
    """TAP alone: to questions about one region each, the best name of its concept space; no language model.

    Args:
        pipe: with a concept space.

    Raises:
        InputError: without one.
    """

    def __init__(self, pipe: RegionPipeline) -> None:
        if pipe.concepts is None:
            raise InputError("the model has no concept space to name regions from: name one with --concepts")
        self.pipe = pipe

    def settings(self) -> dict[str, Any]:
        """That names are concepts."""
        return {"answers": "concepts"}

    def __call__(self, asked: Sequence[tuple[Image.Image, list[Question]]]) -> list[list[str]]:
        """Names of the regions of each picture."""
        named = []
        for image, questions in asked:
            regions = [region for question in questions for region in question.regions]
            results: Any = self.pipe(image, regions, captions=False) if regions else []
            named.append([result["concept"] for result in results])
        return named


def chats(name: str) -> bool:
    """Whether a model's name stands for a region language model; one that cannot be found does not."""
    if name in OFFICIAL_MODELS or is_adapter(name):
        return name not in OFFICIAL_MODELS
    try:
        config, _ = TapLlmConfig.get_config_dict(resolve_model(name))
    except (InputError, OSError, ValueError):
        return False
    return bool(config.get("model_type") == TapLlmConfig.model_type)


# The command


def chat_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add what commands of chat benchmarks have beside `common_arguments`."""
    add = parser.add_argument
    add("--images", type=Path, help="folder of the pictures [that of --data]")
    add("--max-new-tokens", type=positive, default=max_new_tokens, metavar="N", help=f"[{max_new_tokens}]")


def load_chat(args: argparse.Namespace) -> ChatModel:
    """The region language model of the command line.

    Raises:
        InputError: it cannot be used.
    """
    model, processor = load_chat_model(args.model, args.device, args.dtype)
    return ChatModel(model, processor, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)


def load_answerer(
    args: argparse.Namespace, alone: Callable[[RegionPipeline], Answerer] = ConceptAnswerer
) -> tuple[Answerer, dict[str, Any]]:
    """The model of the command line, whether it chats or not, and its description.

    Args:
        args: of `common_arguments` and `chat_arguments`.
        alone: how a TAP without a language model answers.

    Raises:
        InputError: it cannot be used.
    """
    if chats(args.model):
        chat = load_chat(args)
        return ChatAnswerer(chat), describe_model(chat, args.model)
    pipe = load_pipeline(args)
    return alone(pipe), describe_model(pipe, args.model)
