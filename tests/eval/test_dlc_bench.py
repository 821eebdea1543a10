"""DLC-Bench: scores by hand, from answers of a judge, with all that can go wrong."""

from __future__ import annotations

import json
import re

import pytest
from judging import Scripted, completion, judge_of, rectangle, run_quietly, write_picture

from eval.dlc_bench import DlcBench, read_regions
from eval.inquiries import Inquiries
from eval.judge import Judge
from eval.judge_replies import Replies
from tap_llm.errors import InputError, MissingFileError


def question(kind, number, *scores):
    return {"question": f"{kind} {number}?", "type": kind, "choices": [[f"choice {s}", s] for s in scores]}


ASKED = [question("positive", 1, 1, 0, -1), question("positive", 2, 0.5, 0), question("negative", 3, -1, 1)]


@pytest.fixture
def folder(tmp_path):
    """Regions 1 to 4 on two pictures; 5 has a mask of the wrong size, 6 no questions, 7 an odd one, 8 no picture."""
    write_picture(tmp_path / "images" / "0.png")
    write_picture(tmp_path / "images" / "1.png", width=50)
    sizes = {1: 40, 2: 40, 3: 50, 4: 50, 5: 20, 6: 40, 7: 40}
    write_all(
        tmp_path,
        annotations={
            "images": [{"id": 10, "file_name": "0.png"}, {"id": 11, "file_name": "1.png"}],
            "annotations": [
                {"id": n, "image_id": 10 + (n in (3, 4)), "segmentation": rectangle(n, 1, n + 9, 20, width=width)}
                for n, width in sizes.items()
            ]
            + [{"id": 8, "image_id": 99, "segmentation": rectangle(1, 1, 5, 5)}],
        },
        qa={str(n): ASKED[:2] if n == 4 else ASKED for n in (1, 2, 3, 4, 5, 8)} | {"7": [question("odd", 1, 1)]},
        class_names={str(n): f"thing{n}" for n in range(1, 9)},
    )
    return tmp_path


def write_all(folder, **documents):
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))


def examples(folder):
    return Inquiries(read_regions(folder), folder / "images", "file_name")


class ByCaption:
    """Letters by caption and question."""

    LETTERS = {
        "one": {"thing1": "A", "positive 1": "A", "positive 2": "B. choice 0", "negative 3": "choice 1"},  # 1, 0, 1
        "two": {"thing2": "B", "positive 1": "A", "positive 2": "A", "negative 3": "A"},  # not recognized: 0, 0, -1
        "three": {"thing3": "Yes.", "positive 1": "C", "positive 2": "no idea", "negative 3": "B"},  # -1, 0, 1
    }

    def __call__(self, text):
        caption = re.search(r"(\w+) caption", text)[1]
        key = next(key for key in self.LETTERS[caption] if key in text)
        return completion(self.LETTERS[caption][key], "llama")


ANSWERS = {"40x30": "?", "50x30": "?"}


def scripted():
    """Region 1 to 3 get captions, 4 an empty one; told apart by their masks."""
    counts = {n: rectangle(n, 1, n + 9, 20, width=w)["counts"] for n, w in ((1, 40), (2, 40), (3, 50))}
    return Scripted(
        {json.dumps(counts[n])[1:-1]: f"{name} caption" for n, name in ((1, "one"), (2, "two"), (3, "three"))}
    )


