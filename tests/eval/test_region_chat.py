"""Questions about regions: what is asked, what takes the place of regions, how answers are scored, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from region_chat import write_llm

from eval import region_chat
from eval.base import run
from eval.chat_model import ChatModel, Reading
from eval.chat_scores import CONDITIONS, GROUPS, score_answers
from eval.command import cli
from eval.region_chat import FIRST_SEED, RegionChat, chat_table, controls, main, questions_of
from eval.talk_sources import TalkSource, picture_of, shuffled
from tap_llm.data.instruction_kinds import KINDS
from tap_llm.data.instructions import InstructionSamples
from tap_llm.data.scenes import SceneComposer
from tap_llm.errors import InputError
from tap_llm.loading import load_tap
from tap_llm.region_llm.adapters import save_adapter
from tap_llm.region_llm.features import RegionFeatures
from tap_llm.region_llm.llm_loading import load_llm, load_llm_tokenizer
from tap_llm.region_llm.modeling_tap_llm import TapLlmForConditionalGeneration
from tap_llm.region_llm.processing_tap_llm import TapLlmProcessor

SIZE = (96, 64)
COUNT = 12


@pytest.fixture(scope="module")
def source() -> TalkSource:
    return TalkSource("shapes", SceneComposer(), COUNT, seed=FIRST_SEED, size=SIZE)


def made_up_features(image: Any, count: int) -> RegionFeatures:
    """Every region of every picture has features of its own."""
    rng = np.random.default_rng(int(np.asarray(image, dtype=np.int64).sum()))
    tensors = [torch.from_numpy(rng.random(shape)).float() for shape in ((count, 3), (count, 4), (count, 2, 3))]
    return RegionFeatures(*tensors, torch.zeros(1, 0, 3), torch.zeros(count, dtype=torch.long))


class Fake:
    """Knows the answers by question and features; else says something wrong. Stands in for [`ChatModel`]."""

    max_new_tokens, concepts = 8, ("circle",)

    def __init__(self, source: TalkSource, constant: str | None = None) -> None:
        self.constant, self.read_pictures, self.calls = constant, 0, 0
        self.known: dict[tuple[str, str], str] = {}
        for talk in source:
            features = made_up_features(talk.scene.image, len(talk.scene.things))
            for messages, question in questions_of(talk.conversations):
                self.known[self._key(messages, features)] = question.answer

    def _key(self, messages: Any, features: RegionFeatures) -> tuple[str, str]:
        return json.dumps(messages), str(features.semantic_tokens.tolist())

    def read(self, image: Any, regions: Any) -> Reading:
        self.read_pictures += 1
        features = made_up_features(image, len(regions))
        return Reading(features, ["circle" for _ in regions])

    def answer(self, dialogues: Any, features: Any) -> list[str]:
        self.calls += 1
        pairs = zip(dialogues, features, strict=True)
        return [self.constant or self.known.get(self._key(*pair), "nonsense") for pair in pairs]


def predictions(source: TalkSource, fake: Fake) -> tuple[RegionChat, list[dict[str, Any]]]:
    benchmark = RegionChat(fake, [source])  # type: ignore[arg-type]
    return benchmark, [benchmark.truth(talk) | benchmark.predict(talk) | {"id": talk.id} for talk in source]


def test_right_answers_need_the_right_regions(source: TalkSource) -> None:
    fake = Fake(source)
    benchmark, found = predictions(source, fake)
    scores = benchmark.score(found)
    assert not scores.not_measured
    groups = scores.metrics["shapes"]["groups"]
    assert set(groups) >= {"attributes", "names", "relations", "size comparison", "yes or no", "counting"}
    for metrics in [*groups.values(), *scores.metrics["shapes"]["kinds"].values()]:
        assert metrics["exact"] == 1.0
        assert [metrics[name] for name in CONDITIONS[1:]] == [0.0, 0.0, 0.0]
        assert 0 < metrics["chance"] <= 1
    truths = [q["truth"]["name"] for p in found for q in p["questions"] if q["kind"] == "name"]
    concept = truths.count("circle") / len(truths)
    assert groups["names"]["concept_accuracy"] == concept
    assert groups["names"]["ratio"] == (1 / concept if concept else None)
    assert groups["descriptions"]["says_name"] == groups["descriptions"]["true_texture"] == 1.0
    assert sum(metrics["questions"] for metrics in groups.values()) == sum(len(p["questions"]) for p in found)
    assert fake.read_pictures == COUNT + 1  # each once: the other picture of one scene is the next scene
    assert fake.calls == COUNT  # all questions and controls of a scene at once


def test_a_constant_answer_gives_its_share(source: TalkSource) -> None:
    benchmark, found = predictions(source, Fake(source, constant="Yes."))
    groups = benchmark.score(found).metrics["shapes"]["groups"]
    answers = [q["answer"] for p in found for q in p["questions"] if q["kind"] in GROUPS["yes or no"]]
    share = answers.count("yes") / len(answers)
    assert 0.3 < share < 0.7
    assert [groups["yes or no"][key] for key in ("exact", *CONDITIONS[1:])] == [share] * 4
    assert groups["yes or no"]["chance"] == 0.5
    assert groups["names"]["exact"] == groups["attributes"]["exact"] == groups["counting"]["exact"] == 0.0


def test_scenes_are_not_those_of_training() -> None:
    composer = SimpleNamespace(scene=lambda seed, size: seeds.append(seed) or SceneComposer().scene(seed, size))
    seeds: list[int] = []
    for index in range(20):
        InstructionSamples(composer, 100, size=SIZE).example(index)  # type: ignore[arg-type]
    assert len(set(seeds)) >= 20 and max(seeds) < FIRST_SEED


def test_every_kind_is_in_one_group() -> None:
    assert sorted(kind for kinds in GROUPS.values() for kind in kinds) == sorted(KINDS)


def test_history_is_the_true_one(source: TalkSource) -> None:
    talk = next(talk for talk in source if len(talk.conversations[0].questions) > 2)
    asked = list(questions_of(talk.conversations[:1]))
    for number, (messages, question) in enumerate(asked):
        assert [message["role"] for message in messages] == ["user", *["assistant", "user"] * number]
        assert [m["content"][0]["text"] for m in messages if m["role"] == "assistant"] == [
            earlier.answer for _, earlier in asked[:number]
        ]
        follows = talk.conversations[0].messages[len(messages)]
        assert follows["role"] == "assistant" and follows["content"][0]["text"] == question.answer


# Controls


def test_controls_change_every_region() -> None:
    own, other = made_up_features(np.array([1]), 5), made_up_features(np.array([2]), 3)
    own.global_tokens, other.global_tokens = torch.rand(1, 4, 6), torch.rand(1, 4, 6)
    found = controls(own, other, np.random.default_rng(0))
    assert tuple(found) == CONDITIONS and found["true"] is own
    for name, features in found.items():
        assert [len(features), features.num_images] == [5, 1] and features.boxes.shape == own.boxes.shape
        assert features.roi.shape == own.roi.shape and features.global_tokens.shape == own.global_tokens.shape
        moved = (features.semantic_tokens != own.semantic_tokens).any(1) & (features.boxes != own.boxes).any(1)
        assert moved.all() == (name != "true")
    own_rows = {tuple(row) for row in own.semantic_tokens.tolist()}
    other_rows = {tuple(row) for row in other.semantic_tokens.tolist()}
    assert {tuple(row) for row in found["same picture"].semantic_tokens.tolist()} == own_rows
    assert {tuple(row) for row in found["other picture"].semantic_tokens.tolist()} <= other_rows
    alike = found["no region"]
    torch.testing.assert_close(alike.boxes, other.boxes.mean(0).expand(5, 4))
    assert (alike.roi == alike.roi[:1]).all() and (alike.global_tokens == alike.global_tokens[:, :1]).all()


def test_a_region_alone_cannot_be_shuffled() -> None:
    assert set(controls(made_up_features(1, 1), made_up_features(2, 3), np.random.default_rng(0))) == {
        "true", "other picture", "no region",
    }  # fmt: skip
    for length in range(2, 8):
        order = shuffled(np.random.default_rng(length), length)
        assert sorted(order) == list(range(length)) and all(place != index for index, place in enumerate(order))


# Scores


def row(kind: str, answer: str, said: str | None, choices: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    truth = {"name": "ring", "colours": ["red"], "shape": {"shape": "ring", "texture": "striped", "size": "small"}}
    said_by = {"true": said, "same picture": None, "other picture": "no", "no region": "yes"}
    return {"kind": kind, "answer": answer, "choices": choices, "said": said_by, "concept": None, "truth": truth} | more


def test_scores_by_hand() -> None:
    rows = [
        row("is_name", "yes", "Yes", ("yes", "no")),
        row("is_place", "no", "yes", ("yes", "no")),
        row("count", "3", "3.", ("0", "1", "2", "3")),
        *(row("place", answer, "left") for answer in ("left", "left", "top", "right")),
        row("name", "a ring", "the ring", concept="Ring"),
        row("name", "a ring", "a star", concept="Ring"),
        row("describe", "a small striped red ring", "a large striped blue ring"),
    ]
    groups = score_answers(rows)["groups"]
    assert groups["yes or no"] == {
        "questions": 2, "exact": 0.5, "same picture": None, "other picture": 0.5, "no region": 0.5, "chance": 0.5,
    }  # fmt: skip
    assert (groups["counting"]["exact"], groups["counting"]["chance"]) == (1.0, 0.25)
    assert (groups["places"]["exact"], groups["places"]["chance"]) == (0.5, 0.5)
    assert (groups["names"]["concept_accuracy"], groups["names"]["ratio"]) == (1.0, 0.5)
    words = {key: groups["descriptions"][key] for key in ("says_name", "says_colour", "true_texture", "true_size")}
    assert words == {"says_name": 1.0, "says_colour": 0.0, "true_texture": 1.0, "true_size": 0.0}
    table = chat_table(groups).splitlines()
    assert table[0].split() == ["questions", "exact", "chance", "same", "picture", "other", "picture", "no", "region"]
    assert any(line.split()[-6:] == ["2", "0.500", "0.500", "-", "0.500", "0.500"] for line in table)
    assert "names: concept_accuracy 1.000, ratio 0.500" in table


def test_without_concepts_names_have_no_ratio(source: TalkSource) -> None:
    benchmark = RegionChat(SimpleNamespace(max_new_tokens=8), [source])  # type: ignore[arg-type]
    asked = {"questions": [{**row("name", "a ring", "a ring"), "asked": "What is region 1?"}]}
    scores = benchmark.score([{"id": "1", "source": "shapes", "regions": 1, "names": ["ring"], **asked}])
    [case] = scores.cases
    assert (case["score"], case["text"]) == (1.0, "right: What is region 1? a ring")
    assert scores.metrics["shapes"]["groups"]["names"]["ratio"] is None
    assert "--concepts" in scores.not_measured["names/concept_accuracy"]


def test_a_scene_that_fails_counts_as_wrong(source: TalkSource, tmp_path: Path) -> None:
    fake = Fake(source)
    read = fake.read

    def fails_once(image: Any, regions: Any) -> Reading:
        if fake.read_pictures == 4:
            fake.read_pictures = 99
            raise InputError("out of order")
        return read(image, regions)

    fake.read = fails_once  # type: ignore[method-assign]
    finished = run(RegionChat(fake, [source]), tmp_path / "r.json", {"name": "fake"}, report=lambda line: None)  # type: ignore[arg-type]
    assert finished is not None
    [fault] = finished.results["faults"]
    wrong = [prediction for prediction in finished.predictions if "fault" in prediction]
    assert fault == f"{wrong[0]['id']}: out of order" and len(wrong) == 1
    asked = [len(prediction["questions"]) for prediction in finished.predictions]
    right = 1 - len(wrong[0]["questions"]) / sum(asked)
    groups = finished.results["metrics"]["shapes"]["groups"].values()
    assert sum(group["exact"] * group["questions"] for group in groups) / sum(asked) == pytest.approx(right)
    assert finished.results["examples"] == COUNT


# The real thing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an adapter of tap-tiny and a random language model."""
    path = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    write_llm(path / "llm")
    tap, tap_processor, _ = load_tap("tap-tiny", dtype="float32")
    model = TapLlmForConditionalGeneration.from_tap_and_llm(tap, load_llm(path / "llm"), "base")
    tokenizer = load_llm_tokenizer(path / "llm")
    processor = TapLlmProcessor.for_model(model, tap_processor, tokenizer, "plain")
    save_adapter(model, path / "adapter", processor)
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatModel:
    return ChatModel.from_pretrained(str(folder / "adapter"), device="cpu", max_new_tokens=5, batch_size=3)


