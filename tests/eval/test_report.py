"""Tables of several results, and a page that shows what went well and what did not."""

from __future__ import annotations

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from eval.base import cases_path
from eval.case_drawing import draw_case
from eval.cases import embedded, extremes
from eval.command import cli
from eval.report import Results, main, markdown, page, tables
from tap_llm.masks import encode_rle

RED, SIZE = (250, 10, 10), (60, 40)


def write_results(path, name="tap-a", protocol="mine-v1", cases=(), **more):
    found = {
        "protocol": protocol, "metrics": {"all": {"miou": 0.5, "top1": None}}, "faults": [], "not_measured": {},
        "model": {"name": name, "sha256": "abc", "parameters": 7, "dtype": "float32"}, "data": {"sha256": "def"},
        "examples": 3, "examples_unusable": 1, "speed": {"examples_per_second": 2.5}, "processes": 2,
        "versions": {"torch": "2"}, "command": ["--x", "<y>"],
    }  # fmt: skip
    path.write_text(json.dumps(found | more))
    cases_path(path).write_text(json.dumps(extremes(cases)))
    return path


def case(score, title="case", **more):
    return {"score": score, "title": title, **more}


def pictures_in(text):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGB") for packed in found]


def test_one_row_per_result_and_group(tmp_path):
    deep = {"photos": {"all": {"miou": 0.25, "regions": 4}, "known": {"regions": 2}}, "total": 1.0}
    paths = [
        write_results(tmp_path / "a.json"),
        write_results(tmp_path / "b.json", "tap-b", metrics=deep, faults=["x"]),
    ]
    other = write_results(tmp_path / "c.json", protocol="other-v1", metrics={"bleu": 0.125})
    found = tables([Results.read(path) for path in [*paths, other]])
    assert found["mine-v1"] == [
        ["model", "group", "miou", "total", "regions", "faults"],
        ["tap-a", "all", "0.500", "-", "-", "0"],
        ["tap-b", "", "-", "1.000", "-", "1"],
        ["tap-b", "photos, all", "0.250", "-", "4", "1"],
        ["tap-b", "photos, known", "-", "-", "2", "1"],
    ]
    assert found["other-v1"] == [["model", "bleu", "faults"], ["tap-a", "0.125", "0"]]


def test_markdown_keeps_its_columns(tmp_path):
    path = write_results(tmp_path / "a.json", name="a|b <i>\nc")
    lines = markdown([Results.read(path)]).splitlines()
    assert lines[0] == "### mine-v1"
    assert lines[2:] == ["| model | group | miou | faults |", "| --- | --- | ---: | ---: |",
                         "| a\\|b &lt;i&gt; c | all | 0.500 | 0 |"]  # fmt: skip


def test_what_could_be_mistaken_is_told_apart(tmp_path):
    """Two files of one model, a run with --limit, and one number per class."""
    classes = {"miou": 0.5, "classes": {"cat": {"iou": 1.0}, "sky": {"iou": None}}}
    paths = [
        write_results(tmp_path / "a.json", metrics=classes),
        write_results(tmp_path / "b.json", metrics=classes),
        write_results(tmp_path / "c.json", limit=9, metrics={"classes": 7}),
    ]
    found = tables([Results.read(path) for path in paths])
    names = ["tap-a (a)", "tap-a (b)", "tap-a, first 9 only"]
    assert found["mine-v1"] == [
        ["model", "miou", "classes", "faults"],
        [names[0], "0.500", "-", "0"],
        [names[1], "0.500", "-", "0"],
        [names[2], "-", "7", "0"],
    ]
    assert found["mine-v1, by class"] == [["class", *names], ["cat", "1.000", "1.000", "-"]]


def test_small_regions_are_shown_from_near():
    """A spot of 8 of 800 pixels: what is drawn is the colour around it, not that of the rest."""
    image = Image.new("RGB", (800, 400), "white")
    image.paste(RED, (600, 150, 800, 350))
    spot = np.zeros((400, 800), dtype=bool)
    spot[240:248, 700:708] = True
    region = {"mask": encode_rle(spot), "region": {"box": [700, 240, 708, 248], "points": [[704, 244]]}}
    small = draw_case(case(0.0, image=embedded(image), truth=[region]))
    assert small.height == small.width
    assert all(np.abs(np.array(small.getpixel((x, 415))) - RED).max() < 40 for x in (5, 200, 415))
    spot[:, 100:700] = True
    large = draw_case(case(0.0, image=embedded(image), truth=[{"mask": encode_rle(spot)}]))
    assert large.getpixel((5, 5)) == (255, 255, 255)
    assert large.height == large.width // 2


