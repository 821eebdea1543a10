"""Readers of conversations: made-up records of each layout, and the messages that they become."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tap_llm.data import open_samples
from tap_llm.data.readers import (
    Flickr30kSamples,
    GarSamples,
    LlavaSamples,
    OspreySamples,
    ShikraSamples,
    VcrSamples,
)
from tap_llm.errors import InputError
from tap_llm.masks import encode_rle

SQUARE = [[3.0, 4.0, 8.0, 4.0, 8.0, 10.0, 3.0, 10.0]]  # columns 3..7, rows 4..9


def shown(message):
    """A message on one line; regions by index."""
    signs = {"image": "<image>", "region": "<{}>"}
    return "".join(part["text"] if part["type"] == "text" else signs[part["type"]].format(part.get("index"))
                   for part in message["content"])  # fmt: skip


def read(path, reader_class, **options):
    """All samples, each whole; regions come as content parts once each, after the picture."""
    reader = open_samples(path, **options)
    assert type(reader) is reader_class
    for sample in reader:
        sample.check()
        parts = [part for message in sample.conversations for part in message["content"]]
        assert sorted(part["index"] for part in parts if part["type"] == "region") == list(range(len(sample.regions)))
        assert [part["type"] for part in parts].count("image") == 1
    return [[f"{m['role']}: {shown(m)}" for m in sample.conversations] for sample in reader], list(reader)


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


class TestOsprey:
    ANNOTATION = [{"bbox": [3, 4, 5, 6], "segmentation": SQUARE}, {"bbox": [1, 2, 10, 5], "segmentation": []}]
    RECORD = {"file_name": "COCO_train2014_000000000009.png", "height": 20, "width": 30, "annotation": ANNOTATION}

    @pytest.mark.parametrize("name", ["000000000009.png", "train2017/000000000009.png", RECORD["file_name"]])
    def test_conversation(self, folder, name):
        folder.picture(name)
        talk = turns("<image>\nIs <region2> left of <region1>?", "Yes, <region2> is.", "What is <region1>?", "A cup.")
        path = folder.json("osprey_conversation.json", [self.RECORD | {"conversations": talk}])
        (messages,), (sample,) = read(path, OspreySamples)
        assert messages == [
            "user: <image>Is region 2 <1> left of region 1 <0>?",
            "assistant: Yes, region 2 is.",
            "user: What is region 1?",
            "assistant: A cup.",
        ]
        assert sample.regions == [{"mask": SQUARE}, {"box": [1, 2, 11, 7]}]
        assert (sample.source, sample.size) == ("osprey", (20, 30))

    def test_what_only_answers_speak_of_is_introduced(self, folder):
        folder.picture("000000000009.png")
        talk = turns("What is there?", "A cup in <region2>.")
        path = folder.json("osprey_conversation.json", [self.RECORD | {"conversations": talk}])
        (messages,), _ = read(path, OspreySamples)
        assert messages[0] == "user: <image>region 1: <0>\nregion 2: <1>\nWhat is there?"

    def test_detail_description(self, folder):
        folder.picture("000000000009.png")
        texts = ["<region1>: A cup\nof tea. ", "<region2>:A hat by <region1>."]
        path = folder.json("osprey_detail_description.json", [self.RECORD | {"description": texts}])
        (messages,), _ = read(path, OspreySamples)
        assert messages == [
            "user: <image>Describe region 1 <0>.",
            "assistant: A cup\nof tea.",
            "user: Give a full description of region 2 <1>.",
            "assistant: A hat by region 1.",
        ]

    @pytest.mark.parametrize("name", ["short_form", "part_level", "lvis_positive_negative"])
    def test_short_answers(self, folder, name):
        folder.picture("000000000009.png")
        record = self.RECORD | {"conversations": turns("Is there a cup in <region1>?", "No")}
        path = folder.json(f"osprey_{name}.json", [record | {"annotation": self.ANNOTATION[:1]}])
        (messages,), _ = read(path, OspreySamples)
        ending = "" if name.startswith("lvis") else " Answer the question using a single word or phrase."
        assert messages == [f"user: <image>Is there a cup in region 1 <0>?{ending}", "assistant: No"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"conversations": turns("What?", "<region3>")}, r"conversations\[1\]: <region3> stands for no region: "
             "there are 2, counted from 1"),
            ({"conversations": turns("What is <region0>?", "a")}, r"conversations\[0\]: <region0> stands for no"),
            ({"conversations": [{"from": "bot", "value": "a"}]}, "unknown role 'bot'; known are human"),
            ({"conversations": turns("What?")}, "the last question has no answer"),
            ({"conversations": turns("What?", "")}, r"conversations\[1\]: is empty"),
            ({"conversations": []}, "conversations: is empty"),
            ({"conversations": turns("a", "b")[::-1]}, r"conversations\[0\]: it is the user's turn, but the assistant"),
            ({"conversations": [{"value": "a"}]}, 'the record is malformed \\("from" is missing'),
            ({"description": ["a cup"]}, r'description\[0\]: expected "<region1>: ..."'),
            ({"description": ["<region1>: a", "<region7>: a"]}, r"description\[1\]: <region7> stands for no region"),
            ({}, '"conversations" is missing'),
        ],
    )  # fmt: skip
    def test_broken_records_are_named(self, folder, change, message):
        good = self.RECORD | {"conversations": turns("a", "b")}
        reader = open_samples(folder.json("osprey.json", [good, self.RECORD | change]))
        with pytest.raises(InputError, match=f"record 1: .*{message}|record 1: {message}"):
            reader[1]
        assert reader[0].conversations

    def test_places_are_checked_like_everywhere(self, folder):
        folder.picture("000000000009.png")
        record = self.RECORD | {"annotation": [{"bbox": [50, 4, 5, 6]}], "conversations": turns("a", "b")}
        (sample,) = open_samples(folder.json("osprey.json", [record]))
        with pytest.raises(InputError, match=r"regions\[0\]: box .* lies wholly outside the image"):
            sample.check()


class TestLlava:
    def records(self):
        talk = turns("What is this?\n<image>", "A cup.", "Why?", "It holds tea.")
        return [{"id": "a", "image": "1.png", "conversations": talk}, {"id": "b", "conversations": turns("Hi", "Hi")}]

    @pytest.mark.parametrize("layout", ["json", "lines"])
    def test_pictures_stay_and_plain_text_is_counted(self, folder, layout):
        folder.picture("train2017/1.png")
        records = self.records()
        path = folder.json("a.json", records[::-1]) if layout == "json" else folder.lines("a.jsonl", records)
        (messages,), (sample,) = read(path, LlavaSamples)
        assert messages == ["user: <image>What is this?", "assistant: A cup.", "user: Why?", "assistant: It holds tea."]
        assert sample.source == "llava" and not sample.regions
        assert open_samples(path).notes == ["left out 1 records without a picture"]

    def test_instructions_ahead(self, folder):
        folder.picture("1.png")
        talk = [{"from": "system", "value": "Be brief."}, *turns("What?", "A cup.")]
        path = folder.json("a.json", [{"image": "1.png", "conversations": talk}])
        (messages,), _ = read(path, LlavaSamples)
        assert messages == ["system: Be brief.", "user: <image>What?", "assistant: A cup."]

    def test_broken_lines_keep_their_number(self, folder):
        path = folder.lines("a.jsonl", [self.records()[0], self.records()[1], '{"id": "c", ', self.records()[0]])
        reader = open_samples(path)
        assert len(reader) == 3
        with pytest.raises(InputError, match="line 3: not valid JSON"):
            reader[1]
        assert reader.where(2) == "line 4"


class TestShikra:
    BOXES = [[1, 1, 9, 9], [2, 3, 12, 13], [20, 3, 29, 13]]
    DIALOGUE = {
        "img_path": "1.png",
        "boxes": BOXES,
        "question": "Is <ph_st> the man <ph_ed> near them?",
        "question_boxes_seq": [[1]],
        "answer": "Yes.",
        "cot_with_ans": "The <ph_st>dogs<ph_ed> touch <ph_st>him<ph_ed>. Yes.",
        "answer_boxes_seq": [[0, 2], [1]],
    }

    def test_phrases_are_linked(self, folder):
        folder.picture("1.png")
        (messages,), (sample,) = read(folder.lines("GPT4GEN_RD_BoxCoT_train.jsonl", [self.DIALOGUE]), ShikraSamples)
        assert messages == [
            "user: <image>region 1: <0>\nregion 3: <2>\nIs the man (region 2 <1>) near them?",
            "assistant: The dogs (region 1, region 3) touch him (region 2). Yes.",
        ]
        assert [region["box"] for region in sample.regions] == self.BOXES

    def test_the_short_answer(self, folder):
        folder.picture("1.png")
        record = self.DIALOGUE | {"cot_with_ans": None, "boxes": self.BOXES[1:2], "question_boxes_seq": [[0]]}
        (messages,), _ = read(folder.lines("a.jsonl", [record]), ShikraSamples)
        assert messages == ["user: <image>Is the man (region 1 <0>) near them?", "assistant: Yes."]

    def test_expressions(self, folder):
        folder.picture("train2014/COCO_1.png")
        record = {"img_path": "COCO_1.png", "expression": "the left cup", "bbox": [1, 1, 9, 9]}
        (messages,), (sample,) = read(folder.lines("REC_refcoco.jsonl", [record]), ShikraSamples)
        question = "Describe region 1 <0> so that it can be told from everything else in the picture."
        assert messages == [f"user: <image>{question}", "assistant: the left cup"]
        assert sample.regions == [{"box": [1, 1, 9, 9], "captions": ["the left cup"]}]

    def test_captions(self, folder):
        folder.picture("flickr30k-images/7.jpg")
        text = "<ph_st> A man <ph_ed> smiles ."
        record = {"image_id": 7, "sentence": text, "boxes": self.BOXES[:1], "boxes_seq": [[0]]}
        (messages,), _ = read(folder.lines("CWB_flickr30k_train.jsonl", [record]), ShikraSamples)
        assert messages[1] == "assistant: A man (region 1) smiles ."

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"question_boxes_seq": []}, "question: has 1 marked phrases, but question_boxes_seq has 0 entries"),
            ({"answer_boxes_seq": [[0, 3], [1]]}, "answer_boxes_seq: names box 3, but there are 3"),
            ({"boxes": None}, "the record is malformed"),
        ],
    )
    def test_broken_records_are_named(self, folder, change, message):
        reader = open_samples(folder.lines("a.jsonl", [self.DIALOGUE, self.DIALOGUE | change]))
        with pytest.raises(InputError, match=f"line 2: {message}"):
            reader[1]


class TestVcr:
    RECORD = {
        "img_fn": "film/1.png",
        "metadata_fn": "film/1.json",
        "objects": ["person", "person", "cup"],
        "question": ["Why", "does", [2], "please", [1, 0], "?"],
        "answer_choices": [["No", "."], [[1], "does", "n't", "like", [2], "."]],
        "answer_label": 1,
        "rationale_choices": [["It", "is", [0], "'s", "."], ["No"]],
        "rationale_label": 0,
        "annot_id": "train-0",
    }
    METADATA = {
        "boxes": [[1, 1, 9, 9, 0.9], [2, 3, 12, 13, 0.8], [20, 3, 29, 13, 1.0]],
        "segms": [[[[3, 4], [8, 4], [8, 10], [3, 10]]], [], [[[1, 1], [2, 2]]]],
        "width": 30,
        "height": 20,
    }

    def write(self, folder, *records):
        folder.picture("vcr1images/film/1.png")
        folder.json("vcr1images/film/1.json", self.METADATA)
        return folder.lines("train.jsonl", list(records))

    def test_question_answer_and_reason(self, folder):
        (messages,), (sample,) = read(self.write(folder, self.RECORD), VcrSamples)
        assert messages == [
            "user: <image>Why does region 1 <0> please region 2 <1> and region 3 <2>?",
            "assistant: region 2 doesn't like region 1.",
            "user: Why?",
            "assistant: It is region 3's.",
        ]
        assert sample.regions == [
            {"id": 2, "box": [20, 3, 29, 13], "category": "cup"},
            {"id": 1, "box": [2, 3, 12, 13], "category": "person"},
            {"id": 0, "box": [1, 1, 9, 9], "category": "person", "mask": [[3, 4, 8, 4, 8, 10, 3, 10]]},
        ]
        assert (sample.id, sample.size) == ("train-0", (20, 30))

    def test_what_points_nowhere_is_left_out_and_counted(self, folder):
        bad = self.RECORD | {"question": ["Who", "is", [3], "?"]}
        reader = open_samples(self.write(folder, bad, self.RECORD, "{broken", bad))
        assert reader.notes == ["left out 2 records whose words point at objects that are not there"]
        assert [reader.where(i) for i in range(len(reader))] == ["line 2", "line 3"]
        with pytest.raises(InputError, match="line 3: not valid JSON"):
            reader[1]

    def test_metadata_that_is_not_there(self, folder):
        path = self.write(folder, self.RECORD | {"metadata_fn": "film/2.json"})
        with pytest.raises(InputError, match="line 1: metadata_fn: there is no file .*film/2.json"):
            open_samples(path)[0]

    def test_metadata_of_another_picture(self, folder):
        path = self.write(folder, self.RECORD | {"objects": ["person"] * 4})
        with pytest.raises(InputError, match=r'line 1: "objects" has 4 entries, but film/1.json has 3 boxes'):
            open_samples(path)[0]


class TestFlickr30k:
    def document(self):
        text = "A man holds two dogs."
        image = {"id": 4, "file_name": "7.png", "height": 20, "width": 30, "caption": text, "dataset_name": "flickr"}
        annotations = [
            {"id": i, "image_id": 4, "category_id": 1, "bbox": [i, 1, 5, 5], "tokens_positive": [span]}
            for i, span in enumerate([[12, 20], [0, 5], [12, 20]])
        ]
        return {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}

    def test_phrases_are_linked(self, folder):
        folder.picture("flickr30k-images/7.png")
        (messages,), (sample,) = read(
            folder.json("final_flickr_mergedGT_train.json", self.document()), Flickr30kSamples
        )
        assert messages == [
            "user: <image>region 2: <1>\nregion 1: <0>\nregion 3: <2>\nDescribe the picture and say which region is "
            "which.",
            "assistant: A man (region 2) holds two dogs (region 1, region 3).",
        ]
        assert sample.captions == ["A man holds two dogs."]
        assert sample.regions[1] == {"id": 1, "box": [1, 1, 6, 6], "attributes": {"tokens_positive": [[0, 5]]}}

    def test_a_span_outside_the_sentence(self, folder):
        document = self.document()
        document["annotations"][1]["tokens_positive"] = [[15, 40]]
        reader = open_samples(folder.json("a.json", document))
        with pytest.raises(InputError, match=r"image 4: tokens_positive \[15, 40\] lies outside the caption of 21"):
            reader[0]


class TestGar:
    @pytest.fixture
    def rows(self, folder):
        masks = np.zeros((2, 20, 30), dtype=bool)
        masks[0, 4:10, 3:8] = masks[1, 12:18, 20:29] = True
        first, second = map(encode_rle, masks)
        folder.picture("1.png")
        asked = turns("Does <Prompt1> touch <Prompt0>?", "No, <Prompt0> is far.")
        return [
            {"image": "1.png", "mask_rle": [first, second], "conversations": asked},
            {"image": "1.png", "mask_rle": [first], "conversations": turns("<image>\nDescribe it.", "A cup.")},
        ]

    EXPECTED = [
        ["user: <image>Does region 2 <1> touch region 1 <0>?", "assistant: No, region 1 is far."],
        ["user: <image>region 1: <0>\nDescribe it.", "assistant: A cup."],
    ]

    @pytest.mark.parametrize("layout", ["arrow", "parquet", "folder of parquet"])
    def test_embedded_pictures(self, folder, rows, layout):
        from datasets import Dataset
        from datasets import Image as ImageColumn

        picture = {"bytes": (folder.path / "1.png").read_bytes(), "path": None}
        table = Dataset.from_list([row | {"image": picture} for row in rows]).cast_column("image", ImageColumn())
        (folder.path / "1.png").unlink()
        path = folder.path / "gar"
        if layout == "arrow":
            table.save_to_disk(str(path))
        else:
            path.mkdir()
            table.to_parquet(path / "0.parquet")
            path = path if layout.startswith("folder") else path / "0.parquet"
        messages, samples = read(path, GarSamples)
        assert messages == self.EXPECTED
        assert samples[0].masks().sum(axis=(1, 2)).tolist() == [30, 54]
        assert open_samples(path).where(1) == "row 1"

    def test_lines_and_a_single_mask(self, folder, rows):
        rows[1]["mask_rle"] = rows[1]["mask_rle"][0]
        messages, samples = read(folder.lines("gar.jsonl", rows), GarSamples)
        assert messages == self.EXPECTED
        assert np.asarray(samples[1].load_image()).shape == np.asarray(Image.open(folder.path / "1.png")).shape

    def test_damaged_tables(self, folder, rows):
        (folder.path / "a.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(InputError, match=r"a\.parquet does not hold rows"):
            open_samples(folder.path / "a.parquet", "gar")
        with pytest.raises(InputError, match="does not hold rows"):
            open_samples(folder.path, "gar")

    def test_a_marker_without_a_mask(self, folder, rows):
        rows[0]["mask_rle"].pop()
        reader = open_samples(folder.lines("gar.jsonl", rows))
        with pytest.raises(
            InputError, match=r"line 1: conversations\[0\]: <Prompt1> stands for no region: there are 1"
        ):
            reader[0]


def test_a_given_format_is_read_as_such(folder):
    folder.picture("1.png")
    talk = turns("What?", "A cup.")
    path = folder.json("a.json", [{"image": "1.png", "conversations": talk}])
    assert len(read(path, LlavaSamples, format="llava")[1]) == 1
    with pytest.raises(InputError, match="record 0: expected a record, got int"):
        open_samples(folder.json("b.json", [1]), "osprey")[0]


def test_conversations_survive_writing(folder):
    from tap_llm.data import write_jsonl

    folder.picture("1.png")
    path = folder.lines("a.jsonl", [TestShikra.DIALOGUE])
    write_jsonl(open_samples(path), folder.path / "own.jsonl")
    assert open_samples(folder.path / "own.jsonl")[0].conversations == open_samples(path)[0].conversations
