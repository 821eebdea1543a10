"""Ferret-Bench: ratings and their ratio by hand, boxes in questions, files."""

from __future__ import annotations

import json

import pytest
from judging import Scripted, completion, judge_of, run_quietly, write_picture
from torch.utils.data import ConcatDataset

from eval.ferret_bench import FerretBench, context_text, read_folder, regions_in
from eval.inquiries import Inquiries
from eval.rated import Rating, ratio, read_ratings


def write_lines(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folders(tmp_path):
    for number in range(3):
        write_picture(tmp_path / "images" / f"{number}.png", seed=number, width=40 + number)
    for name, count in (("desc", 4), ("reason", 2)):
        numbers = range(count)
        questions = [
            {"question_id": n, "image": f"{n}.png", "text": f"What is [0.1, 0.2, 0.5, 0.8]? {name}{n}"} for n in numbers
        ]
        write_lines(tmp_path / name / "question.jsonl", questions)
        contexts = [{"image": f"{n}.png", "captions": ["a {dog}"], "instances": [{"box": [0, 1]}]} for n in numbers]
        write_lines(tmp_path / name / "context.jsonl", contexts)
        answers = [{"question_id": n, "text": f"reference {n}"} for n in numbers if (name, n) != ("desc", 2)]
        write_lines(tmp_path / name / "answer.jsonl", answers)
    return tmp_path


def examples(folder):
    parts = [
        Inquiries(read_folder(folder / name), folder / "images", id_keys=("question_id",), group=name)
        for name in ("desc", "reason")
    ]
    return ConcatDataset(parts)


RATINGS = {"desc0": "8 6\nbecause", "desc1": "Ratings: I will not say", "reason0": "Answer 1: 9/10, Answer 2: 9/10"}


def test_scores_by_hand(folders):
    def reply(text):
        return completion(next(rating for key, rating in RATINGS.items() if key in text), "gpt")

    scripted = Scripted({"desc": "a dog", "reason0": "a cat"})
    with judge_of(folders, reply) as (judge, server):
        found = run_quietly(FerretBench(examples(folders), scripted, judge), folders / "r.json").results
    # desc: 6 of 8; 1 of 10 for nonsense, no reference, no picture. reason: 9 of 9; 1 of 10 for an empty answer
    assert found["metrics"]["judge judge (gpt)"] == {
        "desc": {"questions": 4, "score": pytest.approx(100 * 9 / 38), "answer": 9 / 4, "reference": 38 / 4},
        "reason": {"questions": 2, "score": pytest.approx(100 * 10 / 19), "answer": 5, "reference": 9.5},
        "mean of all": {"score": pytest.approx(50 * (9 / 38 + 10 / 19))},
    }
    faults = sorted(found["faults"])
    assert [fault.partition(":")[0] for fault in faults] == ["desc/1", "desc/2", "desc/3", "reason/1"]
    assert "the judge gives no ratings: 'Ratings: I" in faults[0] and "there is no reference" in faults[1]
    assert "there is no file" in faults[2] and faults[3] == "reason/1: the answer is empty"
    assert len(server.bodies) == 3
    sent = next(body["messages"][0]["content"] for body in server.bodies if "desc0" in str(body))
    assert sent.startswith('A picture shows:\ncaptions: ["a {dog}"]\ninstances: [{"box":[0,1]}]\n\nQuestion about')
    assert "[Answer 1]\nreference 0\n" in sent and "[Answer 2]\na dog\n" in sent
    assert scripted.asked[0] == "<image>What is region 1 <0>? desc0"


def test_boxes_in_questions():
    regions, pieces = regions_in("Is [0.1,0.2,0.5, 0.8] near [0, .5, 1, 1.0] or [0.1, 0.2, 0.5, 0.8]?", 40, 30)
    assert regions == [{"box": [4.0, 6.0, 20.0, 24.0]}, {"box": [0.0, 15.0, 40.0, 30.0]}]
    assert pieces == ["Is ", 0, " near ", 1, " or ", 0, "?"]
    assert regions_in("What is [3, 4, 5, 6] here?", 40, 30) == (
        [{"box": [0, 0, 40, 30]}], ["What is [3, 4, 5, 6] here?"],
    )  # fmt: skip


def test_context():
    assert context_text({"image": "1.png", "text": "a dog"}) == "a dog"
    assert context_text({"question_id": 1, "caption": "b", "boxes": []}) == "b"
    assert context_text({}) == ""


@pytest.mark.parametrize(
    ("reply", "ratings"),
    [
        ("8 7", (8, 7)), ("\n 8.5, 10\nAnswer 1 …", (8.5, 10)), ("8/10 7/10", (8, 7)), ("Sure!\n5 6", (5, 6)),
        ("Answer 1: 3; answer 2: 4", (3, 4)), ("8", None), ("0 5", None), ("8 7 6", None), ("11 5", None), ("", None),
    ],
)  # fmt: skip
def test_ratings(reply, ratings):
    assert read_ratings(reply) == (None if ratings is None else Rating(*ratings))


def test_ratio_may_exceed_a_hundred():
    assert ratio([Rating(5, 10), Rating(5, 5)])["score"] == 150