def test_answers_are_those_to_the_picture(chat: ChatModel, source: TalkSource) -> None:
    """Each question alone, with its picture and boxes, through the plain processor."""
    scene = source[0].scene
    image, regions = picture_of(scene)
    reading = chat.read(image, regions)
    asked = [messages for messages, _ in questions_of(source[0].conversations)][:5]
    answers = chat.answer(asked, [reading.features] * len(asked))
    assert len(set(answers)) > 1
    for messages, answer in zip(asked[-2:], answers[-2:], strict=True):
        inputs = chat.processor([messages], images=[[image]], regions=[regions], allow_unused_regions=True)
        ids = chat.model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        said = chat.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == answer


def test_controls_change_what_the_language_model_reads(chat: ChatModel, source: TalkSource) -> None:
    talk = source[0]
    own, other = (chat.read(*picture_of(scene)).features for scene in (talk.scene, talk.other[1]))
    versions = controls(own, other, np.random.default_rng(0))
    messages = next(messages for messages, _ in questions_of(talk.conversations))
    prompts = []
    for features in versions.values():
        inputs = chat.processor([messages], region_features=[features], allow_unused_regions=True)
        prompts.append(chat.model.to_prompt_embeds(**inputs)[0]["prompt_embeds"])
    is_region = chat.processor([messages], region_features=[own], allow_unused_regions=True)["input_ids"][0] == (
        chat.processor.region_token_id
    )
    assert is_region.any()
    for changed in prompts[1:]:
        assert ((changed - prompts[0]).abs().amax(1) > 1e-4).tolist() == is_region.tolist()


