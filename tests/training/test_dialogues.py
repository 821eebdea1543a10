"""Conversations as batches: a function of their number, sorted by length, broken ones left out, cached or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from region_chat import chat_processor, write_dialogues

from tap_llm.errors import InputError
from training.dialogues import DialogueBatches, DialogueConfig, Dialogues
from training.stored_scenes import StoreConfig

SCENES = DialogueConfig(scene_share=1.0, shape_share=1.0, scene_size=[120, 90])


@pytest.fixture(scope="module")
def processor() -> Any:
    return chat_processor()


@pytest.fixture()
def files(tmp_path: Path) -> Callable[..., DialogueConfig]:
    def make(count: int = 12, broken: tuple[int, ...] = (), **settings: Any) -> DialogueConfig:
        path = write_dialogues(tmp_path / "talk.jsonl", count, broken)
        return DialogueConfig(samples=[str(path)], **{"group": 2, "broken_share": 1.0, **settings})

    return make


def told(batch: dict[str, Any], processor: Any) -> list[str]:
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_a_batch_about_scenes_is_a_function_of_its_number(processor: Any) -> None:
    one, two = (DialogueBatches(Dialogues(SCENES, seed=3), processor, 2) for _ in range(2))
    two[4]
    first, again = one[5], two[5]
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert told(first, processor) != told(one[6], processor)
    other = DialogueBatches(Dialogues(SCENES, seed=4), processor, 2)[5]
    assert told(other, processor) != told(first, processor)


def test_every_sample_comes_once_per_epoch_in_another_order(processor: Any, files: Any) -> None:
    dialogues = Dialogues(files(), seed=1)
    epochs = [[dialogues[12 * epoch + place].sample.id for place in range(12)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_grouping_sorts_by_length_and_keeps_all(processor: Any, files: Any) -> None:
    batches = DialogueBatches(Dialogues(files(group=3), seed=1), processor, 2)
    lengths = [batches[number]["attention_mask"].sum(1).tolist() for number in range(3)]
    in_order = sorted(lengths)
    assert sorted(np.ravel(lengths)) == np.ravel(in_order).tolist()  # each batch has neighbours of like length
    plain = DialogueBatches(Dialogues(files(group=1), seed=1), processor, 2)
    assert sorted(t for n in range(3) for t in told(plain[n], processor)) == sorted(
        t for n in range(3) for t in told(batches[n], processor)
    )


def test_held_out_samples_are_for_validation(processor: Any, files: Any) -> None:
    config = files(sample_hold_out=4)
    shown = {Dialogues(config, 0)[number].sample.id for number in range(20)}
    held_out = {Dialogues(config, validation=True)[number].sample.id for number in range(20)}
    assert held_out == {"0", "4", "8"} and not shown & held_out and len(shown) == 9


def test_broken_conversations_are_left_out_and_named(processor: Any, files: Any) -> None:
    batches = DialogueBatches(Dialogues(files(broken=(3,), group=1), seed=0), processor, 6)
    rows = sum(len(batches[number]["labels"]) for number in range(2))
    problems = batches.take_problems()
    assert rows == 11 and len(problems) == 1 and "talk.jsonl, line 4: message 0: region part 9" in problems[0]
    assert batches.take_problems() == []


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], 'message 1: "content" must be'),
        ([{"role": "user", "content": ["a"]}], 'message 0: "content" must be'),
        ([{"role": "user", "content": "half \ud83d"}, {"role": "assistant", "content": "b"}], "not valid Unicode"),
        ([{"prompt": "a"}], "got keys prompt"),
    ],
)
def test_malformed_conversations_are_left_out_and_named(
    conversation: list[Any], problem: str, processor: Any, files: Any
) -> None:
    config = files(count=4)
    path = Path(config.samples[0])
    lines = path.read_text().splitlines()
    record = {key: value for key, value in json.loads(lines[2]).items() if key != "id"}
    lines[2] = json.dumps({**record, "messages": conversation})
    path.write_text("\n".join(lines))
    batches = DialogueBatches(Dialogues(config), processor, 2)
    assert sum(len(batches[number]["labels"]) for number in range(2)) == 3
    told = batches.take_problems()
    assert len(told) == 1 and told[0].startswith(f"{path}, line 3: ") and problem in told[0]


def test_a_batch_of_broken_ones_gives_way_to_another(processor: Any, files: Any) -> None:
    batches = DialogueBatches(Dialogues(files(broken=tuple(range(9)), group=1), seed=0), processor, 1)
    seen = [told(batches[number], processor) for number in range(12)]
    assert all(len(answers) == 1 and answers[0].split()[1][:2] in ("9<", "10", "11") for answers in seen)
    assert batches.take_problems()


def test_too_long_is_broken(processor: Any, files: Any) -> None:
    batches = DialogueBatches(Dialogues(files(max_length=5), seed=0), processor, 2)
    with pytest.raises(InputError, match="all conversations of 20 batches are broken.*reads 5"):
        batches[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "names no files"),
        ({"scene_share": 2.0}, "scene_share"),
        ({"scene_share": 1.0, "scene_size": [3]}, "scene_size"),
        ({"samples": ["a"], "tokens": ["b", "c"]}, "2 folders for 1 files"),
        ({"samples": ["a"], "tokens": ["b"], "scene_share": 0.5}, "go together"),
        ({"samples": ["a"], "store": StoreConfig("scenes")}, "data.store.folder is for composed scenes"),
        ({"scene_share": 1.0, "store": StoreConfig("scenes", scenes=3)}, "at least 20 scenes"),
        ({"samples": ["a"], "sample_hold_out": 1}, "sample_hold_out"),
        ({"samples": ["a"], "group": 0}, "group"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DialogueConfig(**settings).check()
