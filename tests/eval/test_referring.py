"""Referring segmentation: both protocols by hand on MDETR's layout, and the command on random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled import run_quietly, write_answer
from PIL import Image
from random_clip import random_clip

from eval.interactive import MaskedSamples
from eval.referring import PROTOCOLS, Referring, ReferringPerSentence, main
from tap_llm.masks import encode_rle

HEIGHT, WIDTH = 4, 10
# Columns that a sentence is held to mean; of several sentences those of any.
MEANT = {"the left one": (0, 4), "left": (0, 2), "red": (5, 9), "the thing": (0, 10), "nothing": (0, 0)}


def columns(left: int, right: int) -> np.ndarray:
    inside = np.zeros((HEIGHT, WIDTH), dtype=bool)
    inside[:, left:right] = True
    return inside


class Scripted:
    """A referrer that knows the sentences of `MEANT`."""

    def __init__(self) -> None:
        self.asked: list[list[list[str]]] = []

    def settings(self) -> dict[str, Any]:
        return {}

    def refer(self, image: Image.Image, expressions: Sequence[Sequence[str]]) -> list[np.ndarray]:
        self.asked.append([list(texts) for texts in expressions])
        return [np.any([columns(*MEANT[text]) for text in texts], axis=0) for texts in expressions]


def expression(number: int, image: str, text: str, owner: int, mask: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """An image record and its annotation as MDETR has them: one of each per expression."""
    record = {"id": number, "file_name": image, "height": HEIGHT, "width": WIDTH, "caption": text}
    record |= {"dataset_name": "refcoco", "tokens_negative": [[0, len(text)]]}
    region = {"id": number, "image_id": number, "original_id": owner, "bbox": [0, 0, 4, 4]}
    return record, region | ({} if mask is None else {"segmentation": mask})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """a: an object of columns 0-3 with two sentences, one of 5-9 with one, one without mask; b has no picture."""
    first, second = encode_rle(columns(0, 4)), encode_rle(columns(5, 10))
    rows = [
        expression(1, "a.png", "the left one", 70, first),
        expression(2, "a.png", "left", 70, first),
        expression(3, "a.png", "red", 71, second),
        expression(4, "a.png", "nothing", 72, None),
        expression(5, "b.png", "the thing", 73, first),
        expression(6, "b.png", "nothing", 73, first),
    ]
    write_answer(tmp_path / "a.png", np.zeros((HEIGHT, WIDTH)))
    path = tmp_path / "finetune_refcoco_val.json"
    path.write_text(json.dumps({"images": [row[0] for row in rows], "annotations": [row[1] for row in rows]}))
    return path


def test_all_sentences_of_an_object_are_one_list(file: Path, tmp_path: Path) -> None:
    scripted = Scripted()
    found = run_quietly(Referring(scripted, MaskedSamples(file)), tmp_path / "r.json").results
    assert found["protocol"] == "referring-released-v1"
    assert scripted.asked == [[["the left one", "left"], ["red"]]]
    metrics = found["metrics"]
    assert metrics["asked"] == 4  # two objects, one without mask, one without picture
    assert metrics["miou"] == pytest.approx((1 + 4 / 5) / 4)
    assert metrics["overall_iou"] == pytest.approx((16 + 16) / (16 + 20 + 16))
    assert metrics["precision_at_0.5"] == 2 / 4
    assert found["expressions"] == 3
    faults = "\n".join(found["faults"])
    assert "image 5: image: there is no file" in faults and "image 1: region 72: there is no mask" in faults
    assert len(found["faults"]) == 2


def test_each_sentence_alone(file: Path, tmp_path: Path) -> None:
    scripted = Scripted()
    found = run_quietly(ReferringPerSentence(scripted, MaskedSamples(file)), tmp_path / "r.json").results
    assert found["protocol"] == "referring-per-sentence-v1"
    assert scripted.asked == [[["the left one"], ["left"], ["red"]]]
    metrics = found["metrics"]
    assert metrics["asked"] == 6
    assert metrics["miou"] == pytest.approx((1 + 2 / 4 + 4 / 5) / 6)
    assert metrics["overall_iou"] == pytest.approx((16 + 8 + 16) / (16 + 16 + 20 + 32))
    assert metrics["precision_at_0.5"] == 2 / 6


def test_cases_show_sentences_and_masks(file: Path, tmp_path: Path) -> None:
    run_quietly(Referring(Scripted(), MaskedSamples(file)), tmp_path / "r.json")
    (group,) = json.loads((tmp_path / "r.cases.json").read_text())
    assert group["best"][0]["text"] == "the left one\nleft" and group["best"][0]["score"] == 1
    assert group["worst"][0]["answer"] == [{"mask": encode_rle(columns(5, 9))}]
    assert group["worst"][0]["truth"] == [{"mask": encode_rle(columns(5, 10))}]


def test_a_damaged_record_counts_as_one(tmp_path: Path) -> None:
    write_answer(tmp_path / "a.png", np.zeros((HEIGHT, WIDTH)))
    lines = [
        {"image": "a.png", "regions": [{"mask": encode_rle(columns(0, 4)), "captions": ["left"]}]},
        {"image": "a.png", "regions": [{"mask": encode_rle(np.ones((2, 2), bool)), "captions": ["left", "red"]}]},
        {"image": "a.png", "regions": 3},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = run_quietly(ReferringPerSentence(Scripted(), MaskedSamples(path)), tmp_path / "r.json").results
    assert found["metrics"]["asked"] == 4 and found["metrics"]["miou"] == pytest.approx(0.5 / 4)
    assert len(found["faults"]) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_command(file: Path, tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_answer(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)))
    random_clip().save_pretrained(tmp_path / "clip")
    arguments = [
        "--model", "refcoco", "--f", str(tmp_path / "clip"), "--g", str(tmp_path / "clip"), "--data", str(file),
        "--protocol", protocol, "--out", str(tmp_path / "r.json"), "--device", "cpu", "--refine", "none",
    ]  # fmt: skip
    found = main(arguments)
    assert found.results["protocol"] == f"referring-{protocol}-v1"
    assert found.results["settings"]["templates"] == () and found.results["settings"]["mode"] == "referring"
    assert len(found.predictions[0]["answers"]) == {"released": 2, "per-sentence": 3}[protocol]
    assert "overall_iou" in capsys.readouterr().out


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match="not recognised"):
        main(["--data", str(tmp_path / "refs(unc).p")])
