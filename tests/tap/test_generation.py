"""Captions: whatever way they are decoded, they are those of a plain loop without a cache."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from tap_llm import TapConfig, TapForConditionalGeneration, TapImageProcessor, TapProcessor
from tap_llm.tap import generation, modeling_tap
from tap_llm.tap.outputs import take_slots

WIDTH, VOCABULARY = 128, 50
PLACEHOLDER, BOS, EOS, PAD = 0, 1, 2, VOCABULARY - 1


@pytest.fixture(scope="module")
def shared_model() -> TapForConditionalGeneration:
    """Random weights that end captions early now and then; not to be changed."""
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = TapForConditionalGeneration(
        TapConfig.from_variant("tiny", vision_config={"mlp_ratio": 4.0}, text_config=text)
    ).eval()
    with torch.no_grad():
        for parameter in model.caption_decoder.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[1]))
        model.caption_decoder.lm_head.weight[EOS] *= 3
    return model


@pytest.fixture
def model(shared_model: TapForConditionalGeneration) -> TapForConditionalGeneration:
    """A copy that the test may change."""
    return deepcopy(shared_model)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def log_probabilities(model: TapForConditionalGeneration, ids: list[int], token: Tensor) -> Tensor:
    """(V,) of the id after `ids`, from one pass over everything; pad and placeholder impossible."""
    inputs = torch.tensor([[PLACEHOLDER, *ids]])
    logits = model.caption_decoder(inputs, semantic_tokens=token[None], use_cache=False).logits[0, -1]
    scores = logits.log_softmax(-1)
    scores[[PLACEHOLDER, PAD]] = -torch.inf
    return scores


def naive_caption(model: TapForConditionalGeneration, token: Tensor, length: int = 38) -> list[int]:
    ids = [BOS]
    while len(ids) <= length and ids[-1] != EOS:
        ids.append(int(log_probabilities(model, ids, token).argmax()))
    return ids


@pytest.fixture(scope="module")
def captions(shared_model: TapForConditionalGeneration, tokens: Tensor) -> list[list[int]]:
    """The greedy captions, of different lengths."""
    rows = [naive_caption(shared_model, token) for token in tokens]
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) >= 4 and max(lengths) == 39 and min(lengths) < 12  # else the tests here mean little
    return rows


def padded(rows: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, rows))
    return [row + [PAD] * (longest - len(row)) for row in rows]


# Greedy


def test_greedy_equals_a_plain_loop(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    ids = shared_model.generate(semantic_tokens=tokens)
    assert ids.dtype == torch.int64
    assert ids.tolist() == padded(captions)  # BOS, words, EOS, right pads; 38 new ids at most


def test_short_captions_end_the_loop(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    short = [row for row, caption in enumerate(captions) if len(caption) < 39]
    ids = shared_model.generate(semantic_tokens=tokens[short])
    assert ids.tolist() == padded([captions[row] for row in short])


@pytest.mark.parametrize("share", [0.0, 0.125, 0.6, 2.0])
def test_dropping_finished_rows_changes_nothing(
    model: TapForConditionalGeneration,
    tokens: Tensor,
    captions: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    monkeypatch.setattr(generation, "DROP_SHARE", share)
    sizes: list[int] = []
    model.caption_decoder.lm_head.register_forward_hook(lambda _m, _i, logits: sizes.append(len(logits)))
    assert model.generate(semantic_tokens=tokens).tolist() == padded(captions)
    assert len(sizes) == 38 and sizes == sorted(sizes, reverse=True)
    if share == 0.0:
        assert sizes == [sum(len(caption) > step for caption in captions) for step in range(1, 39)]
    if share == 2.0:
        assert set(sizes) == {len(captions)}


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "top_k": 1},
        {"num_beams": 1},
    ],
    ids=["transformers_loop", "static_cache", "no_cache", "sample_of_one", "one_beam"],
)
def test_other_ways_to_the_same_captions(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]], options: dict[str, Any]
) -> None:
    result = shared_model.generate(semantic_tokens=tokens, **options)
    ids = result.sequences if "return_dict_in_generate" in options else result
    assert ids.tolist() == padded(captions)


def test_chunks_change_nothing(
    shared_model: TapForConditionalGeneration,
    tokens: Tensor,
    captions: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = sorted(range(10), key=lambda row: len(captions[row]))  # so that chunks end at different lengths
    monkeypatch.setattr(modeling_tap, "CAPTION_CHUNK_SIZE", 4)
    ids = shared_model.generate(semantic_tokens=tokens[order])
    assert ids.tolist() == padded([captions[row] for row in order])


def test_no_regions(shared_model: TapForConditionalGeneration) -> None:
    ids = shared_model.generate(semantic_tokens=torch.zeros(0, WIDTH))
    assert (ids.shape[0], ids.dtype) == (0, torch.int64)
    result = shared_model.generate(semantic_tokens=torch.zeros(0, WIDTH), return_dict_in_generate=True)
    assert result.sequences.shape == ids.shape


def test_pad_and_placeholder_are_never_words(
    model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    favourites = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([PLACEHOLDER, PAD]), 100.0)
    model.caption_decoder.lm_head.register_forward_hook(lambda _m, _i, logits: logits + favourites)
    assert model.generate(semantic_tokens=tokens).tolist() == padded(captions)
    for options in ({"num_beams": 2}, {"do_sample": True}, {"return_dict_in_generate": True}):
        result = model.generate(semantic_tokens=tokens, **options)
        ids = result if isinstance(result, Tensor) else result.sequences
        for row in ids.tolist():
            words = row[: row.index(EOS)] if EOS in row else row
            assert not {PLACEHOLDER, PAD} & set(words)


# Sampling and beams


def test_sampling_follows_the_seed(shared_model: TapForConditionalGeneration, tokens: Tensor) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return shared_model.generate(semantic_tokens=tokens, do_sample=True, temperature=1.5).tolist()

    assert sample(0) == sample(0) != sample(1)


def test_several_samples_per_region(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    options = {"do_sample": True, "num_return_sequences": 3}
    ids = shared_model.generate(semantic_tokens=tokens, top_k=1, **options)  # each the likeliest word
    assert ids.tolist() == padded([caption for caption in captions for _ in range(3)])
    torch.manual_seed(0)
    varied = shared_model.generate(semantic_tokens=tokens[1:2], temperature=2.0, **options)
    assert len(set(map(tuple, varied.tolist()))) == 3


def test_beam_search_finds_the_best_caption(shared_model: TapForConditionalGeneration, tokens: Tensor) -> None:
    def best_of_all(token: Tensor) -> list[tuple[float, list[int]]]:
        first = log_probabilities(shared_model, [BOS], token)
        found = [(float(first[EOS]), [BOS, EOS])]
        for word in set(range(VOCABULARY)) - {PLACEHOLDER, EOS, PAD}:
            second = first[word] + log_probabilities(shared_model, [BOS, word], token)
            found += [(float(score), [BOS, word, other]) for other, score in enumerate(second)]
        return sorted(found, reverse=True)

    options = {"num_beams": 45, "max_new_tokens": 2, "length_penalty": 0.0}
    ids = shared_model.generate(semantic_tokens=tokens[:3], num_return_sequences=2, **options)
    assert ids.shape == (6, 3)
    expected = [caption for token in tokens[:3] for _, caption in best_of_all(token)[:2]]
    assert [row[: row.index(PAD)] if PAD in row else row for row in ids.tolist()] == expected
    assert torch.equal(shared_model.generate(semantic_tokens=tokens[:3], **options), ids[::2])


# Settings


@pytest.mark.parametrize("limit", [{"max_new_tokens": 5}, {"max_length": 6}])
def test_length_limits(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]], limit: dict[str, int]
) -> None:
    ids = shared_model.generate(semantic_tokens=tokens, **limit)
    assert ids.tolist() == padded([caption[:6] for caption in captions])


def test_a_further_end_of_captions(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    stop = max(captions, key=len)[3]
    cut = [caption[: caption.index(stop) + 1] if stop in caption else caption for caption in captions]
    assert cut != captions
    assert shared_model.generate(semantic_tokens=tokens, eos_token_id=[EOS, stop]).tolist() == padded(cut)


def test_what_may_tell_rows_apart_sees_them_all(
    shared_model: TapForConditionalGeneration,
    tokens: Tensor,
    captions: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: set[int] = set()

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        sizes.add(len(ids))
        return scores

    monkeypatch.setattr(modeling_tap, "CAPTION_CHUNK_SIZE", 4)
    processors = LogitsProcessorList([note])
    ids = shared_model.generate(semantic_tokens=tokens, logits_processor=processors)
    assert ids.tolist() == padded(captions)
    assert sizes == {len(tokens)}


def test_settings_of_the_model_are_respected_and_kept(
    model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    model.generation_config.max_new_tokens = 4
    before = model.generation_config.to_dict(), model.caption_decoder.generation_config.to_dict()
    assert model.generate(semantic_tokens=tokens).tolist() == padded([caption[:5] for caption in captions])
    longer = model.generate(semantic_tokens=tokens, max_new_tokens=7, num_beams=2)
    assert longer.shape[1] == 8
    assert (model.generation_config.to_dict(), model.caption_decoder.generation_config.to_dict()) == before


def test_settings_of_a_call_are_not_changed(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    settings = GenerationConfig(max_new_tokens=3, suppress_tokens=[7])
    before = settings.to_dict()
    ids = shared_model.generate(semantic_tokens=tokens, generation_config=settings)
    assert ids.shape == (10, 4) and not (ids == 7).any()
    assert settings.to_dict() == before


def test_a_forbidden_word(shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]) -> None:
    word = captions[1][1]
    assert word != EOS
    ids = shared_model.generate(semantic_tokens=tokens, bad_words_ids=[[word]])
    assert not (ids == word).any()


class Collector:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_the_caption_and_no_placeholder(
    shared_model: TapForConditionalGeneration, tokens: Tensor, captions: list[list[int]]
) -> None:
    for row in range(3):
        streamer = Collector()
        ids = shared_model.generate(semantic_tokens=tokens[row : row + 1], streamer=streamer)
        assert ids.tolist() == [captions[row]]
        assert streamer.ids == captions[row]
        assert streamer.ended


# Inputs


@pytest.fixture(scope="module")
def inputs() -> Any:
    pictures = [np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8) for i in range(2)]
    processor = TapProcessor(TapImageProcessor(size={"longest_edge": 256}))
    return processor(pictures, [[{"box": [2, 3, 30, 20]}, {"points": [[9, 9]]}], [{"points": [[50, 30]]}]])


def test_everything_the_processor_returns(shared_model: TapForConditionalGeneration, inputs: Any) -> None:
    with torch.no_grad():
        outputs = shared_model(**inputs)
    routed = take_slots(outputs.semantic_tokens, outputs.slots)
    expected = padded([naive_caption(shared_model, token, 9) for token in routed])
    assert shared_model.generate(**inputs, max_new_tokens=9).tolist() == expected
    assert shared_model.generate(semantic_tokens=routed, max_new_tokens=9).tolist() == expected
    labels = torch.ones(3, 4, dtype=torch.long)
    assert shared_model.generate(**inputs, labels=labels, max_new_tokens=9).tolist() == expected
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert shared_model.generate(inputs["pixel_values"], **rest, max_new_tokens=9).tolist() == expected
    rest["image_embeddings"] = outputs.image_embeddings
    assert shared_model.generate(**rest, max_new_tokens=9).tolist() == expected


def test_inputs_that_contradict_each_other(
    shared_model: TapForConditionalGeneration, inputs: Any, tokens: Tensor
) -> None:
    with pytest.raises(ValueError, match="either semantic_tokens or images"):
        shared_model.generate(**inputs, semantic_tokens=tokens[:3])
    with pytest.raises(ValueError, match="exactly one of pixel_values and image_embeddings"):
        shared_model.generate()


@pytest.mark.parametrize("shape", [(3, 4, WIDTH), (WIDTH,), (3, WIDTH - 1)])
def test_semantic_tokens_of_another_shape(shared_model: TapForConditionalGeneration, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"semantic_tokens must be \(N, "):
        shared_model.generate(semantic_tokens=torch.zeros(shape))
