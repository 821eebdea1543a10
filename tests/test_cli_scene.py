"""`tap-llm scene`: a picture, what it shows, and one message where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tap_llm import cli
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.masks import decode_rle


def test_it_writes_the_scene_of_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "scene.png"
    assert cli.main(["scene", str(target), "--seed", "7", "--size", "160x120"]) == 0
    expected = SceneComposer(SpriteLibrary.bundled()).scene(7, (160, 120))
    assert np.array_equal(np.asarray(Image.open(target)), expected.image)
    assert capsys.readouterr().out.splitlines() == [captions[1] for captions in expected.captions]
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


def test_its_json_is_a_line_that_data_validate_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "scene.jpg"
    assert cli.main(["scene", str(target), "--mosaic", "--size", "128x96", "--json"]) == 0
    text = capsys.readouterr().out
    record = json.loads(text)
    masks = [decode_rle(region["mask"]) for region in record["regions"]]
    assert len(masks) > 3 and masks[0].shape == (96, 128) and sum(masks).max() == 1
    assert record["size"] == [96, 128] and record["messages"]
    (tmp_path / "scenes.jsonl").write_text(text, encoding="utf-8")
    assert cli.main(["data", "validate", str(tmp_path / "scenes.jsonl")]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["scene.gif"],
        ["no/scene.png"],
        ["s.png", "--size", "40"],
        ["s.png", "--size", "8x8"],
        ["s.png", "--sprites", "no"],
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["scene", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
