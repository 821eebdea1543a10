"""A language model that judges answers, behind any URL that speaks OpenAI's chat protocol.

    --judge-url http://localhost:8000/v1 --judge-model meta-llama/Llama-3.1-8B-Instruct      # any server of your own
    --judge-url https://api.openai.com/v1 --judge-model gpt-4o-2024-08-06 --judge-key-env OPENAI_API_KEY
    --judge-replay results.judge.jsonl                                                       # offline

Temperature is 0. Every raw reply goes into a file, by default beside the results, and is never asked for again; with
--judge-replay nothing is asked at all, and what the file lacks is a fault. Where there is no usable reply the answer
counts as wrong, and the fault is named. After three requests in a row without any reply the judge counts as down: what
is left is not asked, and the same command asks it again.

Scores of different judges, or of one judge in different versions, are not comparable.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from tap_llm.errors import InputError

from .command import positive
from .judge_endpoint import Endpoint, JudgeError
from .judge_replies import Replies, request_key

Item = TypeVar("Item")
Verdict = TypeVar("Verdict")

MAX_TOKENS = 300
PATIENCE = 3  # requests in a row without a reply, after which the judge counts as down
PICTURE_SIDE = 1024  # pixels; larger pictures are shrunk before they are sent


@dataclass(frozen=True)
class Picture:
    """A picture for a judge, made only if the judge is asked.

    Attributes:
        about: hash of all that it shows; stands for it in the key of the reply.
        make: gives it.
    """

    about: str
    make: Callable[[], Image.Image]


class Judge(AbstractContextManager["Judge"]):
    """A judge; a context manager, which closes the file of replies.

    Args:
        model: its name, as the server knows it.
        replies: what it said before, and where to keep what it says.
        endpoint: where to ask; None to read `replies` only.
        workers: requests at a time.

    Attributes:
        asked: replies fetched now.
        read: replies read from the file.
    """

    def __init__(self, model: str, replies: Replies, endpoint: Endpoint | None = None, workers: int = 8) -> None:
        self.model, self.replies, self.endpoint, self.workers = model, replies, endpoint, workers
        self.asked = self.read = 0
        self._versions: set[str] = set()
        self._silent, self._last = 0, ""
        self._lock = threading.Lock()
        self._busy: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by request

    def ask(self, text: str, pictures: Sequence[Picture] = (), max_tokens: int = MAX_TOKENS) -> str:
        """The judge's words; may be called from several threads.

        Args:
            text: the request.
            pictures: shown after the text.
            max_tokens: longest reply.

        Raises:
            JudgeError: no reply, or one without words.
        """
        request = {
            "text": text,
            "pictures": [picture.about for picture in pictures],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        key = request_key(self.model, request)
        with self._lock:
            busy = self._busy[key]
        with busy:  # the same request from another thread waits for this one's reply
            reply = self.replies.get(key)
            known = reply is not None
            if reply is None:
                reply = self._fetch(text, pictures, max_tokens)
            said = _words(reply)
            if not known:
                self.replies.add(key, self.model, request, reply)
        self._note(reply, known)
        return said

    def map(self, function: Callable[[Item], Verdict], items: Sequence[Item]) -> list[Verdict]:
        """`function` of each item, in order, several at a time, with a bar."""
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                verdicts = pool.map(function, items)
                return list(tqdm(verdicts, total=len(items), unit="judged", disable=None))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def label(self) -> str:
        """What metrics are named by: the judge, and the version that its replies state, where that says more."""
        versions = sorted(self._versions - {self.model})
        return f"judge {self.model}" + (f" ({', '.join(versions)})" if versions else "")

    def notes(self) -> list[str]:
        """For people, at the end."""
        if self.endpoint is None:
            return [f"judge {self.model}: {self.read} replies read from {self.replies.path}"]
        return [f"judge {self.model}: {self.asked} replies fetched, {self.read} read from {self.replies.path}"]

    def _fetch(self, text: str, pictures: Sequence[Picture], max_tokens: int) -> dict[str, Any]:
        if self.endpoint is None:
            raise JudgeError(f"{self.replies.path} has no reply of {self.model} to this request")
        if self._silent >= PATIENCE:
            raise JudgeError(f"the judge is down and was not asked: {self._last}", down=True)
        try:
            shown = [{"type": "image_url", "image_url": {"url": _data_url(picture.make())}} for picture in pictures]
        except InputError as error:
            raise JudgeError(f"the judge's picture cannot be made: {error}") from error
        content: Any = [{"type": "text", "text": text}, *shown] if shown else text
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        try:
            reply = self.endpoint.post(body)
        except JudgeError as error:
            with self._lock:
                self._silent += error.down
                self._last = str(error)
            raise
        return reply

    def _note(self, reply: dict[str, Any], known: bool) -> None:
        with self._lock:
            self._versions |= {str(reply["model"])} if reply.get("model") else set()
            self.asked, self.read = self.asked + (not known), self.read + known
            self._silent = self._silent if known else 0

    def __exit__(self, *error: object) -> None:
        self.replies.__exit__(*error)


def _words(reply: dict[str, Any]) -> str:
    try:
        said = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        said = None
    if not isinstance(said, str):
        raise JudgeError(f"the judge's reply has no text: {str(reply)[:120]}")
    return said.strip()


def _data_url(image: Image.Image) -> str:
    """PNG; larger pictures are shrunk."""
    small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    packed = io.BytesIO()
    small.save(packed, "PNG")
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


# What judges say


def chosen(reply: str, options: Sequence[str]) -> int | None:
    """Which of the options a reply means: by its letter, else by its words, of several those that come last.

    Args:
        reply: of the judge.
        options: as they were listed, A, B, …

    Returns:
        Index, or None where the reply means none of them.
    """
    letters = re.match(r"\W*([A-Z])(?:[.):]|\W*$)", reply)
    if letters and ord(letters[1]) - ord("A") < len(options):
        return ord(letters[1]) - ord("A")
    ends: list[tuple[int, int, int]] = []  # where the last mention ends, its length, the option
    lower = reply.lower()
    for index, option in enumerate(options):
        words = option.strip().lower()
        if words and words in lower:
            ends.append((lower.rfind(words) + len(words), len(words), index))
        letter = chr(ord("A") + index)
        ends += [(match.end(), 1, index) for match in re.finditer(rf"\b{letter}(?=[.):]|\W*$)", reply)]
    return max(ends)[2] if ends else None


def lettered(options: Iterable[str]) -> str:
    """Options as lines "A. …"."""
    return "\n".join(f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(options))


# The command


def judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all --judge-… arguments."""
    add = parser.add_argument_group("judge").add_argument
    add("--judge-url", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    add("--judge-model", metavar="NAME", help="the judge, as the server knows it")
    add("--judge-key-env", metavar="NAME", help="environment variable that holds the server's key")
    add("--judge-cache", type=Path, metavar="FILE", help="raw replies, read and added to [beside --out]")
    add("--judge-replay", type=Path, metavar="FILE", help="offline: read replies from this file, ask nothing")
    add("--judge-timeout", type=float, default=120.0, metavar="SECONDS", help="for one reply [120]")
    add("--judge-retries", type=int, default=4, metavar="N", help="after a busy server or a broken connection [4]")
    add("--judge-workers", type=positive, default=8, metavar="N", help="requests at a time [8]")


def load_judge(args: argparse.Namespace) -> Judge:
    """The judge of `judge_arguments`.

    Raises:
        InputError: arguments that are missing or do not go together, an empty variable, or an unusable file.
    """
    if (args.judge_url is None) == (args.judge_replay is None):
        raise InputError("answers are judged by a language model: give either --judge-url or --judge-replay")
    if args.judge_replay is not None:
        replies = Replies(args.judge_replay, read_only=True)
        return Judge(args.judge_model or _only_model(replies), replies, workers=1)
    if not args.judge_timeout > 0:
        raise InputError(f"--judge-timeout must be above 0, got {args.judge_timeout}")
    if not args.judge_model:
        raise InputError("name the judge with --judge-model, as the server of --judge-url knows it")
    endpoint = Endpoint(args.judge_url, _key(args.judge_key_env), args.judge_timeout, max(0, args.judge_retries))
    path = args.judge_cache or args.out.with_name(f"{args.out.stem}.judge.jsonl")
    return Judge(args.judge_model, Replies(path), endpoint, args.judge_workers)


def _only_model(replies: Replies) -> str:
    if len(replies.models) != 1:
        found = f"of {', '.join(replies.models)}: choose one with --judge-model" if replies.models else "of no judge"
        raise InputError(f"{replies.path} holds replies {found}")
    return replies.models[0]


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"--judge-key-env {variable}: there is no such environment variable, or it is empty")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"--judge-key-env {variable}: what it holds is no key: it has characters that no key has")
    return key
