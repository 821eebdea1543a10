"""Dialogues: what is read anew, streaming, saving, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tap_llm import InputError
from tap_llm.region_llm.session import ChatSession

Join = Callable[..., Any]
BOX, POINT = {"box": [3, 4, 30, 25]}, {"points": [[12, 10]]}


@pytest.fixture
def llama(join: Join) -> Any:
    return join("llama")


@pytest.fixture
def photo(pictures: list[Image.Image], tmp_path: Path) -> Path:
    pictures[1].save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def plain_answer(session: ChatSession, **options: Any) -> str:
    """What the model says to the last question of a session, computed from the beginning."""
    inputs = session.processor(session.messages[:-1], chat_template=session.chat_template)
    out = session.model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=session._ends(), **options)
    answer = session.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


class TestTurns:
    @pytest.mark.parametrize("projector", ["lite", "full"])
    def test_answers_are_those_of_the_whole_conversation(self, projector: str, join: Join, pictures: Any) -> None:
        session = ChatSession(*join("llama", projector), max_new_tokens=8)
        session.add_image(pictures[0])
        assert session.add_region(BOX) == 1
        answers = [session.ask("What is this?")]
        assert answers[0] == plain_answer(session)
        assert session.add_image(pictures[1]) == 1
        assert session.add_region(POINT) == 2
        assert session.add_region(POINT, image=0) == 3
        for question in ("And these?", "Why is region 1 there?"):
            answers.append(session.ask(question))
            assert answers[-1] == plain_answer(session)
        assert len(set(answers)) == 3
        assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3

    @pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
    def test_other_llms(self, family: str, join: Join, pictures: Any, chat_tokenizer: Any) -> None:
        session = ChatSession(*join(family, tokenizer=chat_tokenizer), max_new_tokens=8)
        session.add_image(pictures[0])
        for question in ("What?", "Where?"):
            session.add_region(BOX)
            assert session.ask(question) == plain_answer(session)

    def test_regions_are_announced_by_number(self, llama: Any, pictures: Any) -> None:
        session = ChatSession(*llama, system="Be brief.", max_new_tokens=2)
        session.add_image(pictures[0])
        session.add_region(BOX)
        session.add_region(POINT)
        session.ask("What are they?")
        system, user, _ = session.messages
        assert system == {"role": "system", "content": "Be brief."}
        kinds = [part.get("text", part["type"]) for part in user["content"]]
        assert kinds == ["image", "region 1: ", "region", "\n", "region 2: ", "region", "\n", "What are they?"]

    def test_text_alone(self, llama: Any) -> None:
        session = ChatSession(*llama, max_new_tokens=4)
        assert session.ask("hello") == session.messages[1]["content"][0]["text"]

    def test_a_picture_without_regions_costs_nothing(self, llama: Any, pictures: Any) -> None:
        session = ChatSession(*llama, max_new_tokens=8)
        session.add_image(pictures[0])
        assert session.ask("hello") == plain_answer(session)
        session.add_region(BOX)
        assert session.ask("And this?") == plain_answer(session)


class TestCache:
    def test_only_the_new_part_is_read(self, llama: Any, pictures: Any) -> None:
        model, processor = llama
        session = ChatSession(model, processor, max_new_tokens=8)
        read: list[int] = []
        model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
        session.add_image(pictures[0])
        session.add_region(BOX)
        session.ask("What is this?")
        first = read[0]
        read.clear()
        session.add_region(POINT)
        session.ask("And this?")
        whole = processor(session.messages[:-1])["input_ids"].shape[1]
        assert read[0] < whole - first + 12  # at most the end of the last answer is read again

    def test_a_template_that_rewrites_earlier_turns(self, llama: Any, pictures: Any) -> None:
        template = (
            "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role + ': ' + m.content + '\\n' }}"
            "{% else %}{{ 'said\\n' }}{% endif %}{% endfor %}{{ 'Assistant:' }}"
        )
        session = ChatSession(*llama, chat_template=template, max_new_tokens=8)
        session.add_image(pictures[0])
        for question in ("What is this?", "And this?", "And that?"):
            session.add_region(BOX)
            assert session.ask(question) == plain_answer(session)

    def test_a_sliding_window_that_forgot(self, make_llm: Any, tap: Any, chat_tokenizer: Any, pictures: Any) -> None:
        from tap_llm import TapImageProcessor, TapLlmForConditionalGeneration, TapLlmProcessor

        llm = make_llm("gemma2", sliding_window=16)
        model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, llm, "lite")
        processor = TapLlmProcessor.for_model(model, TapImageProcessor(size={"longest_edge": 64}), chat_tokenizer)
        session = ChatSession(model, processor, max_new_tokens=8)
        session.add_image(pictures[0])
        for question in ("What is this?", "And this?"):
            session.add_region(BOX)
            assert session.ask(question) == plain_answer(session)

    def test_beams(self, llama: Any, pictures: Any) -> None:
        session = ChatSession(*llama, max_new_tokens=8)
        session.add_image(pictures[0])
        for question, options in (("What?", {"num_beams": 3}), ("Where?", {}), ("Why?", {"num_beams": 2})):
            session.add_region(BOX)
            assert session.ask(question, **options) == plain_answer(session, **options)

    def test_after_an_interruption(self, llama: Any, pictures: Any) -> None:
        session = ChatSession(*llama, max_new_tokens=8)
        session.add_image(pictures[0])
        session.ask("What?")

        def stop(_: str) -> None:
            raise KeyboardInterrupt

        session.add_region(BOX)
        with pytest.raises(KeyboardInterrupt):
            session.ask("Tell me more about this", stream=stop)
        assert len(session.messages) == 2
        assert session.ask("And this?") == plain_answer(session)
        assert session.messages[2]["content"][1]["box"] == BOX["box"]

    def test_tap_sees_each_picture_once(self, llama: Any, pictures: Any) -> None:
        model, processor = llama
        session = ChatSession(model, processor, max_new_tokens=2)
        encoded: list[int] = []
        hook = model.model.tap.vision_encoder.register_forward_pre_hook(lambda _, args: encoded.append(1))
        for picture in pictures[:2]:
            session.add_image(picture)
            for _ in range(2):
                session.add_region(BOX)
                session.ask("What is this?")
        hook.remove()
        assert len(encoded) == 2


class TestStreaming:
    def test_pieces_make_up_the_answer(self, llama: Any, pictures: Any) -> None:
        session, pieces = ChatSession(*llama, max_new_tokens=12), list[str]()
        session.add_image(pictures[0])
        session.add_region(BOX)
        answer = session.ask("What is this?", stream=pieces.append)
        assert "".join(pieces).strip() == answer and all(pieces)


class TestFiles:
    def test_a_saved_conversation_goes_on(self, llama: Any, photo: Path, pictures: Any, tmp_path: Path) -> None:
        session = ChatSession(*llama, max_new_tokens=8)
        session.add_image(photo)
        mask = np.zeros((30, 60), dtype=bool)
        mask[5:20, 10:30] = True
        Image.fromarray(mask).save(tmp_path / "mask.png")
        session.add_region({"mask": tmp_path / "mask.png"})
        session.ask("What is this?")
        session.add_image(pictures[2])
        session.add_region(BOX, image=0)
        session.save(tmp_path / "talk.json")
        record = json.loads((tmp_path / "talk.json").read_text())
        image, _, region, *_ = record["messages"][0]["content"]
        assert image == {"type": "image", "path": "photo.png"}
        assert region["mask"]["size"] == [30, 60] and region["image"] == 0
        assert record["messages"][2]["content"][0] == {"type": "image", "path": "talk.2.0.png"}

        (tmp_path / "mask.png").unlink()
        moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
        loaded = ChatSession.load(moved / "talk.json", *llama, max_new_tokens=8)
        assert loaded.ask("And this?") == session.ask("And this?")
        loaded.save(moved / "again.json")
        assert json.loads((moved / "again.json").read_text())["messages"][:2] == record["messages"][:2]

    def test_bad_files(self, llama: Any, tmp_path: Path) -> None:
        session = ChatSession(*llama)
        with pytest.raises(InputError, match="cannot write .*nowhere"):
            session.save(tmp_path / "nowhere" / "talk.json")
        with pytest.raises(InputError, match="cannot read"):
            ChatSession.load(tmp_path / "talk.json", *llama)
        image = {"role": "user", "content": [{"type": "image", "path": "gone.png"}]}
        texts = {"[": "not a saved", '{"messages": [{"role": "user"}]}': "not a saved",
                 '{"messages": 3}': "not a saved", json.dumps({"messages": [image]}): "there is no file"}  # fmt: skip
        for text, message in texts.items():
            (tmp_path / "talk.json").write_text(text)
            with pytest.raises(InputError, match=message):
                ChatSession.load(tmp_path / "talk.json", *llama)


class TestBadInput:
    def test_regions_that_cannot_be(self, llama: Any, pictures: Any) -> None:
        session = ChatSession(*llama)
        with pytest.raises(InputError, match="add an image first"):
            session.add_region(BOX)
        session.add_image(pictures[0])
        for region, image, message in (
            (BOX, 1, "numbered 0 to 0"),
            ({"box": [90, 90, 99, 99]}, None, "outside"),
            ({"box": [1, 1]}, None, "four numbers"),
            ({"mask": "gone.png"}, None, "there is no file 'gone.png'"),
            ("box", None, "expected a dict"),
        ):
            with pytest.raises(InputError, match=message):
                session.add_region(region, image)  # type: ignore[arg-type]
        session.add_region(BOX)
        assert session.ask("What is region 1?", max_new_tokens=2) is not None

    def test_questions_that_cannot_be(self, join: Join, llama: Any, pictures: Any, bare_tokenizer: Any) -> None:
        session = ChatSession(*llama, max_new_tokens=2)
        session.add_image(pictures[0])
        session.add_region(BOX)
        with pytest.raises(InputError, match="empty"):
            session.ask(" ")
        token = session.processor.tokenizer.convert_ids_to_tokens(session.processor.region_token_id)
        with pytest.raises(InputError, match="keeps the place of regions"):
            session.ask(f"what is {token}")
        with pytest.raises(InputError, match="takes .* tokens, but the LLM reads 512"):
            session.ask("so " * 600)
        assert session.messages == []
        with pytest.raises(InputError, match="--chat-template plain"):
            ChatSession(*join("gpt2", tokenizer=bare_tokenizer)).ask("hello")

    def test_answers_end_where_the_llm_does(self, llama: Any) -> None:
        model, processor = llama
        session = ChatSession(model, processor, eos_token_id=None)
        length = processor([{"role": "user", "content": "yes"}])["input_ids"].shape[1]
        processor.max_length = length + 5
        session.ask("yes")
        assert len(session._cache._ids) == length + 5
        with pytest.raises(InputError, match=f"but the LLM reads {length + 5}"):
            session.ask("yes")
        assert len(session.messages) == 2
