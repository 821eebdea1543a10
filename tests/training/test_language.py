"""A language model from nothing: its tokenizer, the text it reads, words in the place of regions, and the recipe."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tap_llm import TapConfig, TapImageProcessor, TapLlmProcessor
from tap_llm.data.scenes import SceneComposer
from tap_llm.data.sprites import Sprite, SpriteLibrary
from tap_llm.errors import InputError
from tap_llm.hub import ASSETS
from tap_llm.masks import mask_to_box
from tap_llm.region_llm.configuration_tap_llm import TapLlmConfig
from tap_llm.region_llm.placeholders import find_placeholder
from tap_llm.region_llm.projectors import BoxPosition, find_projector
from training import language
from training.byte_level import load_tokenizer
from training.chat import ChatConfig
from training.chat_tokenizer import REGION, train_chat_tokenizer
from training.config import from_dict, load_config
from training.language import LanguageConfig, LlmSize, make_llm
from training.language_objective import LanguageObjective, load_region_code, save_region_code
from training.talks import TalkBatches, TalkConfig, Talks, packed, words_of
from training.tell import TellConfig

ROOT = Path(__file__).resolve().parents[2]
SIZE = LlmSize(hidden_size=32, layers=2, heads=2, mlp=48, vocabulary=400, max_length=256)
TEXTS = ["What is region 1? a red square", "the blue circle on the left, \n yes or no"] * 3


@pytest.fixture(scope="module")
def talks() -> Talks:
    return Talks(TalkConfig(told_share=0.6), seed=3)


@pytest.fixture(scope="module")
def tokenizer(talks: Talks) -> PreTrainedTokenizerFast:
    return train_chat_tokenizer(talks.texts(80), 400)


@pytest.fixture(scope="module")
def batches(talks: Talks, tokenizer: PreTrainedTokenizerFast) -> TalkBatches:
    return TalkBatches(talks, tokenizer, batch_size=8, max_length=256)


@pytest.fixture(scope="module")
def batch(batches: TalkBatches) -> dict[str, torch.Tensor]:
    return batches[2]


# Tokenizer


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_tokenizer_brings_all_that_region_chat_needs(tmp_path: Path, template: str) -> None:
    made = train_chat_tokenizer(TEXTS, 300, template)
    made.save_pretrained(tmp_path)
    for found in (made, load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)
        assert find_placeholder(found) == 3 == found.convert_tokens_to_ids(REGION)
        for text in (*TEXTS, "un café ☕", "two  spaces\n"):
            ids = found.encode(text, add_special_tokens=False)
            assert ids == made.encode(text, add_special_tokens=False) and min(ids) > 3
            assert found.decode(ids) == text
        assert found.apply_chat_template([{"role": "user", "content": "yes"}], add_generation_prompt=True)
    processor = TapLlmProcessor(TapImageProcessor(size={"longest_edge": 64}), made)  # nothing has to be named
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a red square"}]
    labels = processor(messages, return_labels=True)["labels"][0]
    assert made.decode(labels[labels >= 0], skip_special_tokens=True).strip() == "a red square"
    assert (labels == made.eos_token_id).sum() == 1  # the assistant learns to stop


def test_tokenizer_refuses_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocabulary must be at least 260"):
        train_chat_tokenizer(TEXTS, 259)
    with pytest.raises(InputError, match=r"template must be one of plain, chatml, got 'x'"):
        train_chat_tokenizer(TEXTS, 300, "x")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path / "absent")


# Text


def conversations(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and the mask of answers of each conversation, in the order of the rows."""
    found = []
    for ids, places, said in zip(batch["input_ids"], batch["position_ids"], batch["answers"], strict=True):
        starts = [*((places == 0) & (ids != 0)).nonzero()[:, 0].tolist(), int((ids != 0).sum())]
        found += [(ids[start:end], said[start:end]) for start, end in itertools.pairwise(starts)]
    return found


