"""A judge on 127.0.0.1, answers from a script, and small pictures, for tests of benchmarks that ask about regions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.base import Benchmark, Run, run
from eval.judge import Judge
from eval.judge_endpoint import Endpoint
from eval.judge_replies import Replies

Reply = tuple[int, Any]  # HTTP status, and JSON or bytes
WAIT = 30  # seconds that one request may take; none here does


def completion(text: Any, model: str = "judge-1.0") -> Reply:
    """What a server says when all is well."""
    return 200, {"model": model, "choices": [{"message": {"role": "assistant", "content": text}}]}


class Server:
    """Where to ask, and what was asked.

    Attributes:
        url: base URL.
        bodies: of all requests, in the order of their arrival.
        headers: likewise.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []


@contextmanager
def judge_server(answer: Callable[[str], Reply], headers: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that answers the text of each request, for as long as the context lasts.

    Args:
        answer: of the text of the last message.
        headers: of all replies.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = WAIT

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append({**body, "path": self.path})
            state.headers.append(dict(self.headers))
            status, payload = answer(text_of(body))
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Server(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(WAIT)


def text_of(body: dict[str, Any]) -> str:
    """The text of the last message of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def pictures_of(body: dict[str, Any]) -> list[str]:
    """Data URLs of the last message of a request."""
    content = body["messages"][-1]["content"]
    return [] if isinstance(content, str) else [part["image_url"]["url"] for part in content[1:]]


@contextmanager
def judge_of(folder: Path, answer: Callable[[str], Reply], retries: int = 0) -> Iterator[tuple[Judge, Server]]:
    """A judge that asks such a server and keeps its replies in `folder`."""
    with judge_server(answer) as server:
        endpoint = Endpoint(server.url, timeout=WAIT, retries=retries, wait=0.0)
        with Judge("judge", Replies(folder / "judge.jsonl"), endpoint, workers=2) as judge:
            yield judge, server


class Scripted:
    """Stands in for a model: the answer to a question that holds a given text.

    Args:
        answers: by a text that the question holds; questions that hold none are answered with "".
    """

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.batches: list[list[int]] = []
        self.asked: list[str] = []

    def settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, asked: Sequence[tuple[Any, list[Any]]]) -> list[list[str]]:
        self.batches.append([len(questions) for _, questions in asked])
        return [[self._answer(question, image) for question in questions] for image, questions in asked]

    def _answer(self, question: Any, image: Image.Image) -> str:
        parts = question.messages()[0]["content"]
        said = "".join(part.get("text", f"<{part.get('index', 'image')}>") for part in parts)
        self.asked.append(said)
        known = f"{said} {image.width}x{image.height} {json.dumps(question.regions)}"
        return next((answer for text, answer in self.answers.items() if text in known), "")


def write_picture(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> Path:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def rectangle(x0: int, y0: int, x1: int, y1: int, width: int = 40, height: int = 30) -> dict[str, Any]:
    """RLE of a filled rectangle."""
    from tap_llm.masks import encode_rle

    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return encode_rle(mask)


def run_quietly(benchmark: Benchmark, out: Path, batch_size: int = 8) -> Run:
    """A run without any output."""
    found = run(benchmark, out, {"name": "scripted"}, report=lambda line: None, progress=False, batch_size=batch_size)
    assert found is not None
    return found


def write_bert(folder: Path) -> Path:
    """A random sentence encoder with a vocabulary of a few words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "red", "blue", "small", "dog", "cup", "coffee"]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder
