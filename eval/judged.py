"""What benchmarks have in common whose answers a language model judges: the judge beside the model, and the command."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from .answerers import ChatAnswerer, chat_arguments, load_chat
from .base import Benchmark, Examples, Run, describe_model
from .command import benchmark_parser, common_arguments, evaluate, finish
from .judge import Judge, judge_arguments, load_judge
from .questions import Answerer, RegionQuestions


class JudgedQuestions(RegionQuestions):
    """Questions about regions whose answers are judged.

    Args:
        examples: as [`RegionQuestions`].
        answerer: model under test.
        judge: of its answers.
    """

    def __init__(self, examples: Examples, answerer: Answerer, judge: Judge) -> None:
        super().__init__(examples, answerer)
        self.judge = judge


def chat_parser(name: str, doc: str | None, max_new_tokens: int) -> argparse.ArgumentParser:
    """The parser of a benchmark of models that chat, with a judge."""
    parser = benchmark_parser(name, doc)
    common_arguments(
        parser,
        model="tap-tiny-chat",
        model_help="a model that chats",
        batch="questions answered at once",
        pipeline=False,
    )
    chat_arguments(parser, max_new_tokens)
    judge_arguments(parser)
    return parser


def evaluate_judged(
    benchmark: type[JudgedQuestions], examples: Examples, args: argparse.Namespace, notes: Iterable[str] = ()
) -> Run:
    """Load judge and model, run, and print.

    Args:
        benchmark: its class.
        examples: to evaluate on.
        args: of `chat_parser`.
        notes: lines to print beside the tables.

    Raises:
        InputError: judge or model cannot be used, or as `run`.
    """
    with load_judge(args) as judge:
        chat = load_chat(args)
        asked: Benchmark = benchmark(examples, ChatAnswerer(chat), judge)
        finished = evaluate(asked, args, describe_model(chat, args.model), args.batch_size)
        return finish(finished, args, notes=[*notes, *judge.notes()])