def test_page_needs_nothing_else_and_escapes_everything(tmp_path):
    nasty = '<script>alert("1")</script>'
    cases = [case(0.5, nasty, text=nasty, group=nasty, image=nasty), case(1.0, group=nasty, image=embedded(picture()))]
    path = write_results(
        tmp_path / "a.json", nasty, nasty, cases, faults=[nasty], metrics={nasty: {nasty: 1.0}}, command=[nasty],
        not_measured={nasty: nasty}, versions={nasty: nasty},
    )  # fmt: skip
    text = page([Results.read(path)])
    assert "<script" not in text and html.escape(nasty) in text
    assert not re.findall(r'(?:src|href)="(?!data:image/png)', text) and "http" not in text
    assert len(pictures_in(text)) == 1
    for fact in ("abc", "def", "3; 1 more could not be used", "2.5 examples/s"):
        assert fact in text


def picture(colour=RED):
    return Image.new("RGB", SIZE, colour)


def test_truth_and_answer_are_drawn_side_by_side(tmp_path):
    left = np.zeros(SIZE[::-1], dtype=bool)
    left[5:35, 5:25] = True
    picture().save(tmp_path / "red.png")
    truth, answer = [{"mask": encode_rle(left)}], [{"mask": encode_rle(left[:, ::-1])}]
    drawn = case(0.0, image=str(tmp_path / "red.png"), truth=truth, answer=answer)
    results = Results.read(write_results(tmp_path / "a.json", cases=[drawn]))
    [shown] = pictures_in(page([results]))
    width = shown.width
    assert width > 2 * 400
    y = shown.height // 2
    changed = [np.abs(np.array(shown.getpixel((round(x * width), y))) - RED).max() > 40 for x in (0.1, 0.4, 0.6, 0.9)]
    assert changed == [True, False, False, True]


def test_worst_first_and_each_once(tmp_path):
    cases = [case(score / 10, f"number {score}", group="g") for score in (3, 9, 1, 7, 5)]
    results = Results.read(write_results(tmp_path / "a.json", cases=cases))
    assert re.findall(r"number \d", page([results], 2)) == ["number 1", "number 3", "number 9", "number 7"]
    assert re.findall(r"number \d", page([results])) == [f"number {n}" for n in (1, 3, 5, 9, 7)]
    assert "g: worst 2 of 5" in page([results], 2) and "no picture" in page([results])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("absent.png", "there is no file 'absent.png'"),
        (None, "no picture"),
        ("data:image/jpeg;base64,????", "the stored picture is damaged"),
        ("data:image/jpeg;base64,AAAA", "the stored picture is damaged"),
        ("https://example.org/a.png", "is a URL"),
    ],
)
def test_missing_pictures_are_named(tmp_path, image, message):
    results = Results.read(write_results(tmp_path / "a.json", cases=[case(0.0, "lost", image=image)]))
    text = page([results])
    assert message in html.unescape(text) and "lost" in text and not pictures_in(text)


def test_mask_of_another_size_is_named(tmp_path):
    wrong = [{"mask": {"size": [2, 2], "counts": [0, 4]}}]
    results = Results.read(write_results(tmp_path / "a.json", cases=[case(0, image=embedded(picture()), truth=wrong)]))
    assert "a mask has shape (2, 2)" in page([results])


def test_command(tmp_path, capsys):
    path, table, out = write_results(tmp_path / "a.json"), tmp_path / "new" / "t.md", tmp_path / "r.html"
    main([str(path), "--markdown", str(table), "--out", str(out), "--worst", "1"])
    printed = capsys.readouterr().out
    assert table.read_text() in printed and out.read_text().startswith("<!doctype html>")
    assert f"wrote {table}" in printed and f"wrote {out}" in printed


@pytest.mark.parametrize(("content", "message"), [("{", "cannot read"), ("[]", "no results"), (None, "cannot read")])
def test_bad_results_are_one_message(tmp_path, capsys, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert cli(lambda: main([str(path)])) == 2
    assert message in capsys.readouterr().err
