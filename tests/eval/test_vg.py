"""Visual Genome's captions: files of all forms, what is broken in them, scores by hand, and TAP itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from judging import Scripted, rectangle, run_quietly, write_picture

from eval.caption_metrics import METRICS
from eval.caption_records import CaptionPictures
from eval.captions import java
from eval.command import cli
from eval.region_captions import RegionCaptions, TapCaptioner
from eval.vg import PROTOCOLS, main
from tap_llm.data.scenes import SceneComposer
from tap_llm.errors import InputError
from tap_llm.masks import mask_to_box
from tap_llm.pipelines import RegionPipeline

BOX = [4, 5, 20, 10]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(java, "missing_reason", lambda: "no Java")


def coco(path, images, annotations):
    path.write_text(
        json.dumps(
            {
                "images": [{"id": number, "file_name": name} for number, name in images],
                "annotations": [
                    {"id": number, "image_id": image, "bbox": box, "caption": caption}
                    for number, image, box, caption in annotations
                ],
            }
        )
    )
    return path


@pytest.fixture
def file(tmp_path):
    """In GRiT's form; two of nine regions can be found, one gets no answer, all others are broken."""
    write_picture(tmp_path / "VG_100K" / "1.png")
    write_picture(tmp_path / "VG_100K_2" / "2.png", width=50)
    write_picture(tmp_path / "4.png")
    images = [(1, "1.png"), (2, "2.png"), (3, "3.png"), (4, "4.png"), (4, "1.png")]
    annotations = [
        (10, 1, BOX, "A small red cup."),
        (11, 1, [1, 1, 2, 3], "a dog"),
        (12, 1, [7, 7, 0, 5], "the sky"),
        (13, 1, BOX, " . "),
        (10, 2, BOX, "the sky"),
        (14, 2, BOX, "one old blue hat"),
        (15, 3, BOX, "the sky"),
        (16, 4, BOX, "the sky"),
        (17, 99, BOX, "the sky"),
    ]
    return coco(tmp_path / "test.json", images, annotations)


def benchmark(file, answerer, protocol="vg-full", images=None):
    how = PROTOCOLS[protocol]
    return RegionCaptions(how, CaptionPictures(file, images, how), answerer)


SAID = {'40x30 [{"box": [4, 5, 24, 15]}]': "a small red cup", "50x30": "one old blue hat"}


def test_scores_by_hand(file, tmp_path):
    scripted = Scripted(SAID)
    found = run_quietly(benchmark(file, scripted), tmp_path / "r.json")
    metrics = found.results["metrics"]
    assert metrics["regions"] == 9
    assert metrics["answered"] == 2 / 9
    assert metrics["unofficial_cider_d"] == pytest.approx(10 * 2 / 9)  # both say all four words of the reference
    assert metrics["unofficial_rouge_l"] == pytest.approx(2 / 9)
    words = 4 + 2 + 2 + 1 + 2 + 4 + 3 * 2  # of the references; "none" stands for the one that is empty
    assert metrics["unofficial_bleu_4"] == pytest.approx(np.exp(1 - words / 8))
    assert found.results["not_measured"].keys() == set(METRICS)
    assert found.results["protocol"] == "vg-full-v1"
    assert scripted.asked == ["<image>Please give me a short description of region 1 <0>."] * 3


def test_what_is_broken_is_named(file, tmp_path):
    faults = run_quietly(benchmark(file, Scripted(SAID)), tmp_path / "r.json").results["faults"]
    expected = [
        ("3.png: ", "there is no file"),
        ("image 4: ", "this id is used twice"),
        ("image 99: ", "the file lists no image 99"),
        ("1.png, ", "the answer is empty"),
        ("1.png, ", "annotation 12 of image 1: box [7, 7, 7, 12] has no area"),
        ("1.png, ", "annotation 13 of image 1: its caption is empty"),
        ("2.png, ", "annotation 10 of image 2: its id is used twice"),
    ]
    assert len(faults) == len(expected)
    for fault, (start, reason) in zip(faults, expected, strict=True):
        assert fault.startswith(start) and reason in fault


def test_batches_of_any_size_give_the_same(file, tmp_path):
    runs = [run_quietly(benchmark(file, Scripted(SAID)), tmp_path / f"{n}.json", n) for n in (1, 2, 9)]
    for other in runs[1:]:
        assert other.results["metrics"] == runs[0].results["metrics"]
        assert other.predictions == runs[0].predictions
        assert sorted(other.results["faults"]) == sorted(runs[0].results["faults"])


def test_one_region_per_image(tmp_path):
    """In GLaMM's form, where the number of an annotation is that of its image; a second region is a fault."""
    names = [(number, f"{number}.png") for number in range(1, 12)]
    for _, name in names:
        write_picture(tmp_path / name)
    annotations = [(number, number, BOX, "a small red cup") for number, _ in names]
    file = coco(tmp_path / "test_caption.json", names, [*annotations, (12, 11, BOX, "a small red cup")])
    found = run_quietly(benchmark(file, Scripted(SAID), "vg-one"), tmp_path / "r.json").results
    assert found["metrics"]["answered"] == pytest.approx(11 / 12)
    [fault] = found["faults"]
    assert "annotation 12 of image 11: the image has a region already" in fault


