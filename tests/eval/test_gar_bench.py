"""GAR-Bench: letters by hand, and captions with a judge that sees pictures."""

from __future__ import annotations

import json

import pytest
from judging import Scripted, completion, judge_of, pictures_of, rectangle, run_quietly, text_of, write_picture

from eval.gar_bench import GarCaption, GarVqa, answer_letter, options_of, said_letter
from eval.inquiries import Inquiries, read_records

MASKS = [rectangle(1, 2, 9, 12), rectangle(20, 5, 30, 25)]


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        write_picture(tmp_path / f"{number}.png", seed=number, width=40 + number)
    return tmp_path


def masks_for(width):
    return [rectangle(1, 2, 9, 12, width=width), rectangle(20, 5, 30, 25, width=width)]


def write(folder, records):
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return Inquiries(read_records(path), folder, id_keys=("id",))


def vqa(number, answer, kind, **more):
    record = {
        "image": f"/home/author/{number}.png", "mask_rles": masks_for(40 + number), "answer": answer, "type": kind,
        "question": "Is <Prompt1> <Prompt0>?", "choices": ["left of", "right of"],
    }  # fmt: skip
    return {**record, **more}


def test_vqa_by_hand(folder):
    records = [
        vqa(0, "A", "relation"),
        vqa(1, "right of", "relation"),
        vqa(2, "B", "color"),
        vqa(3, "A", "color"),
        vqa(3, "A", "shape", mask_rles=masks_for(20)),
        vqa(9, "A", "shape"),
        vqa(3, "C", "shape"),
        {"image": "0.png", "type": "shape"},
    ]
    scripted = Scripted({"40x30": "A.", "41x30": "A", "42x30": "b", "43x30": "A, I think"})
    found = run_quietly(GarVqa(write(folder, records), scripted), folder / "r.json").results
    assert found["metrics"] == {
        "all": {"questions": 8, "accuracy": 2 / 8, "letters": 3 / 8},
        "color": {"questions": 2, "accuracy": 0.5, "letters": 0.5},
        "relation": {"questions": 2, "accuracy": 0.5, "letters": 1.0},
        "shape": {"questions": 4, "accuracy": 0.0, "letters": 0.0},
    }
    assert scripted.asked[0] == (
        "<image>Question: Is region 2 <1> region 1 <0>?\nOptions: A. left of\nB. right of\n"
        "Answer with the correct option's letter directly."
    )
    starts = [
        "record 4: mask is 20x30", "record 5: image: there is", "record 6: the answer 'C'",
        "record 7: the record is malformed",
    ]  # fmt: skip
    faults = sorted(found["faults"])
    assert [fault[: len(start)] for fault, start in zip(faults, starts, strict=True)] == starts


def test_empty_answers_are_named_and_wrong(folder):
    found = run_quietly(
        GarVqa(write(folder, [vqa(0, "A", "x"), vqa(1, "A", "x")]), Scripted({"41x30": "A"})), folder / "r"
    )
    assert found.results["metrics"]["all"]["accuracy"] == 0.5
    assert found.results["faults"] == ["record 0: the answer is empty"]


def test_options():
    lettered = ["A. red", "B. blue"]
    assert options_of(["red", "blue"]) == options_of(lettered) == options_of({"B": "blue", "A": "red"}) == lettered
    assert options_of("A. red\nB. blue\n") == lettered
    assert [answer_letter(answer, lettered) for answer in ("B", "(b)", "red", "A. red", "green", None, "C")] == [
        "B", "B", "A", "A", None, None, None,
    ]  # fmt: skip
    assert [said_letter(text, 2) for text in ("A", " b.", "(B)", "C", "AB", "", "A dog")] == [
        "A", "B", "B", None, None, None, None,
    ]  # fmt: skip


def test_captions_by_hand(folder):
    records = [
        {"image": f"{number}.png", "mask_rles": masks_for(40 + number), "answer": f"truth {number}", "type": kind}
        for number, kind in enumerate("aabb")
    ]
    records[3]["mask_rles"] = records[3]["mask_rles"][0]
    records += [{"image": "0.png", "mask_rles": masks_for(40), "type": "b"}]
    scripted = Scripted({"40x30": "a dog", "41x30": "a cat", "42x30": "a {cup}"})
    verdicts = {"a dog": "True.", "a cat": "**False**", "a {cup}": "Hm."}

    def reply(text):
        return completion(next(verdict for answer, verdict in verdicts.items() if answer in text), model="judge")

    with judge_of(folder, reply) as (judge, server):
        found = run_quietly(GarCaption(write(folder, records), scripted, judge), folder / "r.json").results
    assert found["metrics"] == {
        "judge judge": {
            "all": {"captions": 5, "true": 1 / 5},
            "a": {"captions": 2, "true": 1 / 2},
            "b": {"captions": 3, "true": 0.0},
        }
    }
    assert [fault.partition("record ")[2][:30] for fault in found["faults"]] == [
        '4: the record is malformed: "a', "3: the answer is empty", "2: the judge says neither true",
    ]  # fmt: skip
    assert len(server.bodies) == 3 and all(len(pictures_of(body)) == 3 for body in server.bodies)
    assert len({url for body in server.bodies for url in pictures_of(body)}) == 9
    sent = next(text_of(body) for body in server.bodies if "a dog" in text_of(body))
    assert "Reference: truth 0\nAnswer of the model: a dog" in sent and "shows 2 region(s)" in sent
    assert scripted.asked[0] == (
        "<image>Describe region 1 <0> in detail, including the relationship with region 2 <1>."
    )
    assert scripted.asked[3] == "<image>Describe region 1 <0> in detail."
