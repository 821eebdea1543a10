"""Commands of chat benchmarks with a real model, tiny and random: what it reads, batches, going on, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import WAIT, completion, judge_server, rectangle, write_picture
from region_chat import write_llm

from eval import answerers, dlc_bench, ferret_bench, gar_bench, mdvp_bench, recognition
from eval.answerers import ChatAnswerer, chats
from eval.chat_model import ChatModel
from eval.command import cli
from eval.questions import Question
from tap_llm.images import load_image
from tap_llm.loading import load_tap
from tap_llm.region_llm.adapters import save_adapter
from tap_llm.region_llm.chat_loading import load_chat_model
from tap_llm.region_llm.llm_loading import load_llm, load_llm_tokenizer
from tap_llm.region_llm.modeling_tap_llm import TapLlmForConditionalGeneration
from tap_llm.region_llm.processing_tap_llm import TapLlmProcessor

MASKS = [rectangle(1, 2, 9, 12), rectangle(20, 5, 30, 25)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of tap-tiny and a random language model."""
    path = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    write_llm(path / "llm")
    tap, tap_processor, _ = load_tap("tap-tiny", dtype="float32")
    model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, load_llm(path / "llm"), "base")
    processor = TapLlmProcessor.for_model(model, tap_processor, load_llm_tokenizer(path / "llm"), "plain")
    save_adapter(model, path / "adapter", processor)
    return str(path / "adapter")


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Commands that name the same model share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answerers, "load_chat_model", lru_cache(load_chat_model))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of each form, with two records that need pictures 0 and 1, where 1 is missing."""
    folder = tmp_path_factory.mktemp("data")
    write_picture(folder / "0.png")
    (folder / "images").mkdir()
    write_picture(folder / "images" / "0.png")
    records: dict[str, list[dict[str, Any]]] = {
        "lvis": [
            {"file_name": f"{n}.png", "categories": ["dog", "cup"], "annotations": [{"segmentation": m} for m in MASKS]}
            for n in range(2)
        ],
        "GAR-Bench-VQA": [
            {
                "image": f"{n}.png", "mask_rles": MASKS, "question": "What is <Prompt0>?", "choices": ["a", "b"],
                "answer": "A", "type": "color",
            }
            for n in range(2)
        ],
        "GAR-Bench-Caption-Simple": [{"image": f"{n}.png", "mask_rles": MASKS, "answer": "a"} for n in range(2)],
        "mdvp": [
            {"image_name": f"{n}.png", "question_id": n, "question": "?", "gt_answers": "a", "points": [[5, 6]]}
            for n in range(2)
        ],
        "annotations": [],
    }  # fmt: skip
    documents: dict[str, Any] = {
        **records,
        "annotations": {
            "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
            "annotations": [{"id": n, "image_id": n, "segmentation": MASKS[0]} for n in range(2)],
        },
        "qa": {str(n): [{"question": "?", "type": "positive", "choices": [["x", 1], ["y", 0]]}] for n in range(2)},
        "class_names": {"0": "dog", "1": "cup"},
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    lines = {
        "question": {"image": "{}.png", "text": "What is [0.1, 0.1, 0.5, 0.5]?"},
        "context": {"image": "{}.png", "text": "a dog"},
        "answer": {"text": "a dog"},
    }
    for name, line in lines.items():
        made = [{**line, "question_id": n, "image": f"{n}.png"} for n in range(2)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    return folder


def arguments(adapter: str, data: Path, out: Path, name: str) -> list[str]:
    return [
        "--model", adapter, "--device", "cpu", "--data", str(data / name), "--images", str(data), "--out", str(out),
        "--max-new-tokens", "4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("main", "name", "reply", "judged"),
    [
        (recognition.main, "lvis.json", None, 0),
        (gar_bench.main, "GAR-Bench-VQA.json", None, 0),
        (gar_bench.main, "GAR-Bench-Caption-Simple.json", "True", 1),
        (dlc_bench.main, "", "A", 2),
        (ferret_bench.main, "", "10 5", 1),
        (mdvp_bench.main, "mdvp.json", "10 5", 1),
    ],
)
def test_command(
    main: Callable[..., Any], name: str, reply: str | None, judged: int, adapter: str, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    typed = arguments(adapter, data, tmp_path / "r.json", name)
    with judge_server(lambda text: completion(reply)) as server:
        asking = ["--judge-url", server.url, "--judge-model", "j", "--judge-timeout", str(WAIT)] if judged else []
        first = main([*typed, *asking])
    assert len(server.bodies) == judged
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["examples"] == 2 and len(results["faults"]) == 1 and "there is no file" in results["faults"][0]
    assert results["model"]["sha256"] and results["settings"]["max_new_tokens"] == 4
    assert all(isinstance(answer, str) for answer in first.predictions[0]["answers"])
    printed = capsys.readouterr().out
    assert "NOT EVALUATED" in printed and (not judged or f"{judged} replies fetched" in printed)
    expected = {
        dlc_bench.main: {"positive": 0.5, "negative": 0.0, "recognized": 0.5},
        ferret_bench.main: {"score": 100 * 6 / 20},
        mdvp_bench.main: {"score": 100 * 6 / 20},
    }.get(main, {})
    if judged:
        found = results["metrics"]["judge j (judge-1.0)"]
        groups = found if main is dlc_bench.main else next(iter(found.values()))
        assert {key: groups[key] for key in expected} == expected
    monkeypatch.setattr(ChatModel, "read", None)  # nothing is asked again
    replay = ["--judge-replay", str(tmp_path / "r.judge.jsonl")] if judged else []
    again = main([*typed, *replay])
    assert again.results["metrics"] == results["metrics"] and again.results["faults"] == results["faults"]


def test_answers_are_those_of_the_plain_processor(adapter: str, data: Path) -> None:
    """Each question alone, with its picture and regions; and batches of any size give the same."""
    image = load_image(data / "0.png")
    questions = [
        Question([{"mask": MASKS[0]}, {"box": [3, 4, 30, 20]}], ["Is ", 1, " near ", 0, "?"]),
        Question([{"points": [[7, 8]]}], ["What is this?"]),
    ]
    found = []
    for size in (1, 8):
        chat = ChatModel(*answerers.load_chat_model(adapter, "cpu", None), max_new_tokens=6, batch_size=size)
        found.append(ChatAnswerer(chat)([(image, questions), (image, []), (image, questions[1:])]))
    assert found[0] == found[1] and found[0][1] == [] and found[0][2] == found[0][0][1:]
    for question, answer in zip(questions, found[0][0], strict=True):
        inputs = chat.processor([question.messages()], images=[[image]], regions=[question.regions])
        ids = chat.model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        said = chat.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == answer and answer


def test_which_models_chat(adapter: str, tmp_path: Path) -> None:
    assert chats(adapter)
    assert not any(map(chats, ("tap-tiny", "tap_vit_l_v1_1", "absent", str(tmp_path))))


def test_bad_input_is_one_message(adapter: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = arguments(adapter, data, tmp_path / "r.json", "GAR-Bench-VQA.json")
    replaced = {"--model": "tap-tiny", "--data": "absent.json", "--images": "absent"}
    messages = {
        "--model": "tap-tiny cannot chat",
        "--data": "there is no file absent.json",
        "--images": "no folder absent",
    }
    for name, value in replaced.items():
        changed = [value if before == name else word for before, word in zip(["", *typed], typed, strict=False)]
        assert cli(lambda changed=changed: gar_bench.main(changed)) == 2
        assert messages[name] in capsys.readouterr().err
    assert cli(lambda: dlc_bench.main(arguments(adapter, data, tmp_path / "r.json", ""))) == 2
    assert "give either --judge-url or --judge-replay" in capsys.readouterr().err
