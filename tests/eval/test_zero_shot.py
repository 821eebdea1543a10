"""Zero-shot classification: scores by hand, folders and files, templates, the command on random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled import run_quietly, write_answer
from PIL import Image
from random_clip import random_clip
from torch import Tensor

from eval.classed_pictures import open_classed, read_names
from eval.clips import ClipEncoder
from eval.zero_shot import ZeroShot, main, read_templates
from tap_llm.clip_as_rnn import Clip
from tap_llm.errors import InputError, MissingFileError

NAMES = ["ant", "big bee", "cat", "dog", "elk", "fox"]


class Scripted:
    """Knows six names; a picture looks like the name of its red value, and more and more unlike those after it."""

    def __init__(self) -> None:
        self.templates: Sequence[str] = ()

    def settings(self) -> dict[str, Any]:
        return {"resize": "crop"}

    def texts(self, texts: Sequence[str], templates: Sequence[str]) -> Tensor:
        self.templates = templates
        return torch.eye(6)[[NAMES.index(text) for text in texts]]

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        seen = [int(np.asarray(image)[0, 0, 0]) for image in images]
        return torch.tensor([[1 - ((place - red) % 6) / 6 for place in range(6)] for red in seen])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of ants, one of them seen as a fox; of a bee seen as a cat; of a dog; one broken of a cat."""
    for name, red in {"ant/0": 0, "ant/1": 5, "big_bee/x/0": 2, "dog/0": 3, "elk/0": 4, "fox/0": 5}.items():
        write_answer(tmp_path / "val" / f"{name}.png", [[red]])
    (tmp_path / "val" / "cat").mkdir()
    (tmp_path / "val" / "cat" / "0.jpg").write_bytes(b"broken")
    (tmp_path / "val" / "cat" / "notes.txt").touch()
    return tmp_path / "val"


def test_scores_by_hand(folder: Path, tmp_path: Path) -> None:
    encoder = Scripted()
    found = run_quietly(ZeroShot(encoder, open_classed(folder), ["a {}."]), tmp_path / "r.json", 3)  # type: ignore
    metrics = found.results["metrics"]
    assert (metrics["pictures"], metrics["classes"]) == (7, 6)
    assert metrics["top1"] == pytest.approx(4 / 7)
    assert metrics["top5"] == pytest.approx(5 / 7)  # the fox-like ant counts, the bee seen as what follows it does not
    assert metrics["class_top1"] == pytest.approx((0.5 + 0 + 0 + 1 + 1 + 1) / 6)
    assert encoder.templates == ["a {}."]
    assert found.predictions[2]["label"] == "big_bee" and found.predictions[2]["best"][0] == ["cat", 1.0]
    (fault,) = found.results["faults"]
    assert fault.startswith("cat/0.jpg: ") and "damaged" in fault
    (group,) = json.loads((tmp_path / "r.cases.json").read_text())
    assert (
        group["worst"][0]["score"] == -1 and "truth: big bee" in group["worst"][0]["text"] + group["worst"][1]["text"]
    )


def test_batches_do_not_matter(folder: Path, tmp_path: Path) -> None:
    encoder = ClipEncoder(random_clip())
    runs = [
        run_quietly(ZeroShot(encoder, open_classed(folder)), tmp_path / f"{size}.json", size).predictions
        for size in (1, 7)
    ]
    for one, other in zip(*runs, strict=True):
        labels, values = zip(*one.get("best", [["", 0]]), strict=True)
        other_labels, other_values = zip(*other.get("best", [["", 0]]), strict=True)
        assert labels == other_labels and values == pytest.approx(other_values, abs=1e-4)


def test_pictures_of_a_file(tmp_path: Path) -> None:
    document = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(4)],
        "categories": [{"id": 5, "name": "ant"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 0, "category_id": 2}, {"image_id": 0, "category_id": 2}, {"image_id": 1, "category_id": 2},
            {"image_id": 1, "category_id": 5}, {"image_id": 2, "category_id": 9}, {"image_id": 7, "category_id": [5]},
        ],
    }  # fmt: skip
    write_answer(tmp_path / "0.png", [[2]])
    (tmp_path / "a.json").write_text(json.dumps(document))
    pictures = open_classed(tmp_path / "a.json")
    assert list(pictures.classes) == ["ant", "cat", "dog"]
    assert [picture.label for picture in pictures] == ["cat", "", "", ""]
    found = run_quietly(ZeroShot(Scripted(), pictures), tmp_path / "r.json").results  # type: ignore[arg-type]
    assert found["metrics"]["top1"] == found["metrics"]["top5"] == 0.2
    assert len(found["faults"]) == 4 and "exactly one of the categories" in found["faults"][0]
    assert found["faults"][-1] == "annotations: there is no image 7"


def test_names_and_templates(folder: Path, tmp_path: Path) -> None:
    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    names = read_names(written("map.txt", "ant ant lion, ant\nbig_bee bee\ncat cat\ndog dog\nelk elk\nfox fox\n"))
    assert names["ant"] == "ant lion" and open_classed(folder, names=names).classes == names
    assert read_names(written("map.json", '{"ant": "an ant"}')) == {"ant": "an ant"}
    with pytest.raises(InputError, match="no name for 'big_bee'"):
        open_classed(folder, names={"ant": "an ant"})
    with pytest.raises(InputError, match="a name for each class"):
        read_names(written("list.json", "[]"))
    assert read_templates(None) == ("a photo of a {}.",)
    assert read_templates(written("t.txt", "{}\n\n the {}.\n")) == ["{}", "the {}."]
    with pytest.raises(InputError, match="each with {}"):
        read_templates(written("bad.txt", "no place"))
    for missing in (lambda: read_names(tmp_path / "no"), lambda: read_templates(tmp_path / "no")):
        with pytest.raises(MissingFileError):
            missing()
    with pytest.raises(InputError, match="no pictures with a class"):
        open_classed(folder / "cat")


def test_embeddings_are_unit_and_of_the_mean_over_templates() -> None:
    encoder = ClipEncoder(random_clip())
    one, other = encoder.texts(["a dog"], ["{}."]), encoder.texts(["a dog"], ["see {}"])
    both = encoder.texts(["a dog"], ["{}.", "see {}"])
    assert torch.allclose(both, torch.nn.functional.normalize(one + other, dim=1), atol=1e-6)
    seen = encoder.pictures([Image.new("RGB", (40, 20), "red"), Image.new("L", (9, 9)).convert("RGB")])
    assert torch.allclose(seen.norm(dim=1), torch.ones(2), atol=1e-5)
    assert encoder.pictures([]).shape == (0, seen.shape[1])
    with pytest.raises(InputError, match="without a tokenizer"):
        ClipEncoder(Clip(random_clip().model))


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_clip().save_pretrained(tmp_path / "clip")
    arguments = ["--model", str(tmp_path / "clip"), "--data", str(folder), "--out", str(tmp_path / "r.json")]
    found = main([*arguments, "--device", "cpu", "--resize", "squash"])
    assert found.results["protocol"] == "zero-shot-v1" and found.results["pictures"] == 6
    assert found.results["settings"]["classes"]["big_bee"] == "big bee"
    assert found.results["settings"]["resize"] == "squash"
    assert "class_top1" in capsys.readouterr().out
    with pytest.raises(MissingFileError):
        main([*arguments[:2], "--data", str(tmp_path / "absent")])
