"""Metrics of regions, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eval.caption_metrics import CaptionScores
from eval.overlap import ellipse_in_box, filled_box, iou
from eval.scene_scores import SceneScores
from eval.tables import metric_table
from tap_llm.masks import mask_to_box


def region(name, box_iou, click_ious, box_names, caption, click_names=("x",), kind="emoji", **truth):
    about = {"id": "0", "name": name, "kind": kind, "phrase": "", "colours": [], "captions": [], "shape": {}}
    concepts = [[concept, 0.5] for concept in box_names]
    return {
        "truth": about | truth,
        "captioned": caption is not None,
        "baselines": {"ellipse": 0.6, "filled_box": 0.5},
        "box": {"iou": box_iou, "concepts": concepts, "caption": caption or ""},
        "click": {"iou": click_ious[0], "concepts": [[concept, 0.5] for concept in click_names], "caption": ""},
        "click_ious": click_ious,
    }


REGIONS = [
    region(
        "cat", 0.9, [0.5, 0.6, 0.7, 0.8, 0.9], ["Cat", "dog"], "a black cat", phrase="a cat", colours=["black", "grey"]
    ),
    region(
        "dog", 0.5, [0.3, 0.3, 0.5, 0.5, 0.7], ["cat", "dog"], "a red cat", ("dog", "x"), phrase="hound",
        colours=["brown"],
    ),
    region("milk", 0.4, [0.1, 0.1, 0.3, 0.3, 0.5], ["cat", "dog"], "a carton of milk", kind="grocery"),
    region(None, 0.2, [0.1, 0.1, 0.1, 0.1, 0.1], ["cat", "dog"], "milk", kind="object"),
]  # fmt: skip


def predictions(regions, source="photos"):
    return [{"source": source, "left_out": 0, "regions": [one]} for one in regions]


@pytest.fixture
def score():
    return SceneScores(["cat", "dog"], novel=["dog"], references=False)


def test_overlap_by_hand():
    first, second = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    first[:2], second[1:3] = True, True
    assert iou(first, second) == pytest.approx(4 / 12)
    assert iou(first, first) == 1
    assert iou(~first & first, ~first & first) == 0


def test_box_edges_are_exclusive():
    mask = filled_box([3, 4, 8, 10], (20, 30))
    assert mask.sum() == 5 * 6
    assert mask_to_box(mask) == [3, 4, 8, 10]


@pytest.mark.parametrize("box", [[3, 4, 43, 24], [0, 0, 5, 5], [2, 3, 3, 4], [7, 1, 8, 19]])
def test_ellipse_touches_the_edges_of_its_box(box):
    mask = ellipse_in_box(box, (60, 80))
    assert mask_to_box(mask) == box
    inside = mask[box[1] : box[3], box[0] : box[2]]
    assert (inside == inside[::-1]).all()
    assert (inside == inside[:, ::-1]).all()


def test_large_ellipse_has_the_area_of_one():
    mask = ellipse_in_box([10, 10, 210, 110], (120, 220))
    assert mask.sum() / (200 * 100) == pytest.approx(np.pi / 4, rel=1e-3)


def test_means_by_hand(score):
    metrics = score(predictions(REGIONS)).metrics["photos"]["all"]
    expected = {
        "regions": 4,
        "box_miou": 0.5,
        "box_miou_of_ellipse": 0.6,
        "box_miou_of_filled_box": 0.5,
        "click_miou": 0.25,
        "clicks_3_miou": 0.4,
        "clicks_5_miou": 0.55,
        "box_concept_top1": pytest.approx(1 / 3),  # cat, in whatever case; the nameless region does not count
        "box_concept_top5": pytest.approx(2 / 3),
        "click_concept_top1": pytest.approx(1 / 3),
        "caption_has_name": 1.0,  # the phrase "hound" lacks its name: not asked for
        "caption_has_name_regions": 2,
        "caption_has_colour": 0.5,
        "caption_has_colour_regions": 2,
        "name_in_concept_space": pytest.approx(2 / 3),
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_known_and_novel(score):
    metrics = score(predictions(REGIONS)).metrics["photos"]
    assert {name: group["regions"] for name, group in metrics.items()} == {
        "all": 4, "known": 1, "novel": 2, "all/emoji": 2, "all/grocery": 1, "all/object": 1,
        "known/emoji": 1, "novel/emoji": 1, "novel/grocery": 1,
    }  # fmt: skip
    assert metrics["known"]["box_miou"] == 0.9
    assert metrics["novel"]["box_miou"] == pytest.approx(0.45)


def test_names_seen_in_training_may_be_listed():
    score = SceneScores(["cat", "dog"], known=["dog", "milk"], references=False)
    assert [score.is_known(name) for name in ("cat", "dog", "milk", None)] == [False, True, False, None]


def test_sources_are_kept_apart(score):
    scores = score(predictions(REGIONS[:1], "a") + predictions(REGIONS[1:2], "b"))
    assert {source: groups["all"]["box_miou"] for source, groups in scores.metrics.items()} == {"a": 0.9, "b": 0.5}


def test_attributes_of_shapes(score):
    star = {"shape": "star", "texture": "striped", "size": "small"}
    captions = ["a small red star", "a large striped red ring", "a dotted blue star behind a red ring", "a star"]
    regions = [
        region("star", 1, [1] * 5, ["x"], caption, kind="shape", shape=star, colours=["red"]) for caption in captions
    ]
    metrics = score(predictions([*regions, *REGIONS])).metrics["photos"]["all"]
    expected = {
        "shape_colour_right": 2 / 3,
        "shape_colour_said": 3 / 4,
        "shape_texture_right": 1 / 2,
        "shape_texture_said": 2 / 4,
        "shape_size_right": 1 / 2,
        "shape_size_said": 2 / 4,
        "shape_attributes_right": 4 / 7,
        "shape_caption_has_colour_and_shape": 1 / 4,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_what_a_model_cannot_do_is_not_measured():
    regions = [region("cat", 0.9, [0.5] * 5, [], None, (), colours=["red"])]
    scores = SceneScores(None)(predictions(regions))
    assert set(scores.not_measured) == {"concepts, known and novel names", "captions"}
    metrics = scores.metrics["photos"]
    assert set(metrics) == {"all", "all/emoji"}
    assert metrics["all"]["box_miou"] == 0.9
    for key in ("box_concept_top1", "caption_has_name", "caption_has_colour", "shape_caption_has_colour_and_shape"):
        assert metrics["all"][key] is None


def with_references(regions, texts):
    return [{**one, "truth": one["truth"] | {"captions": text}} for one, text in zip(regions, texts, strict=True)]


def test_reference_metrics_say_why_they_are_missing(score, monkeypatch):
    reasons = score(predictions(REGIONS)).not_measured
    assert reasons == {"cider_d": "left out on request", "meteor": "left out on request"}
    monkeypatch.setattr("eval.captions.java.missing_reason", lambda: "no Java")
    scores = SceneScores(["cat"])(predictions(with_references(REGIONS[:1], [["a black cat"]])))
    assert scores.not_measured.keys() == {"cider_d", "meteor"}
    assert scores.not_measured["meteor"].startswith("no Java; ")
    assert "unofficial_cider_d" in scores.metrics["photos"]["all"]
    assert scores.metrics["photos"]["all"]["box_miou"] == 0.9


def test_reference_metrics_go_into_the_groups(monkeypatch):
    def fake(captions, references, parts, metrics):
        assert tuple(metrics) == ("cider_d", "meteor")
        right = {name: [captions[key] in references[key] for key in keys] for name, keys in parts.items()}
        scores = {name: {"cider_d": sum(hits) / len(hits), "meteor": len(hits)} for name, hits in right.items()}
        return CaptionScores(scores)

    monkeypatch.setattr("eval.scene_scores.score_captions", fake)
    regions = with_references(REGIONS, [["a black cat"], ["a dog"], [], ["milk"]])
    metrics = SceneScores(["cat", "dog"], ["dog"])(predictions(regions)).metrics["photos"]
    assert (metrics["all"]["cider_d"], metrics["all"]["meteor"]) == (pytest.approx(2 / 3), 3)
    assert (metrics["known"]["cider_d"], metrics["novel"]["cider_d"]) == (1, 0)
    assert "cider_d" not in metrics["all/emoji"]


def test_table():
    groups = {"all": {"regions": 12, "box_miou": 0.5, "none": None}, "novel": {"regions": 3, "other": 0.25}}
    lines = metric_table(groups).splitlines()
    assert [line.split() for line in lines] == [
        ["all", "novel"], ["regions", "12", "3"], ["box_miou", "0.500", "-"], ["other", "-", "0.250"],
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
