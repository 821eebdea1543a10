"""The command on a tiny random model: what is asked, what is written, and that nothing depends on batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval.base import cases_path, describe_model, run
from eval.command import cli
from eval.overlap import iou
from eval.scene_scores import SceneScores
from eval.scene_sources import FileSource, SceneSource
from eval.scenes import CLICKS, Scenes, main, read_names
from eval.sheets import CASES, contact_sheet
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.sprites import SpriteLibrary
from tap_llm.errors import InputError
from tap_llm.masks import decode_rle, mask_to_box
from training.prompts import centre_click

SIZE = (96, 64)


@pytest.fixture(scope="module")
def source():
    return SceneSource("shapes", "drawn", SceneComposer(), 3, seed=5, size=SIZE)


def benchmark(pipe, source, **options):
    names = None if pipe.concepts is None else pipe.concepts.names
    return Scenes(pipe, [source], SceneScores(names, references=False), **options)


@pytest.fixture(scope="module")
def prediction(pipe, source):
    return benchmark(pipe, source).predict(source[0])


def test_prediction_is_complete(prediction, source):
    picture = source[0]
    assert len(prediction["regions"]) == len(picture.truths) > 1
    for region, mask, truth in zip(prediction["regions"], picture.masks, picture.truths, strict=True):
        assert region["truth"]["name"] == truth.name
        assert region["box"]["prompt"] == {"box": mask_to_box(mask)}
        for prompt in ("box", "click"):
            answer = region[prompt]
            assert answer["iou"] == iou(decode_rle(answer["mask"]), mask)
            assert len(answer["concepts"]) == 5
        assert region["click_ious"][0] == region["click"]["iou"]
        assert len(region["click_ious"]) == CLICKS
        assert region["box"]["caption"]
    json.dumps(prediction)


def test_first_click_is_deepest_inside(prediction, source):
    pixels, _ = centre_click(torch.from_numpy(source[0].masks))
    prompts = [region["click"]["prompt"] for region in prediction["regions"]]
    assert prompts == [{"points": [pixel], "labels": [1]} for pixel in pixels.tolist()]


def test_answers_are_those_of_the_pipeline(pipe, prediction, source):
    """One region alone, on the picture itself."""
    picture = source[0]
    region = prediction["regions"][1]
    alone = pipe(picture.image, [{"box": mask_to_box(picture.masks[1])}])[0]
    assert iou(alone["mask"], decode_rle(region["box"]["mask"])) > 0.999
    assert alone["concept"] == region["box"]["concepts"][0][0]
    assert alone["caption"] == region["box"]["caption"]


def test_results_do_not_depend_on_batches(pipe, source):
    whole, single = (benchmark(pipe, source, batch_size=size).predict(source[1]) for size in (64, 1))
    for one, other in zip(whole["regions"], single["regions"], strict=True):
        assert one["click_ious"] == pytest.approx(other["click_ious"], abs=0.01)
        assert one["box"]["iou"] == pytest.approx(other["box"]["iou"], abs=1e-3)
        assert one["box"]["caption"] == other["box"]["caption"]
        assert [name for name, _ in one["box"]["concepts"]] == [name for name, _ in other["box"]["concepts"]]


class Oracle:
    """Answers boxes with the ellipse, and clicks better with each click; stands in for a model."""

    can_caption = False

    def __init__(self, masks):
        self.masks, self.asked, self.encoded = masks, [], 0

    def encode(self, image):
        self.encoded += 1
        return image

    def __call__(self, encoded, prompts, **options):
        self.asked.append(prompts)
        return [
            {"region": p, "mask": self._mask(mask, p), "iou": 0.5, "concepts": [], "caption": ""}
            for p, mask in zip(prompts, self.masks, strict=True)
        ]

    def _mask(self, mask, prompt):
        """One more row of the true mask per click, all of it from the third on; the box gives nothing."""
        shown = np.zeros_like(mask)
        rows = np.flatnonzero(mask.any(1))[: len(prompt.get("points", []))]
        shown[rows] = mask[rows]
        return mask if len(rows) >= 3 else shown


def test_clicks_go_where_the_mask_is_wrong(source):
    picture = source[0]
    oracle = Oracle(picture.masks)
    regions = Scenes(oracle, [source], SceneScores(None)).predict(picture)["regions"]
    assert oracle.encoded == 1
    assert len(oracle.asked) == 1 + CLICKS  # all regions in one call
    for row, mask in enumerate(picture.masks):
        clicks = oracle.asked[-1][row]
        assert len(clicks["points"]) == 3  # nothing is wrong any more after the third
        assert set(clicks["labels"]) == {1}
        assert all(mask[y, x] for x, y in clicks["points"])
        first = np.flatnonzero(mask.any(1))[0]
        assert all(y > first for _, y in clicks["points"][1:])  # the first row is right already
        assert regions[row]["click_ious"][2:] == [1.0, 1.0, 1.0]
        assert regions[row]["click_ious"][0] == pytest.approx(mask[first].sum() / mask.sum())
        assert regions[row]["box"]["iou"] == 0


def test_picture_without_regions_is_not_encoded(source):
    nothing = SceneSource("shapes", "drawn", SceneComposer(), 1, seed=5, size=SIZE, least_area=0.99)
    oracle = Oracle([])
    scenes = Scenes(oracle, [nothing], SceneScores(None))
    assert (scenes.predict(nothing[0]), oracle.encoded) == ({"regions": []}, 0)
    assert scenes.truth(nothing[0])["left_out"] > 0


def test_resume_gives_the_same_results(pipe, source, tmp_path, monkeypatch):
    out, options = tmp_path / "r.json", {"report": lambda line: None, "progress": False}
    whole = run(benchmark(pipe, source), out, describe_model(pipe, "tiny"), **options).results
    stopped = benchmark(pipe, source)
    predict, seen = stopped.predict, []

    def stop_at_the_second(example):
        if seen:
            raise KeyboardInterrupt
        seen.append(example.id)
        return predict(example)

    monkeypatch.setattr(stopped, "predict", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, out, describe_model(pipe, "tiny"), fresh=True, **options)
    resumed = run(benchmark(pipe, source), out, describe_model(pipe, "tiny"), **options).results
    assert {**resumed, "speed": 0} == {**whole, "speed": 0}


def test_missing_picture_counts_as_wrong(pipe, tmp_path):
    """Regions of a picture that is not there have an IoU of 0 and a name that is not theirs."""
    square = [[2, 3, 20, 3, 20, 18, 2, 18]]
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(3)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "segmentation": square} for i in range(3)],
        "categories": [{"id": 1, "name": "Star"}],
    }
    document["annotations"][2]["segmentation"] = {"size": [9, 9], "counts": [0, 81]}
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    for number in (0, 2):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{number}.png")
    source = FileSource(tmp_path / "boxes.json")
    options = {"report": lambda line: None, "progress": False}
    finished = run(benchmark(pipe, source), tmp_path / "r.json", describe_model(pipe, "tiny"), **options)
    results, [found, missing] = finished.results, finished.predictions
    assert [results[key] for key in ("examples", "examples_unusable", "regions")] == [2, 1, 1]
    assert "image 1: image: there is no file" in results["faults"][0] and "9x9" in results["faults"][1]
    assert missing["fault"] and missing["regions"][0]["click_ious"] == [0] * CLICKS
    [metrics] = [groups["all"] for groups in results["metrics"].values()]
    assert metrics["regions"] == 2
    assert metrics["box_miou"] == pytest.approx(found["regions"][0]["box"]["iou"] / 2, abs=1e-6)
    assert metrics["box_concept_top5"] in (0, 0.5)
    by_title = {case["title"].split("/")[-1]: case for group in drawn_cases(tmp_path / "r.json") for case in group}
    assert by_title["image 0: star"]["image"] == str(tmp_path / "0.png")
    assert "no answer: image: there is no file" in by_title["image 1: star"]["text"]


def drawn_cases(out):
    return [[*group["worst"], *group["best"]] for group in json.loads(cases_path(out).read_text())]


@pytest.mark.filterwarnings("ignore:(names|captions) stay empty")
def test_model_without_words(make_pipe, source, tmp_path):
    bare = make_pipe(words=False)
    finished = run(benchmark(bare, source), tmp_path / "r.json", describe_model(bare, "bare"), report=lambda line: None)
    metrics = finished.results["metrics"]["shapes"]["all"]
    assert set(finished.results["not_measured"]) == {"concepts, known and novel names", "captions"}
    assert metrics["box_concept_top1"] is None
    assert metrics["caption_has_name"] is None
    assert 0 <= metrics["box_miou"] <= 1


# The command


@pytest.fixture
def sprites(tmp_path):
    """Ten names."""
    folder = tmp_path / "sprites"
    folder.mkdir()
    for index in range(10):
        pixels = np.zeros((40, 40, 4), dtype=np.uint8)
        pixels[4:-4, 4 + index : -4] = (25 * index, 80, 200, 255)
        Image.fromarray(pixels).save(folder / f"thing_{index}.png")
    return folder


def arguments(model_folder, out, *more):
    size = f"{SIZE[0]}x{SIZE[1]}"
    return ["--model", str(model_folder), "--out", str(out), "--size", size, "--no-references", *map(str, more)]


def test_command_on_composed_scenes(model_folder, sprites, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.sheets.CASES", 1)
    out, pictures = tmp_path / "r.json", tmp_path / "pictures"
    typed = arguments(
        model_folder, out, "--compose", "--sprites", sprites, "--hold-out", "0.3", "--shapes", "--count", 2,
        "--seed", 3, "--device", "cpu", "--pictures", pictures,
    )  # fmt: skip
    main(typed)
    results = json.loads(out.read_text())
    assert set(results) == {
        "protocol", "command", "metrics", "not_measured", "examples", "examples_unusable", "regions", "faults", "model",
        "data", "settings", "limit", "processes", "speed", "versions",
    }  # fmt: skip
    assert (results["protocol"], results["examples"], results["faults"]) == ("scenes-v1", 6, [])
    assert results["command"] == typed
    assert set(results["metrics"]) == {"scenes", "shapes"}
    scenes, shapes = results["metrics"]["scenes"], results["metrics"]["shapes"]
    assert scenes["all"]["regions"] == scenes["known"]["regions"] + scenes["novel"]["regions"]
    assert scenes["novel/object"]["name_in_concept_space"] == 0  # its concepts are the names of shapes
    assert set(shapes) == {"all", "known", "all/shape", "known/shape"}
    assert shapes["all"]["name_in_concept_space"] == 1
    assert shapes["all"]["shape_attributes_right"] is None or 0 <= shapes["all"]["shape_attributes_right"] <= 1
    assert results["regions"] == scenes["all"]["regions"] + shapes["all"]["regions"]
    printed = capsys.readouterr().out
    for text in ("box_miou_of_ellipse", "regions/s", "novel by kind", "not measured: cider_d: left out on request"):
        assert text in printed
    sheets = {f"{name}_{prompt}_{end}.png" for name in ("scenes", "shapes") for prompt in ("box", "click")
              for end in ("worst", "best")}  # fmt: skip
    assert {path.name for path in pictures.iterdir()} == sheets


def test_hold_out_is_that_of_training(model_folder, sprites, tmp_path):
    """Scenes of held-out names show those names only, beside drawn shapes."""
    out = tmp_path / "r.json"
    finished = main(
        arguments(
            model_folder, out, "--compose", "--sprites", sprites, "--hold-out", 0.3, "--count", 3, "--device", "cpu"
        )
    )
    known, novel = SpriteLibrary.from_folders([sprites]).split_names(0.3)
    shown = {"known": set(), "novel": set()}
    for prediction in finished.predictions:
        names = {one["truth"]["name"] for one in prediction["regions"] if one["truth"]["kind"] != "shape"}
        shown[prediction["id"].split("/")[1]] |= names
    assert shown["known"] and shown["novel"]
    assert shown["known"] <= set(known.names)
    assert shown["novel"] <= set(novel.names)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to evaluate"),
        (["--compose"], "--compose needs"),
        (["--hold-out", "0.1"], "--sprites"),
        (["--data", "absent.json"], "absent.json"),
        (["--compose", "--shapes", "--model", "absent-model"], "absent-model"),
        (["--compose", "--shapes", "--known-names", "absent.txt"], "absent.txt"),
        (["--compose", "--shapes", "--backgrounds", "absent-folder"], "absent-folder"),
    ],
)
def test_bad_input_is_one_message(model_folder, tmp_path, capsys, monkeypatch, more, message):
    typed = ["eval.scenes", *arguments(model_folder, tmp_path / "r.json", *more)]
    monkeypatch.setattr("sys.argv", typed)
    assert cli(main) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_out_must_not_be_a_folder(model_folder, tmp_path):
    with pytest.raises(InputError, match="folder"):
        main(arguments(model_folder, tmp_path, "--compose", "--shapes"))


def test_lists_of_names(tmp_path):
    (tmp_path / "a.txt").write_text("Cat\n\n dog \n")
    (tmp_path / "a.json").write_text('["Cat", "dog"]')
    (tmp_path / "b.json").write_text('{"names": []}')
    assert read_names(tmp_path / "a.txt") == read_names(tmp_path / "a.json") == ["cat", "dog"]
    with pytest.raises(InputError, match="list of names"):
        read_names(tmp_path / "b.json")


def test_contact_sheet_has_room_for_all():
    tiles = [Image.new("RGB", (30, 10 + index), (index, 0, 0)) for index in range(1, CASES)]
    sheet = contact_sheet(tiles, columns=2, gap=4)
    assert sheet.size == (2 * 34, sum(10 + index + 4 for index in (2, 4, 6, 8, 10, 11)))
    assert {sheet.getpixel((0, 0)), sheet.getpixel((34, 0))} == {(1, 0, 0), (2, 0, 0)}
