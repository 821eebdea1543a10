"""Open-vocabulary recognition: words, records of all known forms, scores by hand, the command with TAP alone."""

from __future__ import annotations

import json

import pytest
from judging import Scripted, rectangle, run_quietly, write_bert, write_picture

from eval.command import cli
from eval.inquiries import Inquiries, read_records
from eval.recognition import Recognition, clean_answer, clean_name, main, word_iou
from eval.region_records import names_of, regions_of
from eval.sentence_similarity import SentenceEncoder
from tap_llm.errors import InputError

SQUARE = [[2, 3, 12, 3, 12, 13, 2, 13]]


@pytest.fixture
def file(tmp_path):
    """A good record with a region that cannot be used, one without its picture, one that is broken, a second id."""
    for number in range(2):
        write_picture(tmp_path / "val2017" / f"{number}.png", seed=number)
    records = [
        {
            "id": 1, "file_name": "0.png", "height": 30, "width": 40, "categories": ["dog", "coffee_cup", "cat"],
            "annotations": [
                {"segmentation": SQUARE}, {"segmentation": rectangle(20, 5, 30, 25)},
                {"segmentation": rectangle(0, 0, 5, 5, width=20)},
            ],
        },
        {"id": 2, "file_name": "absent.png", "categories": ["bus"], "annotations": [{"segmentation": SQUARE}]},
        {"id": 3, "file_name": "1.png", "categories": ["red", "blue"], "annotations": [{"segmentation": SQUARE}]},
        {"id": 1, "file_name": "1.png", "categories": ["cup"], "annotations": [{"segmentation": SQUARE}]},
        {"id": 4, "file_name": "1.png", "categories": ["cup"], "annotations": [{"segmentation": SQUARE}]},
        ["no", "record"],
        {"id": 5, "file_name": "1.png", "width": 99, "height": 30, "categories": ["a"], "annotations": []},
    ]  # fmt: skip
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(records))
    return path


ANSWERS = {'[{"mask": [[2, 3, 12': "Dog.", "counts": "It is: a cup"}


def examples(file):
    return Inquiries(read_records(file), file.parent, "file_name")


def test_scores_by_hand(file, tmp_path):
    scripted = Scripted(ANSWERS)
    found = run_quietly(Recognition(examples(file), scripted), tmp_path / "r.json")
    metrics = found.results["metrics"]
    # dog 1; "a cup" of "coffee cup" 1/3; cup of record 4, answered "Dog.", 0; six more without an answer
    names = ["dog", "coffee_cup", "cat", "bus", "red", "blue", "cup", "cup", "a"]
    assert metrics["regions"] == len(names)
    assert metrics["answered"] == 3 / 9
    assert metrics["semantic_iou"] == pytest.approx((1 + 1 / 3) / 9)
    assert "--embedding-model" in found.results["not_measured"]["semantic_similarity"]
    faults = "\n".join(found.results["faults"])
    for message in (
        "1, question 3: mask is 20x30, but the image is 40x30", "2: image: there is no file", "the id 1 is used twice",
        "3: there are 1 regions, but 2 categories", "record 5: expected a record, got list",
        "the picture is 40x30, but its record states 99x30",
    ):  # fmt: skip
        assert message in faults
    assert len(found.results["faults"]) == 6
    assert scripted.asked[0] == "<image>What is the category of region 1 <0>? Using only one word or phrase."
    cases = json.loads((tmp_path / "r.cases.json").read_text())
    assert cases[0]["cases"] == 9 and cases[0]["best"][0]["text"] == "truth: dog\nanswer: Dog."
    assert cases[0]["best"][0]["truth"][0]["mask"]["size"] == [30, 40]


def test_a_region_without_form_costs_its_own_question(tmp_path):
    write_picture(tmp_path / "0.png")
    annotations = [{"segmentation": []}, {"bbox": [1, 2]}, {"bbox": [1, 2, 9, 9]}]
    (tmp_path / "a.json").write_text(
        json.dumps([{"file_name": "0.png", "categories": ["dog"] * 3, "annotations": annotations}])
    )
    found = run_quietly(Recognition(examples(tmp_path / "a.json"), Scripted({"What": "dog"})), tmp_path / "r.json")
    assert found.results["metrics"]["semantic_iou"] == 1 / 3
    assert [fault[:22] for fault in found.results["faults"]] == ["record 0, question 1: ", "record 0, question 2: "]


