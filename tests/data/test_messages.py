"""Messages: the picture first, each region one content part, names everywhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tap_llm.data import open_samples
from tap_llm.data.messages import Dialogue, Message, question_messages, split_markers
from tap_llm.errors import InputError

MARKER = re.compile(r"<region(\d+)>")


def text(message: Message) -> str:
    """A message on one line."""
    return "".join(part.get("text", f"<{part.get('index', 'image')}>") for part in message["content"])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("inline", "<image>Is region 1 <4> left of region 2 <0>?"),
        ("bare", "<image>Is <4> left of <0>?"),
        ("ahead", "<image>region 1: <4>\nregion 2: <0>\nIs region 1 left of region 2?"),
    ],
)
def test_regions_come_in_once(style: str, expected: str) -> None:
    dialogue = Dialogue()
    dialogue.user(["Is ", 4, " left of ", 0, "?"], style)  # type: ignore[arg-type]
    dialogue.assistant(["No, ", 0, " is."])
    dialogue.user(["And ", 4, ", or ", 2, "?"])
    assert [text(message) for message in dialogue.messages] == [
        expected,
        "No, region 2 is.",
        "And region 1, or region 3 <2>?",
    ]
    assert dialogue.introduced == [4, 0, 2]


def test_parts_have_the_form_of_chat_templates() -> None:
    dialogue = Dialogue(fixed=True)
    dialogue.user(["What is ", 1, "?"])
    dialogue.assistant(["a cup"])
    assert dialogue.messages == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "What is region 2 "},
                {"type": "region", "index": 1},
                {"type": "text", "text": "?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cup"}]},
    ]


def test_an_answer_introduces_what_the_question_left_out() -> None:
    dialogue = Dialogue(fixed=True)
    dialogue.user(["Which?"])
    dialogue.assistant([3, " and ", 1])
    assert [text(message) for message in dialogue.messages] == [
        "<image>region 4: <3>\nregion 2: <1>\nWhich?",
        "region 4 and region 2",
    ]


def test_markers_become_regions() -> None:
    assert split_markers("<region2> by <region1>.", MARKER, 1, 2) == [1, " by ", 0, "."]
    with pytest.raises(InputError, match="<region3> stands for no region: there are 2, counted from 1"):
        split_markers("by <region3>", MARKER, 1, 2)


def test_a_question_of_the_composed_sample() -> None:
    record = {"regions": [5, 2], "question": "Which is larger, <Prompt0> or <Prompt1>?", "answer": "<Prompt1>"}
    assert [text(message) for message in question_messages(record)] == [
        "<image>Which is larger, region 1 <5> or region 2 <2>?",
        "region 2",
    ]
    kind = {"regions": [3], "question": "Which kind is <Prompt0>?", "answer": "B", "choices": ["A. food", "B. an owl"]}
    assert text(question_messages(kind)[0]) == "<image>Which kind is region 1 <3>?\nA. food\nB. an owl"
    with pytest.raises(InputError, match="<Prompt1> stands for no region"):
        question_messages(kind | {"question": "Is <Prompt1> it?"})


def test_all_questions_of_the_composed_sample(shared_data: Path) -> None:
    for sample in open_samples(shared_data / "composed_sample" / "sample.json"):
        for record in sample.conversations:
            said = question_messages(record)
            indices = [part["index"] for part in said[0]["content"] if part["type"] == "region"]
            assert indices == record["regions"] and "Prompt" not in text(said[0]) + text(said[1])
