"""A judge over HTTP: what is sent, what is kept, what happens when it fails, and how its words are read."""

from __future__ import annotations

import argparse
import base64
import io
import json

import numpy as np
import pytest
from judging import completion, judge_of, judge_server, pictures_of
from PIL import Image

from eval import judge_endpoint
from eval.judge import PATIENCE, PICTURE_SIDE, Judge, Picture, chosen, judge_arguments, lettered, load_judge
from eval.judge_endpoint import Endpoint, JudgeError
from eval.judge_replies import Replies, request_key
from tap_llm.errors import InputError, MissingFileError


def gray(value, size=(8, 6)):
    return Picture(f"gray {value} {size}", lambda: Image.new("RGB", size, (value,) * 3))


def test_request_and_reply(tmp_path):
    with judge_of(tmp_path, lambda text: completion(f" {text}! ")) as (judge, server):
        assert judge.ask("yes?", max_tokens=7) == "yes?!"
        assert judge.ask("look", [gray(9), gray(200, (3 * PICTURE_SIDE, 30))]) == "look!"
    plain, shown = server.bodies
    assert plain == {
        "model": "judge", "messages": [{"role": "user", "content": "yes?"}], "temperature": 0, "max_tokens": 7,
        "path": "/v1/chat/completions",
    }  # fmt: skip
    assert "Authorization" not in server.headers[0]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in pictures_of(shown)]
    assert [image.size for image in images] == [(8, 6), (PICTURE_SIDE, 10)]
    assert (np.asarray(images[0]) == 9).all()
    assert judge.label() == "judge judge (judge-1.0)"
    assert judge.notes() == [f"judge judge: 2 replies fetched, 0 read from {tmp_path / 'judge.jsonl'}"]


def test_replies_are_never_asked_for_twice(tmp_path):
    with judge_of(tmp_path, lambda text: completion("True")) as (judge, server):
        for _ in range(2):
            judge.ask("a")
            judge.ask("a", [gray(1)])
            judge.ask("a", [gray(2)])
            judge.ask("a", max_tokens=1)
    assert len(server.bodies) == 4
    stored = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert stored[0]["reply"] == completion("True")[1]  # raw
    assert stored[0]["request"] == {"text": "a", "pictures": [], "max_tokens": 300, "temperature": 0}
    assert stored[0]["key"] == request_key("judge", stored[0]["request"])

    def unseen():
        raise AssertionError("pictures of known replies are not made")

    with judge_of(tmp_path, lambda text: completion("False")) as (judge, server):
        assert judge.ask("a", [Picture(gray(1).about, unseen)]) == "True"
        other = Judge("another", judge.replies, judge.endpoint)
        assert other.ask("a") == "False"
    assert len(server.bodies) == 1


def test_replay_asks_nothing(tmp_path):
    with judge_of(tmp_path, lambda text: completion("True")) as (judge, _):
        judge.ask("a")
    before = (tmp_path / "judge.jsonl").read_bytes()
    with Judge("judge", Replies(tmp_path / "judge.jsonl", read_only=True)) as judge:
        assert judge.ask("a") == "True"
        with pytest.raises(JudgeError, match="judge.jsonl has no reply of judge to this request"):
            judge.ask("b")
    assert (tmp_path / "judge.jsonl").read_bytes() == before


def test_damaged_lines_do_not_count(tmp_path):
    path = tmp_path / "judge.jsonl"
    with judge_of(tmp_path, lambda text: completion("True")) as (judge, _):
        judge.ask("a")
        judge.ask("b")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"nonsense\n[]\n" + lines[1][:-20])
    replies = Replies(path)
    assert replies.note.startswith("1 replies of judges found") and "3 of its lines are no replies" in replies.note
    with replies, judge_server(lambda text: completion("new")) as server:
        assert Judge("judge", replies, Endpoint(server.url)).ask("b") == "new"
    assert Replies(path, read_only=True).note.startswith("2 replies")


