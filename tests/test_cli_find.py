"""`tap-llm find`: what is printed, what is written, what describe and chat make of it, and how it fails."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from random_clip import random_clip
from whole_chat import write_chat_model

from tap_llm import cli
from tap_llm.clip_as_rnn import CarPipeline
from tap_llm.errors import InputError
from tap_llm.masks import decode_rle, mask_to_box

QUERIES = ["a dog", "the red kite", "sky"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP model: it finds something, whatever it is asked for."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    random_clip().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def find(photo: Path, clip: str, *arguments: str) -> int:
    return cli.main(["find", str(photo), "--model", clip, "--device", "cpu", *arguments])


def find_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert find(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line on stderr of a command that failed."""
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("tap-llm: ")
    return err


def test_a_table_and_a_picture(photo: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(photo, clip, *QUERIES, "--set", "keep_threshold=1", "--refine", "none") == 0
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["#", "query", "score", "box"]
    assert [row.split("  ")[1].strip() for row in rows] == QUERIES
    assert sum(row.endswith("not found") for row in rows) == 2  # nothing is above 1: the best one stays
    picture = photo.with_name("photo.find.png")
    assert f"tap-llm: picture: {picture}\n" in err
    with Image.open(picture) as drawn:
        assert drawn.width >= 80
    assert {path.name for path in photo.parent.iterdir()} == {"photo.png", "photo.find.png"}


def test_json_is_what_the_pipeline_finds(photo: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = find_json(capsys, photo, clip, *QUERIES)
    expected = CarPipeline.from_pretrained(clip, "cpu")(photo, QUERIES)
    assert record["size"] == [60, 80] and record["mode"] == "semantic" and record["notes"] == expected.notes
    assert [row["query"] for row in record["queries"]] == QUERIES
    assert [row["score"] for row in record["queries"]] == pytest.approx(expected.scores.tolist())
    assert [row["id"] for row in record["queries"] if row["found"]] == expected.found != []
    for region, other in zip(record["regions"], expected.regions(), strict=True):
        assert np.array_equal(decode_rle(region["mask"]), other["mask"])
        assert (region["id"], region["category"]) == (other["id"], other["category"])
    assert record["trace"][0]["queries"] == [0, 1, 2]
    assert {path.name for path in photo.parent.iterdir()} == {"photo.png"}


def test_out_names_the_picture(photo: Path, clip: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "seen.webp"
    find_json(capsys, photo, clip, *QUERIES, "--out", str(out))
    with Image.open(out) as drawn:
        assert drawn.format == "WEBP"


def test_found_masks_can_be_described(photo: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = find_json(capsys, photo, clip, *QUERIES, "--describe")
    (photo.parent / "found.json").write_text(json.dumps(record))
    command = ["describe", str(photo), "--regions", str(photo.parent / "found.json"), "--json", "--device", "cpu"]
    assert cli.main(command) == 0
    described = json.loads(capsys.readouterr().out)
    assert [result["region"] for result in described] == record["regions"]
    for result, said in zip(described, record["described"], strict=True):
        assert {key: result[key] for key in said} == pytest.approx(said, abs=1e-4)
    assert find(photo, clip, *QUERIES, "--describe") == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[-2:] == ["concept", "caption"]
    assert all(said["concept"] in table for said in record["described"])


def test_regions_of_a_file_keep_their_place(
    photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = [{"box": [1, 2, 30, 40], "caption": None}, {"points": [[5, 6]]}]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(regions)))
    options = ["--box", "9,9,20,20", "--regions", "-", "--point", "3,3", "--no-captions", "--device", "cpu"]
    assert cli.main(["describe", str(photo), *options, "--json"]) == 0
    results = capsys.readouterr().out
    given = [result["region"] for result in json.loads(results)]
    assert given == [{"box": [9, 9, 20, 20]}, *regions, {"points": [[3, 3]], "labels": [1]}]
    (photo.parent / "again.json").write_text(results)
    command = ["describe", str(photo), "--regions", str(photo.parent / "again.json"), *options[-3:], "--json"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == results


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    write_chat_model(folder)
    return str(folder)


def test_chat_takes_what_was_found(
    photo: Path, clip: str, chat_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = find_json(capsys, photo, clip, *QUERIES)
    file = photo.parent / "found.json"
    file.write_text(json.dumps(record))
    command = ["chat", str(photo), "--regions", str(file), "--model", chat_model, "--max-new-tokens", "3"]
    assert cli.main([*command, "--device", "cpu", "What is region 1?", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["regions"] == [{"number": n, **region} for n, region in enumerate(record["regions"], 1)]
    regions = [*record["regions"][:1], {"box": [1, 2, 30, 40]}, {"points": [[5, 6], [7, 8]], "labels": [1, 0]}]
    file.write_text(json.dumps([*regions, {"sketch": [[1, 1], [9, 9]]}]))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main([*command, "--device", "cpu"]) == 0
    query = record["regions"][0]["category"]
    shown = [f"<mask {query}>", "<box 1,2,30,40>", "<point 5,6 7,8,0>", "<sketch 1,1 9,9>"]
    assert capsys.readouterr().out.splitlines() == [f"region {n}: {text}" for n, text in enumerate(shown, 1)]
    assert "takes up the standard input" in failure(capsys, cli.main(["chat", str(photo), "--regions", "-"]))


def test_expressions_are_merged(photo: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--mode", "referring", "--refine", "none", "--set", "keep_threshold=0"]
    record = find_json(capsys, photo, clip, *QUERIES, *options)
    assert record["mode"] == "referring" and len(record["regions"]) == 1
    box = mask_to_box(decode_rle(record["regions"][0]["mask"])) or []
    assert find(photo, clip, *QUERIES, *options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"together:  {','.join(map(str, box))}"


def test_options_reach_the_settings(
    photo: Path, clip: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    load = CarPipeline.from_pretrained

    def stop(*arguments: Any, **settings: Any) -> Any:
        seen.append(load(*arguments, **settings))
        raise InputError("seen enough")

    monkeypatch.setattr(CarPipeline, "from_pretrained", stop)
    options = ["--background", " grass, sky,", "--set", "prompts=[black, circle]", "--set", "max_steps=1"]
    assert find(photo, "voc", *QUERIES, "--f", clip, "--g", clip, *options, "--set", "refine=crf") == 2
    assert "seen enough" in capsys.readouterr().err
    config = seen[0].config
    assert (config.f, config.g, config.refine, config.keep_threshold) == (clip, clip, "crf", 0.6)
    assert (config.background, config.prompts, config.max_steps) == (("grass", "sky"), ("black", "circle"), 1)


def test_nothing_in_a_picture_of_one_colour(clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (50, 40), (10, 90, 200)).save(tmp_path / "plain.png")
    record = find_json(capsys, tmp_path / "plain.png", clip, *QUERIES, "--describe")
    assert record["regions"] == [] and not any(row["found"] for row in record["queries"])
    assert "nothing was found" in record["notes"]
    assert find(tmp_path / "plain.png", clip, *QUERIES) == 0
    out, err = capsys.readouterr()
    assert out.count("not found") == 3 and "one colour" in err
    (tmp_path / "found.json").write_text(json.dumps(record))
    command = ["describe", str(tmp_path / "plain.png"), "--regions", str(tmp_path / "found.json")]
    assert "there is no region in it" in failure(capsys, cli.main(command))


def test_equal_queries_share_their_score(photo: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = find_json(capsys, photo, clip, "a dog", "a dog", "--refine", "none")
    first, second = record["queries"]
    assert first["score"] == second["score"] == pytest.approx(0.5) and not second["found"]
    assert any("more than once" in note for note in record["notes"])


def test_a_long_query_is_cut_off_with_a_note(photo: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = " ".join(f"word{index}" for index in range(500))
    assert find(photo, clip, long, "a dog", "--refine", "none") == 0
    out, err = capsys.readouterr()
    assert "longer than the 77 tokens that CLIP reads" in err
    assert max(map(len, out.splitlines())) < 120


def test_a_thousand_queries(photo: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    queries = [f"thing {index}" for index in range(1000)]
    options = ["--refine", "none", "--set", "templates=[]", "--set", "background=[]", "--set", "max_steps=1"]
    record = find_json(capsys, photo, clip, *queries, *options, "--set", "g_batch=100")
    assert len(record["queries"]) == 1000
    assert find(photo, clip, *queries[:200], *options) == 0
    assert len(capsys.readouterr().out.splitlines()) == 201


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no query"),
        (["a dog", " "], "query 1 must be a text that is not blank"),
        (["a dog", "--model", "tap-tiny"], "tap-tiny"),
        (["a dog", "--model", "vocc"], "vocc"),
        (["a dog", "--refine", "sam"], "refine must be one of none, crf, tap"),
        (["a dog", "--mode", "panoptic"], "mode must be one of semantic, referring"),
        (["a dog", "--set", "keep_treshold=1"], "did you mean keep_threshold?"),
        (["a dog", "--set", "keep_threshold"], "expected NAME=VALUE"),
        (["a dog", "--set", "keep_threshold="], "keep_threshold must be a number"),
        (["a dog", "--set", "device=cpu"], "unknown name 'device'"),
        (["a dog", "--set", "prompts=[blur"], "cannot be read"),
        (["a dog", "--tap", "tap-tinny"], "tap-tinny"),
        (["a dog", "--out", "a.gif"], "unknown picture format"),
        (["a dog", "--device", "warp9"], 'device "warp9"'),
        (["a dog", "--dtype", "int8"], 'dtype "int8"'),
    ],
)
def test_bad_input_is_one_line(
    photo: Path, clip: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in failure(capsys, find(photo, clip, *arguments))
    assert {path.name for path in photo.parent.iterdir()} == {"photo.png"}


def test_bad_pictures(tmp_path: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no file" in failure(capsys, find(tmp_path / "nowhere.png", clip, "a dog"))
    (tmp_path / "text.png").write_text("not a picture")
    assert "text.png" in failure(capsys, find(tmp_path / "text.png", clip, "a dog"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is no JSON file"),
        ('{"boxes": []}', "expected a list of regions"),
        ("[]", "there is no region in it"),
        ("[7]", "region 0: expected a dict"),
        ('[{"bbox": [1, 2, 3, 4]}]', 'unknown key "bbox"'),
        ('[{"mask": {"size": [7, 7], "counts": [49]}}]', "mask is 7x7, but the image is 80x60"),
    ],
)
def test_bad_region_files(photo: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    file = photo.parent / "regions.json"
    file.write_text(text)
    assert message in failure(capsys, cli.main(["describe", str(photo), "--regions", str(file)]))


def test_a_region_file_that_is_not_there(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such file" in failure(capsys, cli.main(["describe", str(photo), "--regions", "nowhere.json"]))
    both = ["--everything", "--regions", str(photo)]
    assert "this is no JSON file" in failure(capsys, cli.main(["describe", str(photo), *both]))