def test_scores_by_hand(folder, tmp_path):
    with judge_of(tmp_path, ByCaption()) as (judge, server):
        found = run_quietly(DlcBench(examples(folder), scripted(), judge), tmp_path / "r.json").results
    metrics = found["metrics"]["judge judge (llama)"]
    # means over regions 1, 2, 3, 4 (empty), 5 (bad mask), 6 and 7 (no usable questions), 8 (no picture)
    positive = (1 / 2 + 0 - 1 / 2 + 0 + 0 + 0 + 0 + 0) / 8
    negative = (1 - 1 + 1 + 0 + 0 + 0 + 0) / 7  # region 4 has no negative question
    assert metrics["positive"] == pytest.approx(positive) and metrics["negative"] == pytest.approx(negative)
    assert metrics["average"] == pytest.approx((positive + negative) / 2)
    assert metrics["recognized"] == 2 / 8 and metrics["regions"] == 8
    assert len(server.bodies) == 3 * 4  # one recognition and three questions each; none without a caption
    faults = "\n".join(found["faults"])
    for message in (
        "5: mask is 20x30, but the image is 40x30", "6: qa.json has no questions about it",
        "region 7: a question of the unknown type 'odd'", '8: the record is malformed: "file_name" is missing',
        "4: the answer is empty",
        "3: 1 of 4 questions to the judge came to nothing: the judge chose none of the options: 'no idea'",
    ):  # fmt: skip
        assert message in faults
    assert len(found["faults"]) == 6
    sent = [body["messages"][0]["content"] for body in server.bodies]
    assert any("is a thing1, or an object" in text and "A. Yes\nB. No" in text for text in sent)
    assert all(body["max_tokens"] == 300 and body["temperature"] == 0 for body in server.bodies)


def test_what_the_model_is_asked(folder, tmp_path):
    model = scripted()
    with judge_of(tmp_path, ByCaption()) as (judge, _):
        run_quietly(DlcBench(examples(folder), model, judge), tmp_path / "r.json")
    assert model.asked[0] == "<image>region 1: <0>\nDescribe the masked region in detail."
    assert len(model.asked) == 4


def test_without_a_judge_all_is_wrong_and_named(folder, tmp_path):
    with judge_of(tmp_path, lambda text: (401, b"no")) as (judge, server):
        found = run_quietly(DlcBench(examples(folder), scripted(), judge), tmp_path / "r.json").results
    metrics = found["metrics"]["judge judge"]
    assert [metrics[name] for name in ("positive", "negative", "average", "recognized")] == [0, 0, 0, 0]
    assert sum("4 of 4 questions to the judge came to nothing" in fault for fault in found["faults"]) == 3
    assert len(server.bodies) < 12


def test_replay_gives_the_same_scores(folder, tmp_path):
    with judge_of(tmp_path, ByCaption()) as (judge, _):
        first = run_quietly(DlcBench(examples(folder), scripted(), judge), tmp_path / "r.json").results
    with Judge("judge", Replies(tmp_path / "judge.jsonl", read_only=True), workers=1) as judge:
        again = run_quietly(DlcBench(examples(folder), scripted(), judge), tmp_path / "s.json").results
    assert (again["metrics"], again["faults"]) == (first["metrics"], first["faults"])
    lines = (tmp_path / "judge.jsonl").read_text().splitlines(keepends=True)
    lost = next(line for line in lines if "one caption" in line and "positive 1" in line)
    (tmp_path / "judge.jsonl").write_text("".join(line for line in lines if line != lost))
    with Judge("judge", Replies(tmp_path / "judge.jsonl", read_only=True), workers=1) as judge:
        less = run_quietly(DlcBench(examples(folder), scripted(), judge), tmp_path / "t.json").results
    [fault] = set(less["faults"]) - set(first["faults"])
    assert fault.startswith("1: 1 of 4 questions") and "judge.jsonl has no reply of judge to this request" in fault
    assert less["metrics"]["judge judge (llama)"]["positive"] < first["metrics"]["judge judge (llama)"]["positive"]


def test_files_that_cannot_be_used(folder):
    (folder / "qa.json").write_text("[]")
    with pytest.raises(InputError, match=r"qa.json must hold a JSON object"):
        read_regions(folder)
    (folder / "qa.json").write_text("{}")
    (folder / "class_names.json").unlink()
    with pytest.raises(MissingFileError, match=r"class_names.json"):
        read_regions(folder)
