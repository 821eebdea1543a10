"""Whatever is wrong with a record is named, and the record stays."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, annotation, coco_document, rectangle, write_coco
from PIL import Image

from eval.annotations import Annotations
from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import decode_rle, encode_rle

BOX = (4, 3, 10, 8)
SMALL = encode_rle(np.ones((5, 7), dtype=bool))


def read(folder, *records, images=2, lvis=False, **options):
    return Annotations(write_coco(folder, coco_document(list(records), images, lvis)), **options)


def test_pictures_with_their_records(tmp_path):
    crowd = annotation(1, 3, BOX, iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]})
    file = read(tmp_path, annotation(1, 2, BOX), annotation(2, 1, BOX), crowd, annotation(1, 1, BOX), images=3)
    assert [picture.image_id for picture in file] == [1, 2, 3]
    assert [record["id"] for record in file[0].records] == [1, 4]  # the crowd is for average precision alone
    assert file[0].sound == file[0].records
    assert file[0].load().size == (WIDTH, HEIGHT)
    assert (file.style, file.faults, file.strays) == ("coco", [], 0)
    assert file.categories == {1: "circle", 2: "square", 3: "star"}
    assert len(file.document["annotations"]) == 4
    assert [picture.image_id for picture in Annotations(file.path, every=2)] == [1, 3]


def test_lvis_is_recognised_and_finds_pictures_by_address(tmp_path):
    document = coco_document([annotation(1, 1, BOX)], lvis=True)
    write_coco(tmp_path, document)
    (tmp_path / "val2017").mkdir()
    (tmp_path / "1.png").rename(tmp_path / "val2017" / "1.png")
    del document["images"][0]["file_name"]
    document["images"][0]["coco_url"] = "http://images.cocodataset.org/val2017/1.png"
    file = Annotations(write_coco(tmp_path, document), tmp_path)
    assert file.style == "lvis"
    assert file[0].load().size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"image_id": 9}, "there is no image 9"),
        ({"image_id": None}, "there is no image None"),
        ({"category_id": 7}, "there is no category 7"),
        ({"category_id": [1]}, r"there is no category \[1\]"),
        ({"segmentation": SMALL}, "mask is 7x5, but the image is 48x32"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "!!"}}, "RLE"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3]}}, "RLE: runs sum to 3"),
        ({"segmentation": []}, "there is no mask"),
        ({"segmentation": [[1, 2, 3, 4]]}, "at least 3 points"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "at least 3 points"),
        ({"bbox": [1, 2, 0, 4]}, "no area"),
        ({"bbox": [1, 2, 3]}, "four numbers"),
        ({"bbox": [99, 2, 3, 4]}, "wholly outside"),
    ],
)
def test_broken_record_is_named_and_cannot_be_found(tmp_path, more, fault):
    file = read(tmp_path, annotation(1, 1, BOX), {**annotation(1, 1, BOX), **more})
    record = file.document["annotations"][1]
    assert file.faults == [f"annotation 2: {record['problem']}"]
    assert re.search(fault, record["problem"])
    if "bbox" in more:
        assert record["bbox"] == [0, 0, 0, 0]
    else:
        assert not decode_rle(record["segmentation"]).any()
    assert [one["id"] for one in file[0].sound] == [1]
    assert len(file[0].records) == 2 - ("image_id" in more)
    assert file.strays == ("image_id" in more)


@pytest.mark.parametrize(
    ("more", "fault"), [({"area": "big"}, '"area" must be a number'), ({"iscrowd": "1"}, '"iscrowd" must be 0 or 1')]
)
def test_broken_number_is_named_and_the_region_counts(tmp_path, more, fault):
    file = read(tmp_path, {**annotation(1, 1, BOX), **more})
    assert len(file.faults) == 1
    assert fault in file.faults[0]
    (record,) = file[0].sound
    assert (record["area"], record["iscrowd"]) == (BOX[2] * BOX[3], 0)


def test_damaged_mask_matters_only_where_masks_do(tmp_path):
    assert read(tmp_path, annotation(1, 1, BOX, segmentation=SMALL), masks=False).faults == []


def test_double_ids(tmp_path):
    file = read(tmp_path, annotation(1, 1, BOX, id=3), annotation(1, 2, BOX, id=3), annotation(2, 1, BOX, id=0))
    assert [record["id"] for record in file.document["annotations"]] == [3, 4, 0]
    assert file.faults[0] == "annotation 3: this id is used twice; the further one counts as 4"
    assert "annotation 0" in file.faults[1]  # pycocotools takes this number for "not found"
    assert len(file[0].sound) == 2


def test_double_picture_cannot_be_used(tmp_path):
    document = coco_document([annotation(1, 1, BOX)])
    document["images"].append(document["images"][0])
    file = Annotations(write_coco(tmp_path, document))
    assert len(file) == 2
    with pytest.raises(InputError, match="image 1: this id is used twice"):
        file[0].load()
    assert len(file.document["images"]) == 3  # with the one for strays


@pytest.mark.parametrize("change", [{"height": None}, {"width": "48"}, {"file_name": None}])
def test_picture_without_size_or_name(tmp_path, change):
    document = coco_document([annotation(1, 1, BOX)])
    document["images"][0] |= change
    file = Annotations(write_coco(tmp_path, document), masks=False)
    with pytest.raises(InputError, match="image 1: its record states no file, or no height and width"):
        file[0].load()


def test_missing_or_other_picture(tmp_path):
    file = read(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").unlink()
    Image.new("RGB", (5, 4)).save(tmp_path / "2.png")
    with pytest.raises(MissingFileError, match=r"1\.png"):
        file[0].load()
    with pytest.raises(InputError, match="is 5x4, but its record states 48x32"):
        file[1].load()


def test_what_the_implementations_need_is_filled_in(tmp_path):
    bare = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": rectangle(*BOX)}
    record = read(tmp_path, bare).document["annotations"][0]
    assert (record["bbox"], record["area"], record["iscrowd"]) == ([4, 3, 10, 8], 80, 0)


def test_fingerprint_follows_picture_and_records(tmp_path):
    def first(*records):
        return read(tmp_path, *records)[0].fingerprint

    plain = first(annotation(1, 1, BOX))
    assert first(annotation(1, 1, BOX)) == plain
    assert first(annotation(1, 2, BOX)) != plain
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.png")
    assert first(annotation(1, 1, BOX)) != plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "lists no images"),
        ({"categories": []}, "lists no images, or no categories"),
        ({"annotations": {}}, '"annotations" is missing'),
        ({"images": [{"id": "a"}]}, "image ids must be whole numbers, got 'a'"),
        ({"categories": [{"id": 1, "name": "dog"}]}, '"frequency" must be one of r, c, f'),
    ],
)
def test_file_of_another_form(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        Annotations(rewritten(tmp_path, change))


def rewritten(folder, change):
    path = write_coco(folder, coco_document([], lvis=True))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return path


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(MissingFileError, match="no file"):
        Annotations(tmp_path / "no.json")
    with pytest.raises(MissingFileError, match="no folder"):
        read(tmp_path, image_root=tmp_path / "no")
