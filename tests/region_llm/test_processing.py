"""Messages to tensors: where placeholders, labels and rows end up, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tap_llm import InputError, TapImageProcessor, TapLlmProcessor
from tap_llm.region_llm.encoding import IGNORED, encode_piece

BOX = {"type": "region", "box": [1, 2, 9, 9]}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(value: str) -> dict[str, Any]:
    return {"role": "assistant", "content": value}


@pytest.fixture(scope="module")
def make(chat_tokenizer: Any) -> Callable[..., TapLlmProcessor]:
    def build(tokenizer: Any = chat_tokenizer, **options: Any) -> TapLlmProcessor:
        options = {"tokens_per_region": 2, "tokens_per_image": 3, **options}
        return TapLlmProcessor(TapImageProcessor(size={"longest_edge": 64}), tokenizer, **options)

    return build


@pytest.fixture(scope="module")
def processor(make: Callable[..., TapLlmProcessor]) -> TapLlmProcessor:
    return make()


@pytest.fixture(scope="module")
def image(pictures: Any) -> dict[str, Any]:
    return {"type": "image", "image": pictures[0]}


class TestIds:
    def test_text_alone_is_what_the_tokenizer_makes_of_it(self, processor: Any, chat_tokenizer: Any) -> None:
        talk = [{"role": "system", "content": "be kind"}, user(text("hello "), text("there")), assistant("yes"), user()]
        talk[-1] = {"role": "user", "content": "and?"}
        plain = [{**turn, "content": "hello there"} if i == 1 else turn for i, turn in enumerate(talk)]
        expected = chat_tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
        inputs = processor(talk)
        assert inputs["input_ids"][0].tolist() == expected
        assert set(inputs) == {"input_ids", "attention_mask"}

    def test_placeholders_stand_where_the_parts_are(self, processor: Any, image: Any, chat_tokenizer: Any) -> None:
        ids = processor([user(image, text("see "), BOX, text("?"))])["input_ids"][0].tolist()
        mark = processor.region_token_id
        start = chat_tokenizer.encode("<|im_start|>user\n")
        assert ids[: len(start)] == start
        assert ids[len(start) :] == [
            mark, mark, mark, *chat_tokenizer.encode("see "), mark, mark,
            *chat_tokenizer.encode("?<|im_end|>\n<|im_start|>assistant\n"),
        ]  # fmt: skip

    def test_ids_of_earlier_turns_never_change(self, processor: Any, talks: Any) -> None:
        talk = [*talks[2], assistant("a circle"), user(BOX, text("?"))]
        known: list[int] = []
        for stop in (1, 3, 5):
            ids = processor(talk[:stop])["input_ids"][0].tolist()
            assert ids[: len(known)] == known
            known = ids

    def test_ragged_batches_are_padded_left_for_generation_and_right_for_training(
        self, processor: Any, chat_tokenizer: Any
    ) -> None:
        talks = [[{"role": "user", "content": "hello you"}, assistant("yes")], [user(text("?")), assistant("no")]]
        left, right = processor(talks), processor(talks, return_labels=True)
        pads = int((left["attention_mask"][1] == 0).sum())
        assert pads > 0
        assert (left["input_ids"][1, :pads] == chat_tokenizer.pad_token_id).all()
        assert (right["attention_mask"][1, -pads:] == 0).all() and (right["labels"][1, -pads:] == IGNORED).all()
        assert torch.equal(left["input_ids"][1, pads:], right["input_ids"][1, :-pads])

    def test_generation_prompt(self, processor: Any, chat_tokenizer: Any) -> None:
        header = chat_tokenizer.encode("<|im_start|>assistant\n")

        def ends_open(talk: Any, **options: Any) -> bool:
            return processor(talk, **options)["input_ids"][0, -len(header) :].tolist() == header

        assert ends_open([user(text("a"))]) and not ends_open([user(text("a")), assistant("b")])
        assert not ends_open([user(text("a"))], add_generation_prompt=False)
        assert ends_open([user(text("a")), assistant("b")], add_generation_prompt=True)

    def test_sentencepiece_puts_no_space_behind_a_region(self) -> None:
        words = ["<unk>", "<s>", "</s>", "\n", "▁", "▁a", "a", "▁?", "?"]
        vocabulary = {word: i for i, word in enumerate(words)}
        core = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "?")], unk_token="<unk>"))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Replace("▁", " ")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
        assert tokenizer.convert_ids_to_tokens(encode_piece(tokenizer, "a ?", first=True)) == ["▁a", "▁?"]
        assert tokenizer.convert_ids_to_tokens(encode_piece(tokenizer, "a ?", first=False)) == ["a", "▁?"]
        assert tokenizer.convert_ids_to_tokens(encode_piece(tokenizer, " ?", first=False)) == ["▁?"]


class TestRows:
    def test_rows_of_several_images_and_conversations(self, processor: Any, talks: Any) -> None:
        inputs = processor(talks)
        assert inputs["pixel_values"].shape == (3, 3, 64, 64)
        # The second talk names a region of its second image first: rows go image by image, the index tells.
        assert inputs["region_image_index"].tolist() == [0, 0, 1, 2, 2]
        assert inputs["part_index"].tolist() == [-1, 0, 1, -2, -3, 3, 2, 4]
        first = inputs["input_points"][3, 0] / 64 * torch.tensor([50.0, 50.0])
        torch.testing.assert_close(first, torch.tensor([2.0, 2.0]))
        assert (inputs["input_ids"] == processor.region_token_id).sum() == 3 * 3 + 5 * 2

    def test_regions_beside_the_messages(self, processor: Any, pictures: Any) -> None:
        regions = [{"box": [0, 0, 8, 8], "category": "a"}, {"box": [8, 8, 30, 30]}]
        talk = [
            user(text("compare "), {"type": "region", "index": 1}, text(" with "), {"type": "region", "index": 0}),
            assistant("done"),
            user(text("again "), {"type": "region", "index": 1}),
        ]
        inputs = processor(talk, images=pictures[0], regions=regions)
        assert inputs["part_index"].tolist() == [-1, 0, 1, 0]  # the image stands before the text; one row per region
        torch.testing.assert_close(inputs["input_points"][0, 0], torch.tensor([8.0, 8.0]) * 64 / 40)
        in_order = [user(text("x"), {"type": "region"}, {"type": "region"})]
        points = processor(in_order, images=[pictures[0]], regions=regions)["input_points"]
        assert points[1, 0, 0] == points.new_tensor(8 * 64 / 40)
        batch = processor([talk, in_order], images=[pictures[0], [pictures[1]]], regions=[regions, regions])
        assert batch["region_image_index"].tolist() == [0, 0, 1, 1]
        assert batch["part_index"].tolist() == [-1, 0, 1, 0, -2, 2, 3]

    def test_pictures_for_image_parts(self, processor: Any, pictures: Any, tmp_path: Path) -> None:
        pictures[1].save(tmp_path / "a.png")
        parts = [{"type": "image"}, {"type": "image", "path": str(tmp_path / "a.png")}, {"type": "image"}]
        inputs = processor([user(*parts)], images=[pictures[0], pictures[2]])
        assert inputs["original_sizes"].tolist() == [[40, 40], [30, 60], [50, 25]]

    def test_callers_messages_stay_as_they_are(self, processor: Any, image: Any) -> None:
        talk = [user(image, dict(BOX))]
        processor(talk, return_tensors="np")
        assert talk == [user(image, dict(BOX))]


class TestLabels:
    def labelled(self, processor: Any, talk: Any, **options: Any) -> str:
        inputs = processor(talk, return_labels=True, **options)
        labels = inputs["labels"][0]
        kept = labels != IGNORED
        assert torch.equal(labels[kept], inputs["input_ids"][0][kept])
        assert not (labels == processor.region_token_id).any()
        return processor.decode(labels[kept])

    def test_assistant_turns_and_their_ends(self, processor: Any, image: Any) -> None:
        talk = [{"role": "system", "content": "be kind"}, user(image, BOX, text("?")), assistant("a red square"),
                user(text("sure?")), {"role": "assistant", "content": [text("yes "), BOX, text(" is")]}]  # fmt: skip
        assert self.labelled(processor, talk) == "a red square<|im_end|>\nyes  is<|im_end|>\n"
        marked = self.labelled(processor, talk, chat_template="chatml")
        assert marked == "a red square<|im_end|>yes  is<|im_end|>"
        for template in (None, "chatml"):
            with_labels = processor(talk, return_labels=True, chat_template=template)["input_ids"]
            assert torch.equal(with_labels, processor(talk, chat_template=template)["input_ids"])

    def test_the_bundled_plain_template(self, make: Any, bare_tokenizer: Any, image: Any) -> None:
        processor = make(bare_tokenizer, chat_template="plain")
        talk = [
            {"role": "system", "content": "Be kind."},
            user(image, text("What is "), BOX, text("?")),
            assistant("it"),
        ]
        ids = processor(talk)["input_ids"][0]
        mark = "\ufffd"
        assert processor.decode(ids) == (
            f"<|endoftext|>Be kind.\nUser: {mark * 3}What is {mark * 2}?\nAssistant: it<|endoftext|>\n"
        )
        assert self.labelled(processor, talk) == " it<|endoftext|>"
        assert processor.decode(processor(talk[:2])["input_ids"][0]).endswith("?\nAssistant:")

    def test_a_template_that_rewrites_history(self, make: Any, image: Any) -> None:
        template = (
            "{% for m in messages %}<|im_start|>{{ m.role + ' ' }}{% if loop.last %}{{ 'now ' }}{% endif %}"
            "{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
        )
        processor = make(chat_template=template)
        talk = [user(text("a")), assistant("b"), user(text("c")), assistant("d")]
        assert processor(talk)["input_ids"].shape[0] == 1
        with pytest.raises(InputError, match="writes earlier turns anew.*generation.*chatml"):
            processor(talk, return_labels=True)

    def test_nothing_to_learn(self, processor: Any) -> None:
        with pytest.raises(InputError, match="conversation 1: labels need an assistant turn"):
            processor([[user(text("a")), assistant("b")], [user(text("a"))]], return_labels=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("talk", "given", "problem"),
        [
            ([], {}, "conversation is empty"),
            ([[]], {}, "conversation is empty"),
            ([user(text("a"), BOX)], {}, "message 0: a region before any image"),
            ([{"role": "robot", "content": "a"}], {}, "unknown role 'robot'; roles are system, user, assistant, tool"),
            ([{"content": "a"}], {}, "message 0: expected"),
            ([{"role": "user"}], {}, '"content" must be text or a list of parts'),
            ([user({"type": "video"})], {}, "unknown part type 'video'"),
            ([user({"type": "text"})], {}, 'a text part needs "text"'),
            ([user({"type": "image"})], {}, "more image parts than images: 0 given"),
            ([user({"type": "image", "url": "http://x"})], {}, "images are not fetched here"),
            ([user({"type": "image"})], {"images": 2}, "2 images given, but 1 image parts need one"),
            ([user({"type": "region"})], {"images": 1}, "region part 0 has no region: 0 given"),
            ([user({"type": "region"}, {"type": "region"})], {"images": 1, "regions": 1}, "part 1 has no region"),
            ([user({"type": "region", "index": 3})], {"images": 1, "regions": 2}, "part 3 has no region: 2 given"),
            ([user({"type": "region", "index": 1})], {"images": 1, "regions": 2}, r"never at region 0\): leave it out"),
            ([user({**BOX, "index": 0})], {"images": 1, "regions": 1}, 'either an "index" or a form'),
            ([user({**BOX, "image": 1})], {"images": 1}, "must number an image before it, 0 to 0"),
            ([user({**BOX, "bax": 1})], {"images": 1}, 'unknown key "bax"; did you mean "box"'),
            ([user({"type": "region", "box": [50, 50, 60, 60]})], {"images": 1}, "region 0: box .* wholly outside"),
            ([user(text("a <|reserved_1|> b"))], {}, "text contains '<|reserved_1|>', which keeps the place"),
            ([user(text("a"))], {"padding_side": "top"}, "padding_side must be"),
            ([user(text("half \ud83d"))], {}, "message 0: the text is not valid Unicode: character 5 is half of one"),
            ([[user(text("a"))], [user(text("b"), BOX)]], {}, "conversation 1: message 0: a region before any image"),
            ([[user(text("a"))]], {"images": 2}, "images: got 2 for 1 conversations"),
        ],
    )  # fmt: skip
    def test_one_clear_error(self, talk: Any, given: Any, problem: str, processor: Any, pictures: Any) -> None:
        options = dict(given)
        if "images" in given:
            options["images"] = pictures[: given["images"]]
        if "regions" in given:
            options["regions"] = [{"box": [1, 1, 9, 9]}] * given["regions"]
        with pytest.raises(InputError, match=problem.replace("|", r"\|")):
            processor(talk, **options)

    def test_unused_regions_may_be_allowed(self, processor: Any, pictures: Any) -> None:
        regions = [{"box": [1, 1, 9, 9]}, {"box": [2, 2, 5, 5]}]
        talk = [user({"type": "region", "index": 1})]
        inputs = processor(talk, images=pictures[0], regions=regions, allow_unused_regions=True)
        assert inputs["input_points"].shape[0] == 1

    def test_no_chat_template(self, make: Any, bare_tokenizer: Any) -> None:
        with pytest.raises(InputError, match="no chat template: .*--chat-template FILE.*--chat-template plain"):
            make(bare_tokenizer)([user(text("a"))])
        assert make(bare_tokenizer)([user(text("a"))], chat_template="plain")["input_ids"].shape[0] == 1
        with pytest.raises(InputError, match=r"'nowhere.jinja' is neither a bundled one \(plain, chatml\)"):
            make(bare_tokenizer, chat_template="nowhere.jinja")

    def test_too_long(self, make: Any) -> None:
        with pytest.raises(InputError, match=r"takes \d\d tokens, but the LLM reads 9: leave out"):
            make(max_length=9)([user(text("a" * 30))])
        with pytest.raises(InputError, match=r"the LLM reads 5"):
            make()([user(text("a" * 30))], max_length=5)

    def test_what_the_template_refuses(self, make: Any, image: Any) -> None:
        template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InputError, match="does not take these messages: roles must alternate"):
            make(chat_template=template)([user(text("a"))])
        for template in ("{{ messages[0].role }}", "{{ messages[0].content + messages[0].content }}"):
            with pytest.raises(InputError, match="drops or repeats what a message contains"):
                make(chat_template=template)([user(image, BOX)])
        with pytest.raises(InputError, match="does not take these messages: division by zero"):
            make(chat_template="{{ 1 / 0 }}")([user(text("a"))])

    def test_a_template_file_that_is_no_text(self, make: Any, tmp_path: Path) -> None:
        (tmp_path / "template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
        with pytest.raises(InputError, match="nor a readable file"):
            make(chat_template=str(tmp_path / "template.jinja"))

    def test_a_tokenizer_without_its_files(self, make: Any) -> None:
        empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|end|>")
        with pytest.raises(InputError, match="knows no text: its files, such as tokenizer.json, are missing"):
            make(empty, chat_template="plain")


def test_users_text_cannot_pose_as_a_part(processor: Any, image: Any) -> None:
    tricky = user(image, text("\ue0000\ue000 and \ue001"), BOX)
    inputs = processor([tricky])
    assert (inputs["input_ids"] == processor.region_token_id).sum() == 3 + 2


def test_round_trip(make: Any, bare_tokenizer: Any, image: Any, tmp_path: Path) -> None:
    processor = make(bare_tokenizer, chat_template="plain", max_length=99)
    processor.save_pretrained(tmp_path)
    again = TapLlmProcessor.from_pretrained(tmp_path)
    talk = [user(image, text("a "), BOX), assistant("b")]
    one, two = processor(talk, return_labels=True), again(talk, return_labels=True)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert again.max_length == 99 and set(again.model_input_names) >= set(one) - {"labels"}
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == bare_tokenizer.eos_token


def test_the_placeholder_must_have_an_embedding(join: Any, chat_tokenizer: Any) -> None:
    model, processor = join("llama", "lite")
    with pytest.raises(InputError, match="region token 999 is beyond the LLM's 320 embeddings"):
        TapLlmProcessor.for_model(model, processor, chat_tokenizer, region_token=999)
    chosen = TapLlmProcessor.for_model(model, processor, chat_tokenizer, region_token="<|reserved_0|>")
    assert chosen.region_token_id == model.config.region_token_id == model.config.image_token_id == 3
    assert (chosen.tokens_per_region, chosen.tokens_per_image, chosen.max_length) == (1, 0, 512)


def test_half_of_a_character_is_refused(make: Callable[..., TapLlmProcessor]) -> None:
    with pytest.raises(InputError, match="message 0: the text is not valid Unicode: character 6"):
        make()([user(text("hello \ud83d"))])


def test_a_tokenizer_without_words_is_refused(make: Callable[..., TapLlmProcessor]) -> None:
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(InputError, match="knows no text: its files"):
        make(empty, chat_template="plain")