def test_batches_are_the_conversations(batches: TalkBatches, batch: dict[str, torch.Tensor]) -> None:
    shown, answered = [], []
    for ids, said in conversations(batch):
        text = batches.tokenizer.decode(ids).replace("<|im_end|>\n", "")
        shown.append(text.replace("<|im_start|>user\n", "").replace("<|im_start|>assistant\n", ""))
        answered.append(batches.tokenizer.decode(ids[said]))
    expected: dict[str, str] = {}
    for number in range(16, 24):
        messages = batches.talks[number].messages
        parts = [part for message in messages for part in message["content"]]
        text = "".join(REGION if part["type"] == "region" else part.get("text", "") for part in parts)
        answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
        expected[text] = "".join(f"{answer}<|im_end|>" for answer in answers)
    assert dict(zip(shown, answered, strict=True)) == expected and len(shown) == 8
    assert len(batch["input_ids"]) < 8  # some share a row
    assert (batch["position_ids"] == 0).sum() == 8 + (batch["input_ids"] == 0).sum()


def test_rows_are_filled() -> None:
    assert packed([30, 90, 60, 10, 100], 100) == [[4], [1, 3], [2, 0]]
    assert packed([30, 300, 20], 100) == [[1], [0, 2]]  # rows grow to the longest
    assert packed([], 100) == []


def test_placeholders_and_padding_are_not_learned(batch: dict[str, torch.Tensor]) -> None:
    ids, labels = batch["input_ids"], batch["labels"]
    unsaid = (ids == 0) | (ids == 3) | (batch["position_ids"] == 0)
    assert (labels[unsaid] == -100).all() and torch.equal(labels[~unsaid], ids[~unsaid]) and unsaid.any()
    assert not (batch["answers"] & unsaid).any()
    count = int((ids == 3).sum())
    assert len(batch["words"]) == count == len(batch["boxes"]) > 4
    assert ((batch["boxes"] > 0) & (batch["boxes"] <= 1)).all()


def test_batches_are_functions_of_their_number(batches: TalkBatches, batch: dict[str, torch.Tensor]) -> None:
    again = TalkBatches(Talks(batches.talks.config, 3), batches.tokenizer, 8, 256)[2]
    assert all(torch.equal(again[key], batch[key]) for key in batch)
    other = TalkBatches(batches.talks.for_validation(), batches.tokenizer, 8, 256)[2]
    assert other["input_ids"].shape != batch["input_ids"].shape or (other["input_ids"] != batch["input_ids"]).any()


def test_words_and_boxes_are_those_of_the_regions(batches: TalkBatches) -> None:
    """One conversation a batch, so that their order is known."""
    single = TalkBatches(batches.talks, batches.tokenizer, 1, 256)
    told = set()
    for number in range(8):
        scene, _, messages, is_told = batches.talks[number]
        regions = [part["index"] for message in messages for part in message["content"] if part["type"] == "region"]
        found = [batches.tokenizer.decode(row[row >= 0]) for row in single[number]["words"]]
        assert found == [words_of(scene, region) if is_told else "" for region in regions]
        told.add(is_told)
        expected = batches.talks[number].boxes[regions]
        assert single[number]["boxes"].numpy() == pytest.approx(expected.astype(np.float32))
    assert told == {True, False}


def test_boxes_are_tight(talks: Talks, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = talks.composer.scene(4, (128, 96))
    monkeypatch.setattr(talks.composer, "scene", lambda *_: scene)
    for mask, (cx, cy, w, h) in zip(scene.masks, talks[0].boxes.tolist(), strict=True):
        x0, y0, x1, y1 = mask_to_box(mask)
        assert (cx * 128, cy * 96, w * 128, h * 96) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))


def test_few_scenes_are_talked_about_again_and_again() -> None:
    talks = Talks(TalkConfig(scenes=3), seed=4)
    found = [talks[number] for number in range(24)]
    assert len({str(talk.scene.things) for talk in found}) == 3
    assert len({str(talk.messages) for talk in found}) > 20
    again = Talks(TalkConfig(scenes=3), seed=4)[17]  # a function of its number, whatever was asked for before
    assert again.messages == found[17].messages and again.scene.things == found[17].scene.things


