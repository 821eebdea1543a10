"""Image–text retrieval: ranks by hand and by definition, both kinds of files, the command on random weights."""

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
from torch.nn.functional import normalize

from eval.captioned_pictures import CaptionedPictures
from eval.clips import ClipEncoder
from eval.retrieval import Retrieval, main, ranks_of_own
from tap_llm.errors import InputError, MissingFileError


class Angles:
    """Pictures by their red value, captions by the number in them: degrees of a circle."""

    def settings(self) -> dict[str, Any]:
        return {}

    def texts(self, texts: Sequence[str], templates: Sequence[str]) -> Tensor:
        (template,) = templates
        return _circle([int(template.format(text).split()[-1]) for text in texts])

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        return _circle([int(np.asarray(image)[0, 0, 0]) for image in images])


def _circle(degrees: list[int]) -> Tensor:
    radians = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Pictures at 10, 50 and 90 degrees, one that is missing, one without captions; a caption of no picture."""
    said = {1: [12, 80], 2: [22, 140], 3: [85], 4: [11]}
    annotations = [
        {"id": 10 * number + place, "image_id": number, "caption": f"at {angle}"}
        for number, angles in said.items()
        for place, angle in enumerate(angles)
    ]
    annotations += [{"id": 99, "image_id": 77, "caption": "at 10"}, {"id": 98, "image_id": 5, "caption": " "}]
    annotations += [{"id": 97, "image_id": [1], "caption": "at 20"}]
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(1, 6)]
    for number, angle in {1: 10, 2: 50, 3: 90, 5: 0}.items():
        write_answer(tmp_path / f"{number}.png", [[angle]])
    (tmp_path / "captions_val.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path / "captions_val.json"


def test_recalls_by_hand(file: Path, tmp_path: Path) -> None:
    found = run_quietly(Retrieval(Angles(), CaptionedPictures(file)), tmp_path / "r.json", 2).results  # type: ignore
    metrics = found["metrics"]
    # 50 finds 22 and 90 finds 85; to 10 "11", of the missing picture, is nearer than 12. The missing picture and the
    # one without captions are not found.
    assert metrics["picture_to_text"] == {"asked": 5, "r1": 2 / 5, "r5": 3 / 5, "r10": 3 / 5}
    # 12 finds 10 and 85 finds 90; 80 finds 90, 22 finds 10, and 140 finds 90 before their own; 11, "at 10",
    # the empty caption and the one of no picture nothing
    assert metrics["text_to_picture"] == {"asked": 9, "r1": 2 / 9, "r5": 5 / 9, "r10": 5 / 9}
    faults = "\n".join(found["faults"])
    for message in (
        "image 4: image: there is no file", "image 5: there are no captions", "caption 99: there is no image 77",
        "caption 98 of image 5: it has no words", "caption 97: there is no image [1]",
    ):  # fmt: skip
        assert message in faults
    assert len(found["faults"]) == 5
    (group,) = json.loads((tmp_path / "r.cases.json").read_text())
    assert "there is no file" in group["worst"][0]["text"] and group["cases"] == 4


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
    texts = normalize(torch.randn(8, 4, generator=generator), dim=1)
    pictures = normalize(torch.randn(5, 4, generator=generator), dim=1)
    cosines = pictures @ texts.T
    expected = []
    for place in range(5):
        order = cosines[place].argsort(descending=True).tolist()
        first = next(rank for rank, text in enumerate(order) if owners[text] == place)
        expected.append(first)
    assert ranks_of_own(pictures, texts, torch.arange(5), owners) == expected
    order = cosines.T.argsort(dim=1, descending=True).tolist()
    assert ranks_of_own(texts, pictures, owners, torch.arange(5)) == [
        row.index(owner) for row, owner in zip(order, owners.tolist(), strict=True)
    ]


def test_equal_similarities_count_against_the_model() -> None:
    same, owners = torch.ones(6, 1), torch.tensor([0, 0, 1, 1, 2, 2])
    assert ranks_of_own(same[:3], same, torch.arange(3), owners) == [4, 4, 4]
    assert ranks_of_own(same, same[:3], owners, torch.arange(3)) == [2] * 6


def test_karpathy_split(tmp_path: Path) -> None:
    images = [
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "A dog."}, {"raw": "Dog"}, {}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "A cat."}]},
        {"filename": "c.jpg", "split": "test", "sentences": []},
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    (tmp_path / "val2014").mkdir()
    write_answer(tmp_path / "val2014" / "a.jpg", [[1]])
    pictures = CaptionedPictures(tmp_path / "dataset.json")
    assert [picture.captions for picture in pictures] == [["A dog.", "Dog"]]
    assert pictures[0].path == tmp_path / "val2014" / "a.jpg"
    assert pictures.bare == ["c.jpg: there are no captions"]
    assert pictures.strays == ["a.jpg: a caption has no words"]
    assert len(CaptionedPictures(tmp_path / "dataset.json", split="train")) == 1
    with pytest.raises(InputError, match="none of the split 'val'"):
        CaptionedPictures(tmp_path / "dataset.json", split="val")
    with pytest.raises(MissingFileError):
        CaptionedPictures(tmp_path / "absent.json")


def test_batches_do_not_matter(file: Path, tmp_path: Path) -> None:
    encoder = ClipEncoder(random_clip())
    runs = [
        run_quietly(Retrieval(encoder, CaptionedPictures(file), "see {}"), tmp_path / f"{size}.json", size).results
        for size in (1, 4)
    ]
    assert runs[0]["metrics"] == runs[1]["metrics"]
    with pytest.raises(InputError, match="a template must have {}"):
        Retrieval(encoder, CaptionedPictures(file), "see")


def test_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_clip().save_pretrained(tmp_path / "clip")
    arguments = ["--model", str(tmp_path / "clip"), "--data", str(file), "--out", str(tmp_path / "r.json")]
    found = main([*arguments, "--device", "cpu", "--template", "a photo of {}"])
    assert found.results["protocol"] == "retrieval-v1" and found.results["pictures"] == 4
    assert found.results["settings"] == {"resize": "crop", "template": "a photo of {}"}
    printed = capsys.readouterr().out
    assert "text_to_picture" in printed and printed.count("NOT EVALUATED") == 5
    assert (
        main([*arguments, "--device", "cpu", "--template", "a photo of {}"]).results["metrics"]
        == (found.results["metrics"])
    )