def test_files_of_other_protocols_are_refused(tmp_path, file):
    with pytest.raises(InputError, match="is not for vg-one-v1"):
        benchmark(file, Scripted({}), "vg-one")
    single = coco(tmp_path / "one.json", [(1, "1.png"), (2, "2.png")], [(1, 1, BOX, "a"), (2, 2, BOX, "b")])
    with pytest.raises(InputError, match="is not for vg-full-v1"):
        benchmark(single, Scripted({}))


def test_list_of_filled_boxes(tmp_path):
    """vg-5k: the mask is a filled box, and TAP is asked about that box; another size is a fault."""
    write_picture(tmp_path / "1.png")
    filled = {"image": "1.png", "caption": "a small red cup"}
    records = [
        {**filled, "annotation": [{"segmentation": rectangle(4, 5, 24, 15)}]},
        {**filled, "annotation": [{"segmentation": rectangle(4, 5, 14, 15, width=20)}]},
        {**filled, "bbox": BOX},
        {"image": "1.png", "caption": "a small red cup"},
    ]
    (tmp_path / "vg_val_5000.json").write_text(json.dumps(records))
    found = run_quietly(benchmark(tmp_path / "vg_val_5000.json", Scripted(SAID), "vg-5k"), tmp_path / "r.json")
    assert [region["key"] for region in found.predictions[0]["regions"]] == [f"{n}_region_0" for n in range(4)]
    assert found.predictions[0]["answers"] == ["a small red cup", None, "a small red cup", None]
    size, absent = found.results["faults"]
    assert "annotation 1 of image 1: mask is 20x30, but the image is 40x30" in size
    assert "annotation 3 of image 3: a region needs one of" in absent
    assert found.results["metrics"]["unofficial_rouge_l"] == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"images": []}', '"annotations" is missing'),
        ('{"images": [], "annotations": []}', "holds no captions"),
        ("[1]", "not a list of records"),
    ],
)
def test_unusable_files(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        benchmark(tmp_path / "a.json", Scripted({}))


def test_missing_places(tmp_path, file):
    for path, images in ((tmp_path / "no.json", None), (file, tmp_path / "no")):
        with pytest.raises(InputError, match="there is no"):
            benchmark(path, Scripted({}), images=images)


# TAP itself


def write_scenes(folder, count=3):
    """Drawn scenes as GRiT has them, with a caption for each region."""
    composer, images, annotations = SceneComposer(), [], []
    for number in range(1, count + 1):
        sample = composer.scene(number, (96, 64)).to_sample()
        sample.load_image().save(folder / f"{number}.png")
        images.append((number, f"{number}.png"))
        for mask, region in zip(sample.masks(), sample.regions, strict=True):
            x0, y0, x1, y1 = mask_to_box(mask)
            annotations.append((len(annotations) + 100, number, [x0, y0, x1 - x0, y1 - y0], region["captions"][0]))
    return coco(folder / "test.json", images, annotations)


def test_captions_are_those_of_the_pipeline_whatever_the_batch(pipe, tmp_path):
    file = write_scenes(tmp_path)
    runs = [
        run_quietly(benchmark(file, TapCaptioner(pipe, regions)), tmp_path / f"{pictures}.json", pictures)
        for pictures, regions in ((1, 1), (2, 3), (8, 64))
    ]
    for found in runs:
        assert found.results["metrics"] == runs[0].results["metrics"]
        for prediction in found.predictions:
            boxes = [shown["region"] for [shown] in prediction["shown"]]
            assert prediction["answers"] == [result["caption"] for result in pipe(prediction["image"], boxes)]
    assert len({caption for prediction in runs[0].predictions for caption in prediction["answers"]}) > 2


def test_longest_caption(pipe, tmp_path):
    file = write_scenes(tmp_path, 1)
    short = run_quietly(benchmark(file, TapCaptioner(pipe, max_new_tokens=2)), tmp_path / "r.json")
    assert short.results["settings"] == {
        "max_new_tokens": 2, "slot": 0, "prompt": "box",
        "question_for_chat": "Please give me a short description of <region>.",
    }  # fmt: skip
    assert all(len(caption.split()) <= 2 for caption in short.predictions[0]["answers"])
    assert TapCaptioner(pipe, max_new_tokens=1000).max_new_tokens == 38


def test_command_on_the_bundled_model(tmp_path, capsys):
    file = write_scenes(tmp_path, 2)
    typed = ["--data", str(file), "--device", "cpu", "--out", str(tmp_path / "r.json"), "--batch-size", "5"]
    found = main(typed)
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["metrics"] == found.results["metrics"]
    assert results["regions"] == results["metrics"]["regions"] > 5
    assert results["metrics"]["answered"] == 1
    assert 0 < results["metrics"]["unofficial_cider_d"] < 10
    printed = capsys.readouterr().out
    assert "unofficial_bleu_4" in printed and "regions/s" in printed and "not measured: meteor: no Java" in printed
    worst = json.loads((tmp_path / "r.cases.json").read_text())[0]["worst"][0]
    assert "caption: " in worst["text"] and "reference: " in worst["text"] and worst["truth"][0]["region"]["box"]


def test_model_without_tokenizer(make_pipe, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RegionPipeline, "from_pretrained", lambda *args, **kwargs: make_pipe(words=False))
    typed = ["--model", str(model_folder), "--data", str(write_scenes(tmp_path, 1)), "--out", str(tmp_path / "r.json")]
    assert cli(lambda: main(typed)) == 2
    assert "--tokenizer" in capsys.readouterr().err