def test_command_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.json"
    arguments = [
        "--model", str(folder / "adapter"), "--shapes", "--count", "2", "--talks", "1", "--size", "96", "64",
        "--max-new-tokens", "3", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    first = main(arguments)
    printed = capsys.readouterr().out
    assert "shapes, groups" in printed and "regions/s" in printed and "2 scenes" in printed
    stored = json.loads(out.read_text())
    assert stored["protocol"] == "region-chat-teacher-forced-history-v1"
    assert stored["metrics"]["shapes"].keys() == {"groups", "kinds"} and stored["model"]["concepts"] > 1000
    assert stored["regions"] == sum(prediction["regions"] for prediction in first.predictions) > 5
    monkeypatch.setattr(ChatModel, "read", None)  # nothing is asked again
    again = main(arguments)
    assert again.predictions == first.predictions and again.results["metrics"] == first.results["metrics"]
    assert "2 predictions found" in capsys.readouterr().out


def test_stored_predictions_are_of_the_same_questions(source: TalkSource, tmp_path: Path) -> None:
    fake = Fake(source)
    more = TalkSource("shapes", SceneComposer(), COUNT, seed=FIRST_SEED, size=SIZE, talks=2)
    for asked, reads in ((source, COUNT + 1), (source, 0), (more, COUNT + 1)):
        fake.read_pictures = 0
        run(RegionChat(fake, [asked]), tmp_path / "r.json", {"name": "fake"}, report=lambda line: None, progress=False)  # type: ignore[arg-type]
        assert fake.read_pictures == reads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to ask about: give --sprites"),
        (["--shapes", "--model", "absent"], "absent"),
        (["--sprites", "absent"], "there is no folder absent"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(region_chat.sys, "argv", ["region_chat", *arguments, "--out", str(tmp_path / "r.json")])
    assert cli(main) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="is a folder"):
        main([*arguments, "--shapes", "--out", str(tmp_path)])
