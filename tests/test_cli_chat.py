"""`tap-llm chat` and `tap-llm merge`: what is printed, what is written, and how they fail."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from region_chat import tokenizer, write_llm

from tap_llm import TapLlmForConditionalGeneration, TapLlmProcessor, cli
from tap_llm.loading import load_tap
from tap_llm.region_llm.adapters import attach_lora, load_llm, lora_config, save_adapter
from tap_llm.region_llm.session import ChatSession

BOX, POINT = ["--box", "3,4,30,25"], ["--point", "12,10 1,1,0"]
QUESTION = "What is region 1?"
SHORT = ["--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter for the bundled TAP and a random LLM in a folder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llm = load_llm(write_llm(folder / "llm"))
    tap, tap_processor, _ = load_tap("tap-tiny")
    model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, llm)
    processor = TapLlmProcessor.for_model(model, tap_processor, tokenizer(), "plain")
    attach_lora(model, lora_config(model, r=4))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name:
                value.normal_(std=0.2)
    save_adapter(model.eval(), folder / "adapter", processor)
    return folder / "adapter"


@pytest.fixture(scope="module")
def whole(adapter: Path) -> Path:
    """The same, merged."""
    folder = adapter.with_name("whole")
    assert cli.main(["merge", str(adapter), str(folder)]) == 0
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def dialogue(monkeypatch: pytest.MonkeyPatch, arguments: list[str], *lines: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli.main(["chat", *arguments, *SHORT])


def expected_answer(whole: Path, photo: str) -> str:
    session = ChatSession(
        TapLlmForConditionalGeneration.from_pretrained(whole).eval(),
        TapLlmProcessor.from_pretrained(whole),
        max_new_tokens=6,
    )
    session.add_image(photo)
    session.add_region({"points": [[12, 10], [1, 1]], "labels": [1, 0]})
    session.add_region({"box": [3, 4, 30, 25]})
    return session.ask(QUESTION)


def test_one_question(whole: Path, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = expected_answer(whole, photo)
    capsys.readouterr()
    command = ["chat", photo, *POINT, *BOX, QUESTION, "--model", str(whole), *SHORT]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert (printed.out.strip(), printed.err) == (expected, "")
    assert cli.main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["question"] == QUESTION and record["answer"] == expected
    assert [region["number"] for region in record["regions"]] == [1, 2]
    assert record["regions"][1]["box"] == [3, 4, 30, 25]


def test_an_adapter_says_what_it_says_merged(
    adapter: Path, whole: Path, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for model in (adapter, whole):
        assert cli.main(["chat", photo, *BOX, QUESTION, "--model", str(model), *SHORT]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_merging_writes_a_plain_model(adapter: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"config.json", "model.safetensors", "processor_config.json"} <= {path.name for path in whole.iterdir()}
    assert "adapter" not in " ".join(path.name for path in whole.iterdir())
    assert cli.main(["merge", str(adapter), str(whole)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert cli.main(["merge", str(whole), str(whole.with_name("other"))]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    assert sorted(path.name for path in whole.parent.iterdir()) == ["adapter", "llm", "whole"]


def test_parts_that_lie_elsewhere_are_named(
    adapter: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_llm(tmp_path / "other")
    command = ["chat", photo, *BOX, QUESTION, "--model", str(adapter), *SHORT]
    assert cli.main([*command, "--llm", str(other)]) == 2
    message = capsys.readouterr().err
    assert f"was trained with the LLM {adapter.with_name('llm')}, and does not fit {other}" in message
    assert cli.main([*command, "--llm", str(adapter.with_name("llm")), "--tap", "tap-tiny"]) == 0


def test_a_dialogue(
    whole: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.open(photo).save(tmp_path / "second.png")
    lines = [
        QUESTION, "", "/region point 12,10 1,1,0", "/image " + str(tmp_path / "second.png"), "/region box 1,2,20,20",
        "/region box 1,2", "/region circle 3", "/region", "/image", "/image gone.png", "/save", "/dance", "/help",
        "And region 3?", f"/save {tmp_path / 'talk.json'}", "/quit", "never asked",
    ]  # fmt: skip
    assert dialogue(monkeypatch, [photo, *BOX, "--model", str(whole)], *lines) == 0
    printed = capsys.readouterr()
    for text in ("region 1: <box 3,4,30,25>", "region 2: <point 12,10 1,1,0>", "region 3: <box 1,2,20,20>",
                 f"image 2: {tmp_path / 'second.png'}", "/region mask FILE", "saved: "):  # fmt: skip
        assert text in printed.out
    messages = printed.err.splitlines()[1:]
    expected = [
        "expected four numbers",
        "/region takes",
        "/region takes",
        "/image takes",
        "gone.png",
        "/save takes",
        "/dance",
    ]
    assert all(part in message for part, message in zip(expected, messages, strict=True))
    assert all(line.startswith("tap-llm: ") for line in messages)
    record = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in record] == ["user", "assistant"] * 2
    assert record[0]["content"][0]["path"] == "photo.png"


def test_a_dialogue_ends_with_its_input(
    whole: Path, photo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dialogue(monkeypatch, [photo, "--model", str(whole)], "hello") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_a_dialogue_in_bytes_that_are_no_text(
    whole: Path, photo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert cli.main(["chat", photo, "--model", str(whole), *SHORT]) == 2
    assert "tap-llm: the input is not utf-8" in capsys.readouterr().err


def test_a_stopped_answer_is_forgotten(
    whole: Path, photo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ChatSession.ask
    calls: list[str] = []

    def interrupted(self: ChatSession, question: str, **options: object) -> str:
        calls.append(question)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return ask(self, question, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatSession, "ask", interrupted)
    assert dialogue(monkeypatch, [photo, "--model", str(whole)], "first", "second") == 0
    assert "stopped" in capsys.readouterr().err and calls == ["first", "second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "1,2"], "--box 1,2: expected four numbers"),
        (["--box", "90,90,99,99"], "outside"),
        (["--json"], "--json prints one answer: give a question"),
        ([QUESTION, "--chat-template", "gone.jinja"], "neither a bundled one (plain, chatml) nor a readable file"),
        ([QUESTION, "--model", "tap-tiny"], "tap-tiny cannot chat: it is of model type 'tap'"),
        ([QUESTION, "--model", "tap_vit_b_v1_1"], "tap_vit_b_v1_1 cannot chat"),
        ([QUESTION, "--model", "gone"], "unknown model 'gone'"),
        ([QUESTION, "--dtype", "int8"], 'dtype "int8" cannot be used'),
        ([QUESTION, "--device", "nowhere"], 'device "nowhere" cannot be used'),
        (["a", "b"], "unexpected extra argument"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, whole: Path, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["chat", photo, "--model", str(whole), *arguments]
    assert cli.main(command) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_the_default_model_is_bundled_or_says_so(photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["chat", photo, QUESTION, *SHORT])
    printed = capsys.readouterr()
    assert (status == 0 and printed.out) or (status == 2 and "tap-tiny-chat is not part of this version" in printed.err)


def test_a_damaged_model(whole: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").mkdir()
    for path in whole.iterdir():
        data = path.read_bytes()
        (tmp_path / "damaged" / path.name).write_bytes(data[:5000] if path.suffix == ".safetensors" else data)
    assert cli.main(["chat", photo, QUESTION, "--model", str(tmp_path / "damaged")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
