"""Label maps as files have them: layouts of data sets, values that mean nothing, COCO-style files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled import write_answer, write_labels

from eval.label_maps import VOID, LabelFolder, LabelRecords
from eval.label_sets import LABEL_SETS, LabelSet, read_classes
from tap_llm.clip_as_rnn.vocabulary import CONTEXT_STUFF
from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import encode_rle

CAMVID = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid" / "val.json"


def test_vocabularies() -> None:
    sizes = {name: len(layout.queries) for name, layout in LABEL_SETS.items()}
    assert sizes == {"voc": 20, "context": 59, "coco_object": 80, "ade": 0, "own": 0}
    context = LABEL_SETS["context"].queries
    assert list(context) == sorted(context) and set(CONTEXT_STUFF) < set(context)


def test_voc(tmp_path: Path) -> None:
    for name, labels in {"a": [[0, 1], [20, 255]], "b": [[21, 3], [0, 0]], "unlisted": [[1, 1], [1, 1]]}.items():
        write_labels(tmp_path / "SegmentationClass" / f"{name}.png", labels, palette=True)
        write_answer(tmp_path / "JPEGImages" / f"{name}.jpg", np.zeros((2, 2)))
    listed = tmp_path / "ImageSets" / "Segmentation"
    listed.mkdir(parents=True)
    (listed / "val.txt").write_text("b\na\n")
    pictures = LabelFolder(tmp_path, LABEL_SETS["voc"].of_split(None))
    assert pictures.ids == ["b", "a"] and pictures.queries[14] == "person with clothes,people,human"
    assert pictures[0].labels.tolist() == [[VOID, 3], [0, 0]]
    assert pictures[1].labels.tolist() == [[0, 1], [20, VOID]]
    assert pictures[1].load().size == (2, 2)
    with pytest.raises(MissingFileError, match="no list of pictures"):
        LabelFolder(tmp_path, LABEL_SETS["voc"].of_split("trainval"))


def test_ade_has_no_background(tmp_path: Path) -> None:
    write_labels(tmp_path / "annotations" / "validation" / "ADE_val_1.png", [[0, 1, 2, 3]])
    (tmp_path / "images" / "validation").mkdir(parents=True)
    names = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t3\t2\twall\n2\t0.1\t3\t2\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(names)
    pictures = LabelFolder(tmp_path, LABEL_SETS["ade"].of_split(None))
    assert pictures.queries == ("wall", "building") and pictures.ids == ["ADE_val_1"]
    assert pictures[0].labels.tolist() == [[VOID, 1, 2, VOID]]
    with pytest.raises(InputError, match="no file"):
        pictures[0].load()


def test_coco_object(tmp_path: Path) -> None:
    write_labels(tmp_path / "annotations" / "val2017" / "000000000139_instanceTrainIds.png", [[0, 80, 81, 255]])
    write_answer(tmp_path / "images" / "val2017" / "000000000139.jpg", [[0] * 4])
    (picture,) = LabelFolder(tmp_path, LABEL_SETS["coco_object"].of_split(None))
    assert picture.id == "000000000139" and picture.labels.tolist() == [[0, 80, VOID, VOID]]


def test_own_labels_from_0_and_of_16_bits(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels" / "a.png", [[0, 1, 2, 65535]])
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match="--images DIR"):
        LabelFolder(tmp_path / "labels", LABEL_SETS["own"], None, ["x", "y"])
    with pytest.raises(InputError, match="--classes FILE"):
        LabelFolder(tmp_path / "labels", LABEL_SETS["own"], tmp_path / "pictures")
    (picture,) = LabelFolder(tmp_path / "labels", LabelSet(first=0), tmp_path / "pictures", ["x", "y"])
    assert picture.labels.tolist() == [[1, 2, VOID, VOID]]


def test_maps_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.png", [[0, 1]])
    write_answer(tmp_path / "b.png", [[0, 1]])
    (tmp_path / "c.png").write_bytes(b"no picture")
    pictures = LabelFolder(tmp_path, LABEL_SETS["own"], tmp_path, ["x"])
    assert pictures.ids == ["a", "b", "c"] and pictures[0].labels.tolist() == [[VOID, 1]]
    with pytest.raises(InputError, match="b: labels: expected grey values"):
        pictures[1]
    with pytest.raises(InputError, match=r"c: labels: .* is damaged"):
        pictures[2]


def test_fingerprints_tell_labels_and_pictures_apart(tmp_path: Path) -> None:
    def seal() -> str:
        return LabelFolder(tmp_path / "l", LABEL_SETS["own"], tmp_path / "p", ["x"])[0].fingerprint

    write_labels(tmp_path / "l" / "a.png", [[0, 1]])
    (tmp_path / "p").mkdir()
    first = seal()
    write_answer(tmp_path / "p" / "a.png", [[0, 1]])
    second = seal()
    write_labels(tmp_path / "l" / "a.png", [[1, 1]])
    assert len({first, second, seal()}) == 3


# COCO-style files


def mask(left: int, right: int) -> dict[str, Any]:
    """Columns of a picture of 2 x 6."""
    inside = np.zeros((2, 6), dtype=bool)
    inside[:, left:right] = True
    return encode_rle(inside)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "segmentation": mask(0, 3)},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": mask(2, 4), "iscrowd": 1},
        {"id": 3, "image_id": 2, "category_id": 9, "segmentation": mask(2, 4)},
        {"id": 4, "image_id": 8, "category_id": 3, "segmentation": mask(2, 4)},
    ]
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 2, "width": 6} for n in (1, 2)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "sky"}],
        "annotations": annotations,
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    return tmp_path / "a.json"


def test_masks_become_labels(coco: Path) -> None:
    pictures = LabelRecords(coco)
    assert pictures.queries == ("cat", "sky") and pictures.ids == ["image 1", "image 2"]
    assert pictures[0].labels.tolist() == [[1, 1, 2, 2, VOID, VOID]] * 2  # the later one lies on top
    assert LabelRecords(coco, background=True)[0].labels.tolist() == [[1, 1, 2, 2, 0, 0]] * 2
    assert pictures[0].path == coco.parent / "1.png"
    assert pictures.faults == ["annotation 4: there is no image 8"]
    with pytest.raises(InputError, match="region 3: there is no mask, or no category of the file"):
        pictures[1].load()
    assert pictures[1].labels.tolist() == [[VOID] * 6] * 2
    assert LabelRecords(coco, queries=["a cat", "the sky"]).queries == ("a cat", "the sky")
    with pytest.raises(InputError, match="2 categories, but 1 classes"):
        LabelRecords(coco, queries=["cat"])
    with pytest.raises(MissingFileError):
        LabelRecords(coco.with_name("absent.json"))


def test_class_files(tmp_path: Path) -> None:
    def read(name: str, text: str) -> tuple[str, ...]:
        (tmp_path / name).write_text(text)
        return read_classes(tmp_path / name)

    assert read("a.txt", "bird avian,bird\n\n sky \n") == ("bird avian,bird", "sky")
    assert read("labels.txt", "1: accordion\n2: aeroplane\n") == ("accordion", "aeroplane")
    assert read("a.json", '["x", "y"]') == ("x", "y")
    assert read("plain.txt", "1\twall, side\n2\tsea\n") == ("wall", "sea")
    for name, text in (("b.json", '{"a": 1}'), ("empty.txt", "\n")):
        with pytest.raises(InputError, match="must hold a list of names"):
            read(name, text)
    with pytest.raises(MissingFileError):
        read_classes(tmp_path / "absent")


@pytest.mark.skipif(not CAMVID.is_file(), reason="the CamVid sample is not here")
def test_camvid() -> None:
    pictures = LabelRecords(CAMVID)
    assert len(pictures) == 101 and len(pictures.queries) == 11 and not pictures.faults
    labels = pictures[0].labels
    assert labels.shape == (288, 384) and 0 < (labels == VOID).mean() < 0.2
    assert set(np.unique(labels)) <= {VOID, *range(1, 12)}
    assert pictures[0].load().size == (384, 288)
