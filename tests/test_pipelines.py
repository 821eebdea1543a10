"""RegionPipeline on a tiny random model: the contract of a call, whatever the picture shows."""

from __future__ import annotations

import contextlib
import json
from shutil import copytree

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tap_llm.concepts import ConceptSpace
from tap_llm.errors import InputError, MissingFileError
from tap_llm.loading import load_tap, parse_device, parse_dtype
from tap_llm.masks import mask_to_box
from tap_llm.pipelines import RegionPipeline, register_pipeline
from tap_llm.tap import TapConfig, TapForConditionalGeneration
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.processing_tap import TapProcessor
from tap_llm.tap.tokenization import load_tokenizer

CANVAS, WIDTH, WORDS = 64, 32, 64
KEYS = ["region", "mask", "box", "iou", "concept", "concept_score", "caption"]
REGIONS = [
    {"box": [5, 6, 30, 28], "id": "a"},
    {"points": [[40, 20], [8, 30]], "labels": [1, 0]},
    {"box": [10, 10, 50, 40], "points": [[20, 20]]},
    {"sketch": [[x, 20] for x in range(30)]},
]
ALL = {"points_per_side": 6, "pred_iou_threshold": -100, "stability_threshold": 0, "box_nms_threshold": 1}


def tiny_model() -> TapForConditionalGeneration:
    torch.manual_seed(3)
    config = TapConfig(
        vision_config={
            "image_size": CANVAS, "window_size": 2, "hidden_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 2, "output_channels": WIDTH,
        },
        prompt_config={"hidden_size": WIDTH, "image_size": CANVAS},
        mask_decoder_config={
            "hidden_size": WIDTH, "num_attention_heads": 2, "mlp_dim": 32, "upscale_dim": 16,
            "head_hidden_size": 32, "semantic_hidden_size": 32, "semantic_embed_dim": 16,
        },
        text_config={
            "vocab_size": WORDS, "semantic_size": WIDTH, "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        },
    )  # fmt: skip
    model = TapForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that prompts matter
                parameter.normal_(std=0.2)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"word{index}" for index in range(3, WORDS - 1)), "<pad>"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def space(seed: int, names: tuple[str, ...] = ("frog", "bus", "sky")) -> ConceptSpace:
    return ConceptSpace(list(names), 10 * torch.randn(16, len(names), generator=torch.manual_seed(seed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "tiny")
    pipe = RegionPipeline(
        model=tiny_model(),
        processor=TapProcessor(TapImageProcessor(size={"longest_edge": CANVAS}), tiny_tokenizer()),
        concepts=space(1),
        device="cpu",
    )
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory):
    """As official weights come: no tokenizer; and no concepts."""
    path = str(tmp_path_factory.mktemp("models") / "bare")
    tiny_model().save_pretrained(path)
    TapProcessor(TapImageProcessor(size={"longest_edge": CANVAS})).save_pretrained(path)
    return path


@pytest.fixture
def pipe(folder):
    return RegionPipeline.from_pretrained(folder, device="cpu")


@pytest.fixture
def calls(pipe, monkeypatch):
    """Rows of each decoder call and number of pictures encoded."""
    seen = {"rows": [], "encoded": 0}
    forward, encode = pipe.model.forward, pipe.model.get_image_embeddings

    def count_rows(*args, **kwargs):
        seen["rows"].append(len(kwargs["input_points"]))
        return forward(*args, **kwargs)

    def count_pictures(pixel_values):
        seen["encoded"] += len(pixel_values)
        return encode(pixel_values)

    monkeypatch.setattr(pipe.model, "forward", count_rows)
    monkeypatch.setattr(pipe.model, "get_image_embeddings", count_pictures)
    return seen


def photo(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def assert_same(first, second):
    """Equal up to rounding."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one["region"] == other["region"] and one["caption"] == other["caption"]
        assert (one["mask"] != other["mask"]).mean() < 0.002
        assert one["iou"] == pytest.approx(other["iou"], abs=1e-4)
        assert one["concept"] == other["concept"]
        assert one["concept_score"] == pytest.approx(other["concept_score"], abs=1e-4)


def test_contract_of_a_result(pipe):
    results = pipe(photo(), regions=REGIONS)
    assert [result["region"] for result in results] == REGIONS
    assert all(result["region"] is region for result, region in zip(results, REGIONS, strict=True))
    for result in results:
        assert list(result) == KEYS
        assert result["mask"].shape == (45, 60) and result["mask"].dtype == bool
        assert result["box"] == mask_to_box(result["mask"])
        assert [type(result[key]) for key in KEYS[3:]] == [float, str, float, str]
        assert result["concept"] in ("frog", "bus", "sky") and 1 / 3 < result["concept_score"] <= 1
    assert any(result["caption"].startswith("word") for result in results)
    assert len({result["iou"] for result in results}) == 4  # the prompts matter


def test_agrees_with_the_model_called_by_hand(pipe):
    inputs = pipe.processor(photo(), REGIONS)
    with torch.no_grad():
        out = pipe.model(**inputs)
    masks = pipe.processor.post_process_masks(
        out.pred_masks, inputs["original_sizes"], inputs["resized_sizes"], slots=out.slots
    )
    captions = pipe.processor.batch_decode(pipe.model.generate(**inputs))
    for row, result in enumerate(pipe(photo(), REGIONS)):
        slot = out.slots[row]
        assert (masks[row].numpy() != result["mask"]).mean() < 0.002
        assert result["iou"] == pytest.approx(out.iou_scores[row, slot].item(), abs=1e-4)
        assert result["caption"] == captions[row]
        names, scores = pipe.concepts.classify(out.semantic_embeds[row, slot])
        assert (result["concept"], result["concept_score"]) == (names[0], pytest.approx(scores[0].item(), abs=1e-4))


def test_no_regions_cost_nothing(pipe, calls):
    assert pipe(photo(), regions=[]) == []
    assert pipe([photo(), photo()], regions=[[], []]) == [[], []]
    assert calls == {"rows": [], "encoded": 0}


def test_many_regions_equal_one_by_one_and_stay_bounded(pipe, calls):
    rng = np.random.default_rng(1)
    corners = rng.uniform((0, 0), (40, 30), (300, 2)).round(1)
    regions = [
        {"box": [x, y, x + 12, y + 10]} if index % 3 else {"points": [[x, y]] * (index % 4 + 1)}
        for index, (x, y) in enumerate(corners.tolist())
    ]
    together = pipe(photo(), regions, batch_size=50, max_new_tokens=3)
    assert calls == {"rows": [50] * 6, "encoded": 1}
    encoded = pipe.encode(photo())
    sample = list(range(0, 300, 29))
    alone = [pipe(encoded, [regions[index]], max_new_tokens=3)[0] for index in sample]
    assert_same([together[index] for index in sample], alone)


def test_list_of_pictures_is_one_list_each(pipe):
    pictures = [photo(1), photo(2, (30, 80)), photo(3)]
    lists = [REGIONS[:2], [], [{"box": [1, 1, 20, 20]}]]
    results = pipe(pictures, regions=lists)
    assert [len(result) for result in results] == [2, 0, 1]
    assert_same(results[0], pipe(pictures[0], lists[0]))
    assert_same(results[2], pipe(pictures[2], lists[2]))


def test_encoded_picture_is_reused(pipe, calls):
    encoded = pipe.encode(photo())
    assert encoded.image_embeddings.shape == (1, WIDTH, 4, 4)
    assert (encoded.original_size, encoded.resized_size) == ((45, 60), (48, 64))
    first = pipe(encoded, REGIONS)
    pipe(encoded, REGIONS[:1])
    assert calls["encoded"] == 1
    assert_same(first, pipe(photo(), REGIONS))


def test_everything_mode(pipe, calls):
    results = pipe(photo(), everything=ALL)
    assert calls == {"rows": [36], "encoded": 1}
    assert len(results) > 1
    scores = [result["iou"] for result in results]
    assert scores == sorted(scores, reverse=True)
    for result in results:
        assert list(result) == KEYS and result["mask"].shape == (45, 60) and result["mask"].any()
        assert result["box"] == mask_to_box(result["mask"]) and result["concept"]


def test_everything_names_and_captions_come_from_the_masks_slot(pipe):
    encoded = pipe.encode(photo())
    same_slot = 0
    for result in pipe(encoded, everything=ALL):
        by_hand = pipe(encoded, [result["region"]])[0]
        if by_hand["iou"] == pytest.approx(result["iou"], abs=1e-5):  # the routed slot is the one that was found
            assert_same([result], [by_hand])
            same_slot += 1
    assert same_slot > 0


def test_everything_without_finds(pipe):
    assert pipe(photo(), everything={**ALL, "pred_iou_threshold": 1e6}) == []
    assert pipe([photo(), photo()], everything={**ALL, "pred_iou_threshold": 1e6}) == [[], []]


def test_concepts_are_swapped_at_run_time(pipe):
    before = pipe(photo(), REGIONS, captions=False)
    pipe.concepts = space(2, ("cat", "dog"))
    after = pipe(photo(), REGIONS, captions=False)
    assert {result["concept"] for result in after} <= {"cat", "dog"}
    assert np.array_equal(before[0]["mask"], after[0]["mask"])
    with pytest.raises(InputError, match="width"):
        pipe.concepts = ConceptSpace(["a"], torch.ones(5, 1))
    pipe.concepts = None
    nameless = pipe(photo(), REGIONS, top_k=2)[0]
    assert (nameless["concept"], nameless["concept_score"], nameless["concepts"]) == ("", 0.0, [])


def test_top_k_lists_names_best_first(pipe):
    result = pipe(photo(), REGIONS, top_k=2)[0]
    assert [len(result["concepts"]), result["concepts"][0]] == [2, [result["concept"], result["concept_score"]]]
    everyone = pipe(photo(), REGIONS, top_k=99)[0]["concepts"]
    assert sum(score for _, score in everyone) == pytest.approx(1, abs=1e-5)
    assert [score for _, score in everyone] == sorted((score for _, score in everyone), reverse=True)


def test_caption_options(pipe):
    longest = [len(result["caption"].split()) for result in pipe(photo(), REGIONS, max_new_tokens=2)]
    assert max(longest) <= 2
    beams = pipe(photo(), REGIONS, generate_kwargs={"num_beams": 3}, max_new_tokens=4)
    assert all(isinstance(result["caption"], str) for result in beams)
    assert [result["caption"] for result in pipe(photo(), REGIONS, captions=False)] == [""] * 4


def test_what_a_bare_model_lacks_stays_empty_with_one_warning_each(bare_folder):
    pipe = RegionPipeline.from_pretrained(bare_folder, device="cpu")
    with pytest.warns(UserWarning, match=r"tokenizer\.model.*--tokenizer") as caught:
        results = pipe(photo(), REGIONS) + pipe(photo(), REGIONS)
    assert ["names stay empty" in str(warning.message) for warning in caught] == [False, True]
    assert {result["caption"] for result in results} == {""} and results[0]["concept"] == ""
    with pytest.raises(MissingFileError, match=r"tokenizer\.model"):
        pipe(photo(), REGIONS, captions=True)


def test_tokenizer_and_concepts_can_be_given_to_a_bare_model(folder, bare_folder, tmp_path):
    space(5, ("moon",)).save_pretrained(tmp_path / "moon")
    pipe = RegionPipeline.from_pretrained(bare_folder, tokenizer=folder, concepts=tmp_path / "moon", device="cpu")
    result = pipe(photo(), REGIONS)[0]
    assert result["concept"] == "moon" and result["concept_score"] == 1.0 and "word" in result["caption"]


def test_transformers_pipeline_is_the_same(folder, pipe):
    register_pipeline()
    other = transformers.pipeline("region-understanding", model=folder, device="cpu")
    assert isinstance(other, RegionPipeline)
    assert_same(other(photo(), regions=REGIONS), pipe(photo(), REGIONS))


def test_saved_pipeline_loads_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert_same(RegionPipeline.from_pretrained(tmp_path, device="cpu")(photo(), REGIONS), pipe(photo(), REGIONS))


def test_bfloat16_on_cpu(folder, pipe):
    half = RegionPipeline.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    for exact, rough in zip(pipe(photo(), REGIONS), half(photo(), REGIONS), strict=True):
        assert rough["iou"] == pytest.approx(exact["iou"], abs=0.1)
        assert (exact["mask"] != rough["mask"]).mean() < 0.05
    assert half(photo(), everything=ALL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "either regions"),
        ({"regions": REGIONS, "everything": True}, "either regions"),
        ({"regions": [{"box": [5, 5, 5, 9]}]}, "region 0: box"),
        ({"regions": [{"points": [[0, 0]]}, {"points": [[999, 0]]}]}, "region 1"),
        ({"regions": REGIONS, "batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"regions": REGIONS, "top_k": "2"}, "top_k must be a whole number of at least 1, got '2'"),
        ({"regions": REGIONS, "generate_kwargs": 3}, "generate_kwargs must be a dict"),
        ({"everything": "yes"}, "everything must be True, a dict"),
        ({"everything": {"points_per_side": "ab"}}, "points_per_side must be a whole number, or several, got 'ab'"),
        ({"everything": {"density": 3}}, 'unknown setting "density"'),
    ],
)
def test_bad_calls(pipe, calls, call, message):
    with pytest.raises(InputError, match=message):
        pipe(photo(), **call)
    assert calls == {"rows": [], "encoded": 0}


def test_errors_in_a_list_say_which_picture(pipe):
    with pytest.raises(InputError, match="image 1: region 0"):
        pipe([photo(), photo()], [[], [{"box": [5, 5, 5, 9]}]])
    with pytest.raises(MissingFileError, match="image 1: .*nowhere.png"):
        pipe([photo(), "nowhere.png"], [[], []])


def test_unknown_options_are_refused(pipe):
    with pytest.raises(InputError, match="unknown option .capions."):
        pipe(photo(), REGIONS, capions=False)


def test_bad_models(bare_folder, tmp_path):
    with pytest.raises(InputError, match="tap-tinny"):
        load_tap("tap-tinny")
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a TAP model.*bert"):
        load_tap(tmp_path)
    weights = tmp_path / "model.safetensors"
    tiny_model().config.save_pretrained(tmp_path)
    weights.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tap(tmp_path)
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="missing, first caption_decoder"):
        load_tap(tmp_path)


@pytest.mark.parametrize(
    ("parse", "value"), [(parse_device, "warp9"), (parse_device, "cuda:99"), (parse_dtype, "int8")]
)
def test_bad_devices_and_dtypes(parse, value):
    with pytest.raises(InputError, match=value):
        parse(value)


def damaged_folder(folder, target, file, change):
    """A copy of a model folder with one JSON file changed."""
    copytree(folder, target)
    path = target / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))
    return target


def with_entry(*keys, value):
    def change(content):
        *outer, last = keys
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
        return content

    return change


CONFIG, PROCESSOR = "config.json", "processor_config.json"
DAMAGES = {
    "config_list": (CONFIG, lambda content: []),
    "config_text": (CONFIG, with_entry("vision_config", "hidden_size", value="abc")),
    "patch_size_0": (CONFIG, with_entry("vision_config", "patch_size", value=0)),
    "heads_0": (CONFIG, with_entry("vision_config", "num_attention_heads", value=0)),
    "activation": (CONFIG, with_entry("vision_config", "hidden_act", value="nope")),
    "vision_config_3": (CONFIG, with_entry("vision_config", value=3)),
    "fewer_layers": (CONFIG, with_entry("mask_decoder_config", "num_hidden_layers", value=1)),
    "processor_list": (PROCESSOR, lambda content: []),
    "canvas": (PROCESSOR, with_entry("image_processor", "size", value={"longest_edge": 2 * CANVAS})),
    "canvas_sides": (PROCESSOR, with_entry("image_processor", "size", value={"height": CANVAS, "width": CANVAS})),
    "mean_of_2": (PROCESSOR, with_entry("image_processor", "image_mean", value=[0.5, 0.5])),
    "std_0": (PROCESSOR, with_entry("image_processor", "image_std", value=[0, 0, 0])),
    "other_processor": (PROCESSOR, with_entry("image_processor", "image_processor_type", value="CLIPImageProcessor")),
    "tokenizer": ("tokenizer.json", lambda content: {"version": "1.0"}),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_give_one_error(folder, tmp_path, damage):
    file, change = DAMAGES[damage]
    target = damaged_folder(folder, tmp_path / "model", file, change)
    with pytest.raises(InputError) as caught:
        load_tap(target)
    assert str(target) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "layers", "first"),
    [
        ("mask_decoder_config", 1, r"model\.mask_decoder\.layers\.1"),
        ("text_config", 0, r"caption_decoder\.model\.layers\.0"),
    ],
)  # fmt: skip
def test_tensors_that_the_config_does_not_know_are_refused(folder, tmp_path, part, layers, first):
    change = with_entry(part, "num_hidden_layers", value=layers)
    target = damaged_folder(folder, tmp_path / "model", CONFIG, change)
    with pytest.raises(InputError, match=f"tensors are more than its config tells of, first {first}"):
        load_tap(target)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_tokenizers(folder, tmp_path, content):
    copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    for load in (load_tap, load_tokenizer):
        with pytest.raises(InputError, match="cannot be loaded"):
            load(tmp_path / "model")


def test_code_in_a_folder_is_never_run_nor_asked_about(folder, tmp_path, monkeypatch):
    target, marker = tmp_path / "model", tmp_path / "marker"
    damaged_folder(folder, target, "tokenizer_config.json", with_entry("auto_map", value={
        "AutoTokenizer": ["evil.Evil", "evil.Evil"]}))  # fmt: skip
    config = json.loads((target / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Evil"
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    (target / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked"))
    for load in (load_tap, load_tokenizer):
        with contextlib.suppress(InputError):
            load(target)
    assert not marker.exists()


def test_generate_kwargs_may_name_the_length(pipe):
    def longest(**options):
        return max(len(result["caption"].split()) for result in pipe(photo(), REGIONS, **options))

    assert longest(generate_kwargs={"max_new_tokens": 2}) <= 2 < longest()
    assert longest(generate_kwargs={"max_new_tokens": 9}, max_new_tokens=2) <= 2


def test_batch_size_can_be_a_default(folder, monkeypatch):
    register_pipeline()
    for pipe in (
        RegionPipeline.from_pretrained(folder, device="cpu", batch_size=3),
        transformers.pipeline("region-understanding", model=folder, device="cpu", batch_size=3),
    ):
        rows, forward = [], pipe.model.forward

        def count(*args, rows=rows, forward=forward, **kwargs):
            rows.append(len(kwargs["input_points"]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(pipe.model, "forward", count)
        pipe(photo(), REGIONS, captions=False)
        pipe(photo(), REGIONS, captions=False, batch_size=4)
        assert rows == [3, 1, 4]
    with pytest.raises(InputError, match="batch_size"):
        RegionPipeline.from_pretrained(folder, device="cpu", batch_size=0)


@pytest.mark.parametrize("part", ["iou_head", "semantic_head"])
def test_a_model_that_answers_nan_is_an_error(pipe, part):
    with torch.no_grad():
        getattr(pipe.model.model.mask_decoder, part).layers[2].bias.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN"):
        pipe(photo(), REGIONS, captions=False)


@pytest.mark.parametrize("name", ["num_return_sequences", "return_dict_in_generate"])
def test_each_region_gets_one_caption(pipe, name):
    with pytest.raises(InputError, match=f"{name} is for model.generate"):
        pipe(photo(), regions=[{"box": [1, 1, 20, 20]}], generate_kwargs={name: 2})


def test_unknown_options_point_to_generate_kwargs(pipe):
    with pytest.raises(InputError, match="unknown option 'num_beams'; options of generate go into generate_kwargs"):
        pipe(photo(), regions=[{"box": [1, 1, 20, 20]}], num_beams=3)


def test_concepts_must_be_a_space(pipe):
    with pytest.raises(InputError, match="ConceptSpace.from_pretrained"):
        pipe.concepts = "coco"
