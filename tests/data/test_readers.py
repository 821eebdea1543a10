"""Readers: what each format becomes, and how it is recognised."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tap_llm.data import checked, open_samples
from tap_llm.data.readers import (
    CocoSamples,
    GritSamples,
    JsonlSamples,
    RefCocoSamples,
    Sa1bSamples,
    VisualGenomeSamples,
)
from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import encode_rle

SQUARE = [[3.0, 4.0, 8.0, 4.0, 8.0, 10.0, 3.0, 10.0]]  # columns 3..7, rows 4..9


def whole(reader):
    """All samples, each of which is whole."""
    return list(map(checked, reader))


class TestCoco:
    def test_regions(self, coco_file):
        first, second = whole(open_samples(coco_file))
        assert first.regions == [
            {"id": 10, "box": [3, 4, 8, 10], "mask": SQUARE, "category": "red dog"},
            {
                "id": 11,
                "box": [2, 0, 3, 5],
                "mask": {"size": [20, 30], "counts": [40, 5, 555]},
                "category": "cat",
                "attributes": {"depth": 3},
            },
        ]
        assert second.regions == [{"id": 13, "box": [1, 1, 5, 5], "category": "cat", "captions": ["a cat", "it"]}]
        assert first.masks().sum(axis=(1, 2)).tolist() == [30, 5]
        assert (first.id, first.source, first.license, first.size) == ("1", "coco", "CC BY", (20, 30))

    def test_captions_and_questions(self, coco_file):
        first = open_samples(coco_file)[0]
        assert first.captions == ["two animals"]
        assert first.conversations == [{"regions": [1, 0], "question": "Left?", "answer": "yes", "topic": "relation"}]

    def test_crowds_are_left_out_and_counted(self, coco_file):
        reader = CocoSamples(coco_file)
        assert reader.notes == ["left out 1 crowd regions"]
        assert [len(sample.regions) for sample in CocoSamples(coco_file, keep_crowds=True)] == [3, 1]

    def test_the_caption_file_of_coco(self, coco_file, folder, coco_document):
        document = coco_document
        document["annotations"] = document.pop("captions")
        reader = open_samples(folder.json("coco.json", document))
        assert [sample.captions for sample in reader] == [["two animals"], []]
        assert [sample.regions for sample in reader] == [[], []]

    def test_lvis_names_pictures_by_url_and_roots_are_forgiving(self, tmp_path, folder):
        folder.picture("train2017/000000000030.png")
        image = {"id": 30, "coco_url": "http://images.cocodataset.org/train2017/000000000030.png"}
        path = folder.json("annotations/lvis.json", {"images": [image], "annotations": []})
        for root in (None, tmp_path, tmp_path / "train2017"):
            assert open_samples(path, "lvis", root)[0].load_image().size == (30, 20)

    def test_faults_of_the_file(self, coco_file, folder, coco_document):
        document = coco_document
        document["annotations"] += [{"id": 99, "image_id": 8, "bbox": [0, 0, 1, 1]}, document["annotations"][0]]
        reader = open_samples(folder.json("coco.json", document))
        assert reader.faults == ["annotation 99: there is no image 8", "annotation 10: this id is used twice"]


class TestVisualGenome:
    REGION = {"region_id": 5, "image_id": 1, "x": 2, "y": 3, "width": 10, "height": 4, "phrase": "a red hat"}

    @pytest.mark.parametrize("place", [".", "VG_100K", "VG_100K_2"])
    def test_original_file(self, folder, place):
        folder.picture(f"{place}/1.jpg")
        path = folder.json("region_descriptions.json", [{"id": 1, "regions": [self.REGION]}])
        reader = open_samples(path)
        assert isinstance(reader, VisualGenomeSamples)
        (sample,) = whole(reader)
        assert sample.regions == [{"id": 5, "box": [2, 3, 12, 7], "captions": ["a red hat"]}]
        assert (sample.id, sample.source, sample.license) == ("1", "visual_genome", "CC BY 4.0")

    def test_grit_layout(self, folder):
        folder.picture("VG_100K_2/1.jpg")
        document = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 30}],
            "categories": [{"id": 1, "name": "object"}],
            "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 4], "caption": "a red hat"}],
        }
        reader = open_samples(folder.json("train.json", document))
        assert isinstance(reader, GritSamples)
        (sample,) = whole(reader)
        assert sample.regions == [{"id": 5, "box": [2, 3, 12, 7], "captions": ["a red hat"]}]
        assert sample.source == "visual_genome"

    def test_own_boxes_with_captions_are_not_taken_for_it(self, coco_file, folder, coco_document):
        document = coco_document | {"categories": [{"id": 1, "name": "cat"}]}
        document["annotations"] = document["annotations"][3:]
        assert type(open_samples(folder.json("coco.json", document))) is CocoSamples


class TestRefCoco:
    @pytest.fixture
    def path(self, folder):
        folder.picture("train2014/COCO_train2014_1.png")
        common = {"file_name": "COCO_train2014_1.png", "height": 20, "width": 30, "dataset_name": "refcocog"}
        texts = ["the left dog", "a dog that sits", "the cat"]
        boxes = [[1, 1, 5, 5], [1, 1, 5, 5], [8, 8, 4, 4]]
        document = {
            "images": [common | {"id": i, "caption": text, "tokens_negative": []} for i, text in enumerate(texts)],
            "annotations": [
                {"id": i, "image_id": i, "bbox": box, "original_id": 70 + box[0], "tokens_positive": [[0, 3 + i]]}
                for i, box in enumerate(boxes)
            ],
            "categories": [],
        }
        return folder.json("finetune_refcocog_val.json", document)

    def test_expressions_gather_at_their_object(self, path):
        reader = open_samples(path)
        assert isinstance(reader, RefCocoSamples)
        (sample,) = whole(reader)
        assert sample.regions == [
            {
                "id": 71,
                "box": [1, 1, 6, 6],
                "captions": ["the left dog", "a dog that sits"],
                "attributes": {"tokens_positive": [[[0, 3]], [[0, 4]]]},
            },
            {"id": 78, "box": [8, 8, 12, 12], "captions": ["the cat"], "attributes": {"tokens_positive": [[[0, 5]]]}},
        ]
        assert sample.source == "refcocog"

    def test_or_one_by_one(self, path):
        samples = whole(RefCocoSamples(path, per_expression=True))
        assert [sample.regions[0]["captions"] for sample in samples] == [
            ["the left dog"],
            ["a dog that sits"],
            ["the cat"],
        ]
        assert [sample.id for sample in samples] == ["0", "1", "2"]


class TestSa1b:
    def test_folder(self, tmp_path, folder):
        mask = np.zeros((20, 30), dtype=bool)
        mask[4:10, 3:8] = True
        for number in (223, 7):
            folder.picture(f"sa_000000/sa_{number}.jpg", seed=number)
            annotation = {
                "id": number * 10,
                "segmentation": encode_rle(mask),
                "bbox": [3, 4, 4, 5],
                "area": 30,
                "predicted_iou": 0.9,
                "stability_score": 0.95,
                "crop_box": [0, 0, 30, 20],
                "point_coords": [[5.0, 6.0]],
            }
            image = {"image_id": number, "width": 30, "height": 20, "file_name": f"sa_{number}.jpg"}
            folder.json(f"sa_000000/sa_{number}.json", {"image": image, "annotations": [annotation]})
        reader = open_samples(tmp_path)
        assert isinstance(reader, Sa1bSamples)
        samples = whole(reader)
        assert [sample.id for sample in samples] == ["223", "7"]  # by name
        assert reader.where(1) == "sa_000000/sa_7.json"
        assert (samples[0].masks() == mask).all()
        assert samples[0].regions[0]["attributes"]["predicted_iou"] == 0.9

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "sa_1.json").write_text("{")
        with pytest.raises(InputError, match="sa_1.json: .*not valid JSON"):
            open_samples(tmp_path)[0]


class TestJsonl:
    RECORD = {
        "image": "pictures/1.png",
        "regions": [{"box": [0, 0, 5, 5], "caption": "a cat"}],
        "messages": [
            {"role": "user", "content": [{"type": "region", "index": 0}]},
            {"role": "assistant", "content": "a dog"},
        ],
        "source": "mine",
    }

    def test_lines(self, folder):
        folder.picture("pictures/1.png")
        path = folder.lines("a.jsonl", [self.RECORD, "", {"image": "pictures/1.png", "id": 4}])
        reader = open_samples(path)
        assert isinstance(reader, JsonlSamples)
        first, second = whole(reader)
        assert first.regions == [{"box": [0, 0, 5, 5], "captions": ["a cat"]}]
        assert first.conversations == self.RECORD["messages"]
        assert second.id == "4"
        assert [reader.where(i) for i in range(2)] == ["line 1", "line 3"]

    def test_masks_as_files_start_from_the_same_folder(self, tmp_path, folder):
        folder.picture("photos/1.png")
        Image.fromarray(np.eye(20, 30, dtype=np.uint8) * 255).save(tmp_path / "photos" / "mask.png")
        path = folder.lines("a.jsonl", [{"image": "1.png", "regions": [{"mask": "mask.png"}]}])
        (sample,) = whole(open_samples(path, image_root=tmp_path / "photos"))
        assert sample.masks().sum() == 20

    @pytest.mark.parametrize("ending", ["\n", "\r\n"])
    @pytest.mark.parametrize("last", [True, False])
    def test_line_ends(self, tmp_path, ending, last):
        path = tmp_path / "a.jsonl"
        lines = [json.dumps({"image": f"{i}.png", "id": "ä" * i}, ensure_ascii=False) for i in range(5)]
        path.write_bytes((ending.join(lines) + ending * last).encode())
        assert [sample.id for sample in open_samples(path)] == ["ä" * i for i in range(5)]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"image": "a.png"', "line 2: not valid JSON"),
            ("[1, 2, 3]", "line 2: expected a JSON object, got list"),
            ('{"image": "a.png", "region": []}', 'line 2: unknown key "region"; did you mean "regions"'),
            ('{"regions": []}', 'line 2: "image" must be the path of a picture'),
            ('{"image": "a.png", "size": 5}', "line 2: the record is malformed"),
        ],
    )
    def test_broken_lines_are_named_when_read(self, tmp_path, line, message, folder):
        reader = open_samples(folder.lines("a.jsonl", [{"image": "a.png"}, line, {"image": "b.png"}]))
        assert len(reader) == 3
        with pytest.raises(InputError, match=message):
            reader[1]
        assert reader[2].image == tmp_path / "b.png"


def test_readers_are_sequences_that_travel(coco_file):
    reader = open_samples(coco_file)
    assert reader[-1].id == "2"
    assert [sample.id for sample in reader[:5]] == ["1", "2"]
    with pytest.raises(IndexError):
        reader[2]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy[0].regions == reader[0].regions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("some text", "not recognised; known formats: coco"),
        ('{"a": 1}', "not recognised; known formats: coco"),
        ('{"images": [', "not valid JSON"),
        ("PAR1 but no more", "not a parquet file"),
        ('{"images": 3, "annotations": []}', '"images" is missing, or not a list'),
        ('{"images": [{"id": []}], "annotations": []}', "does not have the form of coco"),
    ],
)
def test_unknown_formats(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        open_samples(path)


def test_wrong_paths(tmp_path, coco_file, folder):
    with pytest.raises(MissingFileError, match="no file or folder"):
        open_samples(tmp_path / "missing.json")
    with pytest.raises(MissingFileError, match="no folder"):
        open_samples(coco_file, image_root=tmp_path / "missing")
    with pytest.raises(InputError, match="neither sa_"):
        open_samples(coco_file.parent / "pictures")
    with pytest.raises(InputError, match="unknown format 'yolo'; known formats"):
        open_samples(coco_file, "yolo")


def test_foreign_parquet_is_refused(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"image": ["a"], "label": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="unknown columns label"):
        open_samples(tmp_path / "a.parquet")


class TestRealSets:
    @pytest.fixture(scope="class")
    def coco_mask(self):
        return pytest.importorskip("pycocotools.mask")

    def test_coco_open(self, shared_data, coco_mask):
        path = shared_data / "coco_open" / "instances_train.json"
        records = {record["id"]: record for record in json.loads(path.read_text())["annotations"]}
        samples = list(CocoSamples(path, keep_crowds=True))
        assert len(samples) == 80
        assert sum(len(sample.regions) for sample in samples) == 767
        assert len({region["category"] for sample in samples for region in sample.regions}) == 67
        assert sum(len(region.get("captions", [])) for sample in samples for region in sample.regions) == 266
        for sample in samples:
            areas = sample.masks().sum(axis=(1, 2))
            rles = [records[region["id"]]["segmentation"] for region in sample.regions]
            assert areas.tolist() == [int(coco_mask.area(rle)) for rle in rles]
            assert areas.tolist() == [records[region["id"]]["area"] for region in sample.regions]

    @pytest.mark.parametrize(("split", "photos", "regions"), [("train", 599, 4948), ("val", 100, 822)])
    def test_ccp_clothing(self, shared_data, split, photos, regions):
        reader = open_samples(shared_data / "ccp_clothing" / f"{split}.json")
        assert len(reader) == photos
        assert sum(len(sample.regions) for sample in reader) == regions

    def test_composed_sample(self, shared_data):
        samples = whole(open_samples(shared_data / "composed_sample" / "sample.json"))
        assert len(samples) == 60
        assert sum(int(sample.has_mask.sum()) for sample in samples) == 290
        assert sum(len(sample.conversations) for sample in samples) == 217
        assert samples[0].regions[0]["captions"] == ["a carton of Bravo Apple Juice"]
        assert samples[0].regions[0]["attributes"]["place"] == "top left"

    def test_captions_of_photos(self, shared_data):
        reader = open_samples(shared_data / "coco_open" / "captions_train.json")
        assert sum(len(sample.captions) for sample in reader) == 1200
        assert reader[0].license