def test_words_say_all_and_the_main_colour_twice() -> None:
    scene = SceneComposer().scene(5, (96, 72))
    thing, drawn = scene.things[0], scene.attributes[0]
    said = words_of(scene, 0)
    assert said.startswith(f" {thing.phrase} {thing.colours[0]} {thing.colours[0]}")
    assert said.endswith(f" {drawn['texture']} {drawn['size']}")


def test_long_conversations_are_cut(talks: Talks, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = TalkBatches(talks, tokenizer, 8, max_length=20)[2]
    assert all(len(ids) <= 20 for ids, _ in conversations(batch)) and len(conversations(batch)) == 8
    assert int((batch["input_ids"] == 3).sum()) == len(batch["words"]) == len(batch["boxes"])


def test_short_conversations_come_first() -> None:
    talks = Talks(TalkConfig(single=12), seed=2)

    def questions(stream: Talks) -> list[int]:
        return [len(stream[number].messages) // 2 for number in range(24)]

    assert questions(talks)[:12] == [1] * 12 and max(questions(talks)[12:]) > 1
    assert questions(talks)[12:] == questions(Talks(TalkConfig(), seed=2))[12:]
    assert max(questions(talks.for_validation())[:12]) > 1


def test_some_kinds_may_be_asked_more_often() -> None:
    talks = Talks(TalkConfig(focus=["place"], focus_share=0.5, kinds=["colour"], single=60), seed=2)
    asked = [str(talks[number].messages[0]) for number in range(60)]
    assert 20 < sum("olour" not in text for text in asked) < 40
    assert all("olour" in str(talks.for_validation()[number].messages[0]) for number in range(10))


def test_names_of_sprites_are_in_the_tokenizers_text() -> None:
    pixels = torch.full((40, 40, 4), 255, dtype=torch.uint8).numpy()
    library = SpriteLibrary([Sprite("gizmo", "a gizmo", "object", "object", "object", ("white",), pixels)])
    talks = Talks(TalkConfig(), composer=SceneComposer(library, shape_share=0.0))
    assert list(talks.texts(0)) == ["It is a gizmo"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"told_share": 1.5}, "data.told_share must lie between 0 and 1"),
        ({"single": -1}, "data.single and data.scenes must not be negative, got -1 and 0"),
        ({"scene_size": [9]}, "data.scene_size must be width and height"),
        ({"kinds": ["taste"]}, "unknown kind of question 'taste'"),
        ({"focus": ["taste"], "focus_share": 0.5}, "unknown kind of question 'taste'"),
        ({"focus": ["place"]}, "data.focus_share, up to 1, how often they come"),
        ({"sprites": ["absent"]}, "there is no folder absent"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Talks(TalkConfig(**settings))[0]


# Objective


@pytest.fixture(scope="module")
def objective(tokenizer: PreTrainedTokenizerFast) -> LanguageObjective:
    torch.manual_seed(0)
    return LanguageObjective(make_llm(SIZE, tokenizer), region_token_id=3)


def test_words_take_the_place_of_regions(objective: LanguageObjective) -> None:
    ids = torch.tensor([[5, 3, 6, 0], [3, 7, 3, 8]])
    words = torch.tensor([[9, 9, 10], [-1, -1, -1], [11, -1, -1]])
    boxes = torch.rand(3, 4)
    table = objective.llm.get_input_embeddings().weight
    found, code = objective.embed(ids, words, boxes), objective.position(boxes) * 0.02
    first = ((2 * table[9] + table[10]) / math.sqrt(3) + code[0]) * math.sqrt(0.5)
    third = (table[11] + code[2]) * math.sqrt(0.5)
    expected = table[ids].clone()
    expected[0, 1], expected[1, 2] = first, third  # of the second nothing is told: the placeholder's own embedding
    torch.testing.assert_close(found, expected)
    assert found[0, 1].square().mean().sqrt().item() == pytest.approx(0.02, rel=0.5)  # as large as any token


def test_what_users_ask_may_count_less(objective: LanguageObjective) -> None:
    assert LanguageObjective(objective.llm, 3, questions=0.1).weights == {"answers": 1.0, "questions": 0.1}


def test_the_code_of_boxes_goes_over_to_a_projector(objective: LanguageObjective, tmp_path: Path) -> None:
    save_region_code(objective, objective.state_dict(), tmp_path)
    layer = BoxPosition(32, 0.05)  # of another size at the start
    boxes = torch.rand(5, 4)
    load_region_code(layer, 0.3, str(tmp_path))
    torch.testing.assert_close(layer(boxes) * 0.3, objective.position(boxes) * 0.02)
    with pytest.raises(InputError, match="for embeddings of width 32, not 48"):
        load_region_code(BoxPosition(48, 0.02), 1.0, str(tmp_path))
    with pytest.raises(InputError, match="was not made by training.language"):
        load_region_code(layer, 1.0, str(tmp_path / "absent"))


def test_losses_are_those_of_each_conversation_alone(
    objective: LanguageObjective, batches: TalkBatches, batch: dict[str, torch.Tensor]
) -> None:
    """Rows that conversations share, and padding, change nothing."""
    with torch.no_grad():
        sums, metrics = objective(**batch)
        counts = objective.counts(batch)
        expected, tokens = 0.0, 0
        for number in range(16, 24):
            alone = TalkBatches(batches.talks, batches.tokenizer, 1, 256)[number]
            ids, wanted = alone["input_ids"], alone["labels"][:, 1:]
            logits = objective.llm(inputs_embeds=objective.embed(ids, alone["words"], alone["boxes"])).logits[:, :-1]
            expected += float(F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="sum"))
            tokens += int((wanted != -100).sum())
    assert sum(counts.values()) == tokens and min(counts.values()) > 50
    assert float(sums["answers"] + sums["questions"]) == pytest.approx(expected, rel=1e-5)
    assert float(sums["answers"]) / counts["answers"] == pytest.approx(math.log(400), rel=0.1)
    assert float(metrics["accuracy"][1]) == counts["answers"]


def test_learning_to_read_words_and_boxes(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same question everywhere: first what is told answers it, then on which side the box lies."""
    torch.manual_seed(1)
    trainee = LanguageObjective(make_llm(SIZE, tokenizer), 3)
    answers = torch.arange(20, 36)
    boxes = torch.rand(16, 4)
    by_word = {"words": torch.stack([torch.full((16,), 50), answers], dim=1), "boxes": boxes}
    by_box = {"words": torch.full((16, 1), 50), "boxes": boxes}
    for told, wanted in ((by_word, answers), (by_box, 60 + (boxes[:, 0] > 0.5).long())):
        ids = torch.tensor([5, 3, 6, 0]).repeat(16, 1)
        ids[:, 3] = wanted
        said = torch.tensor([False, False, False, True]).expand(16, -1)
        batch = {"input_ids": ids, "position_ids": torch.arange(4).expand(16, -1), "answers": said, **told}
        batch["labels"] = ids.masked_fill(~said, -100)
        optimizer = torch.optim.AdamW(trainee.parameters(), 1e-2)
        for _ in range(60):
            sums, metrics = trainee(**batch)
            (sums["answers"] / 16).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert metrics["accuracy"][0] >= 15
        batch["words"] = torch.full((16, 1), -1)  # nothing is told: one answer for all
        assert trainee(**batch)[1]["accuracy"][0] <= 11


# Recipe


def settings(folder: Path, **run: Any) -> LanguageConfig:
    fixed = {
        "output_dir": str(folder), "steps": 6, "batch_size": 4, "workers": 0, "precision": "no", "tensorboard": False,
        "log_every": 1, "evaluate_every": 6, "checkpoint_every": 3,
    }  # fmt: skip
    raw = {"model": asdict(SIZE), "optimizer": {"learning_rate": 0.01, "warmup": 1}, "run": {**fixed, **run}}
    return from_dict(LanguageConfig, raw)


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "TOKENIZER_TALKS", 60)
    monkeypatch.setattr(language, "VALIDATION_BATCHES", 2)


@pytest.mark.usefixtures("fewer")
def test_recipe_leaves_a_language_model_to_chat_with(tmp_path: Path) -> None:
    final = language.main(settings(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss/answers"] for line in lines if "loss/answers" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert isinstance(llm, LlamaForCausalLM) and llm.config.tie_word_embeddings
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert llm.config.vocab_size == len(tokenizer) <= 400 and llm.generation_config.eos_token_id == 2
    assert tokenizer.chat_template and find_placeholder(tokenizer) == 3
    # A finished run that is resumed does nothing but save again, and finds its tokenizer.
    again = language.main(settings(tmp_path / "run", resume=True))
    other = AutoModelForCausalLM.from_pretrained(again)
    ids = torch.tensor([[1, 20, 30, 40]])
    assert torch.equal(other(ids).logits, llm(ids).logits)


@pytest.mark.usefixtures("fewer")
def test_a_later_run_goes_on_with_the_language_model(tmp_path: Path) -> None:
    first = language.main(settings(tmp_path / "first"))
    config = settings(tmp_path / "second", steps=1)
    config.model = LlmSize(start=str(first), hidden_size=96, heads=3)  # what it is stays as it is
    config.loss.questions, config.optimizer.learning_rate = 0.5, 0.0
    second = language.main(config)
    for name in ("model.safetensors", "region_code.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key]) for key in one)
    assert (first / "tokenizer.json").read_text() == (second / "tokenizer.json").read_text()


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(InputError, match="hidden_size 33 must be a multiple of model.heads 2"):
        LlmSize(hidden_size=33, heads=2).check()
    with pytest.raises(InputError, match="model.layers must be at least 1"):
        LlmSize(layers=0).check()
    with pytest.raises(InputError, match="model.start: there is no folder absent"):
        LlmSize(start="absent").check()


# Configurations


LANGUAGE = ("1_language", "2_choices", "3_all")


def test_configurations_of_tap_tiny_chat_go_together() -> None:
    folder = ROOT / "configs" / "tap_tiny_chat"
    runs = [load_config(LanguageConfig, folder / f"{name}.yaml") for name in LANGUAGE]
    tell = load_config(TellConfig, folder / "4_tell.yaml")
    chat = load_config(ChatConfig, folder / "5_chat.yaml")
    runs[0].model.check()
    for config in (*(run.data for run in runs), tell.data, chat.data):
        config.check()
        assert config.sprites == tell.data.sprites
    starts = [run.model.start for run in runs[1:]] + [tell.model.llm, chat.model.start]
    assert starts == [f"{run.run.output_dir}/final" for run in (*runs, tell)]
    assert len({config.run.seed for config in (*runs, tell, chat)}) == 5


def test_tap_tiny_chat_is_small() -> None:
    """Language model and projector stay below 5 MB in half precision."""
    folder = ROOT / "configs" / "tap_tiny_chat"
    size = load_config(LanguageConfig, folder / "1_language.yaml").model
    told = load_config(TellConfig, folder / "4_tell.yaml").model
    tokenizer: Any = type("Words", (), {"__len__": lambda self: size.vocabulary, "pad_token_id": 0,
                                        "bos_token_id": 1, "eos_token_id": 2})()  # fmt: skip
    with torch.device("meta"):
        llm = make_llm(size, tokenizer)
        config = TapLlmConfig(
            tap_config=TapConfig.from_pretrained(ASSETS / "tap-tiny"),
            text_config=llm.config,
            projector_hidden_size=told.projector_hidden,
        )
        projector = find_projector(str(told.projector))(config)
    count = sum(value.numel() for part in (llm, projector) for value in part.parameters())
    assert count > 1.8e6 and 2 * count < 5e6