def test_busy_servers_are_asked_again(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(judge_endpoint.time, "sleep", waits.append)
    answers = [(503, b"loading"), (429, b""), (200, b"<html>"), completion("fine")]
    with judge_server(lambda text: answers.pop(0)) as server:
        judge = Judge("judge", Replies(tmp_path / "j.jsonl"), Endpoint(server.url, wait=0.5))
        assert judge.ask("a") == "fine"
    assert waits == [0.5, 1.0, 2.0] and len(server.bodies) == 4


def test_the_server_may_say_when_to_ask_again(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(judge_endpoint.time, "sleep", waits.append)
    message = r"does not answer: HTTP 429: slow down \(3 tries\)"
    with (
        judge_server(lambda text: (429, b"slow down"), {"Retry-After": "7"}) as server,
        pytest.raises(JudgeError, match=message),
    ):
        Endpoint(server.url, retries=2).post({"messages": [{"content": "a"}]})
    assert waits == [7.0, 7.0]


@pytest.mark.parametrize(
    ("reply", "message", "down"),
    [
        ((401, b"bad key"), "the judge refuses: HTTP 401: bad key", True),
        ((400, b"too\nlong"), "the judge refuses: HTTP 400: too long", False),
        ((302, b""), "the judge refuses: HTTP 302", True),
        ((200, [1]), "is not a JSON object", False),
        ((500, b"oh"), "does not answer: HTTP 500: oh", True),
    ],
)
def test_refusals(reply, message, down):
    elsewhere = {"Location": "http://127.0.0.1:9/v1"}
    with judge_server(lambda text: reply, elsewhere) as server, pytest.raises(JudgeError, match=message) as error:
        Endpoint(server.url, retries=0).post({"messages": [{"content": "a"}]})
    assert error.value.down == down and len(server.bodies) == 1


@pytest.mark.parametrize("content", [None, 3])
def test_reply_without_text_is_not_kept(tmp_path, content):
    message = "the judge's reply has no text"
    with judge_of(tmp_path, lambda text: completion(content)) as (judge, _), pytest.raises(JudgeError, match=message):
        judge.ask("a")
    assert (tmp_path / "judge.jsonl").read_bytes() == b""


def test_a_judge_that_is_down_is_left_alone(tmp_path):
    with judge_server(lambda text: completion("x")) as server:
        url = server.url  # nobody listens there any more
    judge = Judge("judge", Replies(tmp_path / "j.jsonl"), Endpoint(url, timeout=5, retries=0), workers=1)
    faults = []

    def ask(number):
        try:
            return judge.ask(str(number))
        except JudgeError as error:
            faults.append(str(error))

    judge.map(ask, range(6))
    assert len(faults) == 6
    assert all("does not answer" in fault for fault in faults[:PATIENCE])
    assert all(fault.startswith("the judge is down and was not asked") for fault in faults[PATIENCE:])


def test_requests_that_are_refused_do_not_stop_the_others(tmp_path):
    with judge_of(tmp_path, lambda text: (400, b"no") if text != "9" else completion("yes")) as (judge, server):
        for number in range(9):
            with pytest.raises(JudgeError, match="refuses"):
                judge.ask(str(number))
        assert judge.ask("9") == "yes"


def test_the_same_request_at_once_is_one(tmp_path):
    with judge_of(tmp_path, lambda text: completion("x")) as (judge, server):
        assert judge.map(judge.ask, ["same"] * 8) == ["x"] * 8
    assert len(server.bodies) == 1 and judge.read == 7


def test_map_keeps_the_order(tmp_path):
    with judge_of(tmp_path, lambda text: completion(text)) as (judge, _):
        assert judge.map(lambda item: judge.ask(str(item)), range(20)) == [str(number) for number in range(20)]


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("B", 1), ("b", None), ("B.", 1), ("(C) dark red", 2), (" A: red", 0), ("D", None),
        ("It is blue.", 1), ("dark red", 2), ("not red but blue", 1), ("blue? no, RED", 0),
        ("The answer is B.", 1), ("The best option is (C)", 2), ("none of these", None), ("", None),
        ("A dog", None), ("A blue thing", 1),
    ],
)  # fmt: skip
def test_chosen(reply, place):
    assert chosen(reply, ["red", "blue", "dark red"]) == place


def test_lettered():
    assert lettered(["yes", "no"]) == "A. yes\nB. no"


# The command line


def parsed(tmp_path, *typed):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=tmp_path / "r.json")
    judge_arguments(parser)
    return parser.parse_args(typed)


def test_judge_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", " secret\n")
    typed = ["--judge-model", "m", "--judge-key-env", "MY_KEY", "--judge-timeout", "5"]
    with (
        judge_server(lambda text: completion("ok", model="m")) as server,
        load_judge(parsed(tmp_path, "--judge-url", server.url + "/", *typed)) as judge,
    ):
        assert judge.ask("a") == "ok"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.bodies[0]["path"] == "/v1/chat/completions"
    assert "secret" not in (tmp_path / "r.judge.jsonl").read_text() and "secret" not in repr(judge.endpoint)
    with load_judge(parsed(tmp_path, "--judge-replay", str(tmp_path / "r.judge.jsonl"))) as judge:
        assert (judge.ask("a"), judge.model, judge.label()) == ("ok", "m", "judge m")
        with pytest.raises(JudgeError):
            judge.ask("b")
    assert "1 replies read from" in judge.notes()[0]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "give either --judge-url or --judge-replay"),
        (["--judge-url", "http://x/v1", "--judge-replay", "f"], "give either"),
        (["--judge-url", "http://x/v1"], "name the judge with --judge-model"),
        (["--judge-url", "http://x/v1", "--judge-model", "m", "--judge-timeout", "-1"], "must be above 0"),
        (["--judge-url", "ftp://x/v1", "--judge-model", "m"], "must begin with http://"),
        (["--judge-url", "http://x/v1", "--judge-model", "m", "--judge-key-env", "NOT_SET"], "NOT_SET: there is no"),
        (["--judge-url", "http://x/v1", "--judge-model", "m", "--judge-key-env", "ODD"], "is no key"),
        (["--judge-replay", "empty"], "holds replies of no judge"),
    ],
)
def test_bad_arguments(tmp_path, typed, message, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("ODD", "a\nb")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match=message):
        load_judge(parsed(tmp_path, *typed))


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(MissingFileError, match="there is no file"):
        Replies(tmp_path / "absent", read_only=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        Replies(tmp_path / "file" / "r.jsonl")