def test_similarity_counts_missing_answers_as_zero(file, tmp_path):
    encoder = SentenceEncoder.from_pretrained(str(write_bert(tmp_path / "tiny-bert")))
    found = run_quietly(Recognition(examples(file), Scripted(ANSWERS), encoder), tmp_path / "r.json").results
    expected = sum(encoder.similarity(["dog", "coffee cup", "cup"], ["Dog", "a cup", "Dog"])) / 9
    metrics = found["metrics"]
    assert metrics["semantic_similarity tiny-bert"] == pytest.approx(expected)
    assert metrics["mean_of_both tiny-bert"] == pytest.approx((expected + metrics["semantic_iou"]) / 2)
    assert found["not_measured"] == {}


def test_answers_do_not_depend_on_the_batch(file, tmp_path):
    results = [
        run_quietly(Recognition(examples(file), Scripted(ANSWERS)), tmp_path / f"{size}.json", size).predictions
        for size in (1, 4)
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        (" dog. ", "dog"), ("Category: animal: dog", "animal dog"), ("a, b.c", "a b c"), ("", ""), (":", ""),
        ("hot dog", "hot dog"),
    ],
)  # fmt: skip
def test_cleaning(answer, cleaned):
    assert clean_answer(answer) == cleaned
    assert clean_name("chair:leg_(wood)") == "chair leg (wood)"


def test_word_iou():
    assert word_iou("red dog", "Dog") == 0.5
    assert word_iou("dog dog", "dog") == 1
    assert word_iou("", "") == 0


def test_boxes_and_points():
    assert regions_of({"annotations": [{"bbox": [1, 2, 3, 4]}, {"points": [5, 6]}]}) == [
        {"box": [1, 2, 4, 6]}, {"points": [[5, 6]]},
    ]  # fmt: skip
    assert regions_of({"bbox": [[1, 2, 3, 4], [0, 0, 2, 2]]}) == [{"box": [1, 2, 4, 6]}, {"box": [0, 0, 2, 2]}]
    assert regions_of({"bbox": [1, 2, 3, 4]}) == [{"box": [1, 2, 4, 6]}]
    assert regions_of({"points": [[1, 2], [3, 4]]}) == [{"points": [[1, 2]]}, {"points": [[3, 4]]}]
    assert regions_of({"annotations": [{"segmentation": []}, {"bbox": [1, 2]}]}) == [{}, {"box": [1, 2]}]
    with pytest.raises(InputError, match="no regions"):
        regions_of({"annotations": []})


def test_names():
    assert names_of({"categories": ["dog", "cup:handle"]}) == ["dog", "cup:handle"]
    assert names_of({"gt_answers": "<Region 1>: dog. <Region 2>: hot dog"}) == ["dog", "hot dog"]
    assert names_of({"gt_answers": ["<Region 1>: dog"]}) == ["dog"]
    assert names_of({"gt_answers": "dog"}) == ["dog"]
    assert names_of({"categories": 3}) == names_of({}) == []


def test_lines_that_are_broken_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": 1}\n{"id":\n33\n')
    good, broken, number = read_records(path)
    assert good == {"id": 1}
    assert "line 2: not valid JSON" in str(broken) and "line 3: expected a JSON object" in str(number)


# TAP alone


def test_concepts_need_no_language_model(file, model_folder, pipe, tmp_path, capsys):
    arguments = [
        "--model",
        str(model_folder),
        "--data",
        str(file),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "r.json"),
    ]
    found = main(arguments)
    regions = [{"mask": SQUARE}, {"mask": rectangle(20, 5, 30, 25)}]
    said = [result["concept"] for result in pipe(str(tmp_path / "val2017" / "0.png"), regions, captions=False)]
    assert found.predictions[0]["answers"] == [*said, None]
    assert found.results["settings"]["answers"] == "concepts" and found.results["model"]["concepts"] == len(
        pipe.concepts
    )
    printed = capsys.readouterr().out
    assert "semantic_iou" in printed and "regions/s" in printed and printed.count("NOT EVALUATED") == 6


def test_models_without_concepts_are_refused(file, make_pipe, tmp_path, capsys):
    make_pipe(words=False).save_pretrained(tmp_path / "bare")
    arguments = ["--model", str(tmp_path / "bare"), "--data", str(file), "--out", str(tmp_path / "r.json")]
    assert cli(lambda: main(arguments)) == 2
    assert "name one with --concepts" in capsys.readouterr().err
    assert cli(lambda: main(["--model", "absent", *arguments[2:]])) == 2
    assert "unknown model 'absent'" in capsys.readouterr().err
