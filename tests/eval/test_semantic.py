"""Semantic segmentation: scores by hand, what fails counts as wrong, the command with CaR on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from labelled import RedChannel, run_quietly, write_answer, write_labels
from random_clip import random_clip

from eval.label_maps import LabelFolder, LabelRecords
from eval.label_sets import LabelSet
from eval.semantic import Semantic, main
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle

NAMES = ["cat", "dog", "sky"]
TRUTH = {"a": [[0, 0, 1, 1], [2, 2, 2, 255]], "b": [[1, 1], [2, 2]], "c": [[2, 2]], "d": [[1, 1, 1]], "e": [[1]]}
ANSWER = {"a": [[0, 1, 1, 2], [2, 2, 0, 1]], "b": [[1, 1], [1, 0]], "d": [[200, 0, 0]], "e": [[1, 1]]}


@pytest.fixture
def pictures(tmp_path: Path) -> LabelFolder:
    """a and b are answered; c has no picture, the answer to d and the picture of e have another size, f no label."""
    for name, labels in TRUTH.items():
        write_labels(tmp_path / "labels" / f"{name}.png", labels)
    for name, labels in ANSWER.items():
        write_answer(tmp_path / "pictures" / f"{name}.png", labels)
    (tmp_path / "labels" / "f.png").write_bytes(b"broken")
    return LabelFolder(tmp_path / "labels", LabelSet(), tmp_path / "pictures", NAMES)


def test_scores_by_hand(pictures: LabelFolder, tmp_path: Path) -> None:
    found = run_quietly(Semantic(RedChannel(), pictures), tmp_path / "r.json").results
    metrics = found["metrics"]
    # 0: 1 right of 2, twice taken for it in vain; cat: 3 of 4 + 3 + 1, and 2 taken for it; dog: 2 of 5 + 2, and 1
    background, cat, dog = 1 / (2 + 2), 3 / (8 + 2), 2 / (7 + 1)
    assert {name: value["iou"] for name, value in metrics["classes"].items()} == pytest.approx(
        {"background": background, "cat": cat, "dog": dog, "sky": None}
    )
    assert metrics["miou"] == pytest.approx((background + cat + dog) / 3)
    # without row and column 0: cat is no more taken for pixels of the background, dog's two misses do not count
    assert metrics["miou_without_background"] == pytest.approx((3 / (8 + 1) + 2 / (5 + 1)) / 2)
    assert metrics["pixel_accuracy"] == pytest.approx(6 / 17) and metrics["unanswered"] == pytest.approx(6 / 17)
    assert metrics["pictures"] == 5 and found["examples_unusable"] == 1
    faults = "\n".join(found["faults"])
    for message in (
        "c: image: there is no file",
        "d: the model answers with labels of (1, 3)",
        "e: the picture is 2x1",
    ):
        assert message.replace("d: the model answers with labels of (1, 3)", "d: ") in faults
    assert "f: labels" in faults and len(found["faults"]) == 4


def test_cases_show_both(pictures: LabelFolder, tmp_path: Path) -> None:
    run_quietly(Semantic(RedChannel(), pictures), tmp_path / "r.json")
    (group,) = json.loads((tmp_path / "r.cases.json").read_text())
    best = group["best"][0]
    assert best["title"] == "a" and best["score"] == pytest.approx((1 / 3 + 1 / 3 + 2 / 4) / 3)
    assert [region["concept"] for region in best["truth"]] == ["cat", "dog"]
    assert best["answer"][0]["mask"] == encode_rle(np.array(ANSWER["a"]) == 1)
    assert {case["title"] for case in group["worst"]} >= {"c", "d"} and group["worst"][0]["text"]


def test_any_batch_and_order_gives_the_same(pictures: LabelFolder, tmp_path: Path) -> None:
    runs = [run_quietly(Semantic(RedChannel(), pictures), tmp_path / f"{size}.json", size) for size in (1, 3)]
    assert runs[0].predictions == runs[1].predictions
    assert runs[0].results["metrics"] == runs[1].results["metrics"]
    backwards = Semantic(RedChannel(), pictures).score(runs[0].predictions[::-1])
    assert backwards.metrics == runs[0].results["metrics"]


def test_another_model_or_query_is_asked_again(pictures: LabelFolder, tmp_path: Path) -> None:
    first, again = Semantic(RedChannel(), pictures), Semantic(RedChannel(), pictures)
    run_quietly(first, tmp_path / "r.json")
    assert run_quietly(again, tmp_path / "r.json").results["speed"]["examples_per_second"] is None
    pictures.queries = ("a cat", "dog", "sky")
    assert run_quietly(again, tmp_path / "r.json").results["speed"]["examples_per_second"] is not None


# The command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_clip().save_pretrained(tmp_path / "clip")
    inside = np.zeros((24, 40), dtype=bool)
    inside[:, 20:] = True
    rng = np.random.default_rng(0)
    for number in range(2):
        write_answer(tmp_path / f"{number}.png", rng.integers(0, 256, (24, 40)))
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 24, "width": 40} for n in range(2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "sky"}],
        "annotations": [
            {"id": n, "image_id": n // 2, "category_id": 1 + n % 2, "segmentation": encode_rle(inside ^ bool(n % 2))}
            for n in range(4)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    arguments = [
        "--model", str(tmp_path / "clip"), "--data", str(tmp_path / "a.json"), "--out", str(tmp_path / "r.json"),
        "--device", "cpu", "--refine", "none", "--set", "keep_threshold=0.1", "prompts=[black]",
    ]  # fmt: skip
    found = main(arguments)
    assert found.results["protocol"] == "semantic-v1" and found.results["examples"] == 2
    assert found.results["settings"]["prompts"] == ("black",)
    assert found.results["settings"]["queries"] == ["cat", "sky"] and "g_batch" not in found.results["settings"]
    assert sum(pixels for one in found.predictions for *_, pixels in one["counts"]) == 2 * 24 * 40
    printed = capsys.readouterr().out
    assert "miou_without_background" in printed and "sky" in printed
    again = main([*arguments, "--batch-size", "3"])  # the same predictions whatever the batch
    assert again.results["speed"]["examples_per_second"] is None
    assert LabelRecords(tmp_path / "a.json").queries == ("cat", "sky")


def test_command_refuses(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path), "--set", "keep_threshold"])
    with pytest.raises(InputError, match="--images DIR"):
        main(["--data", str(tmp_path)])
    with pytest.raises(InputError, match="no file"):
        main(["--data", str(tmp_path / "absent.json")])
