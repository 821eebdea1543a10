"""The command line: what is printed, what is written, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from tap_llm import cli
from tap_llm.concepts import ConceptSpace
from tap_llm.masks import decode_rle
from tap_llm.pipelines import RegionPipeline
from tap_llm.tap import TapConfig, TapForConditionalGeneration
from tap_llm.tap.conversion import export_official
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.processing_tap import TapProcessor

BOX, POINT = ["--box", "10,20,60,50"], ["--point", "30,40 5,5,0"]


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory):
    """A random model without tokenizer and concepts, marked as provisional."""
    folder = str(tmp_path_factory.mktemp("models") / "bare")
    torch.manual_seed(0)
    model = TapForConditionalGeneration(TapConfig.from_variant("tiny", text_config={"vocab_size": 40}))
    model.config.provisional = True
    model.save_pretrained(folder)
    TapProcessor(TapImageProcessor(size={"longest_edge": 256})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(bare_folder, tmp_path_factory):
    """The same with tokenizer and concepts, and not provisional."""
    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, 39)), "<pad>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    model = TapForConditionalGeneration.from_pretrained(bare_folder)
    model.config.provisional = False
    processor = TapProcessor(TapImageProcessor(size={"longest_edge": 256}), tokenizer)
    weights = 30 * torch.randn(128, 3, generator=torch.manual_seed(1))
    path = str(tmp_path_factory.mktemp("models") / "full")
    concepts = ConceptSpace(["frog", "green bus", "sky"], weights)
    RegionPipeline(model=model, processor=processor, concepts=concepts, device="cpu").save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(path)
    return path


@pytest.fixture(autouse=True)
def _restore_logging():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def describe(photo, *options, model):
    return cli.main(["describe", str(photo), "--model", model, "--device", "cpu", *map(str, options)])


def describe_json(capsys, photo, *options, model):
    assert describe(photo, "--json", *options, model=model) == 0
    return json.loads(capsys.readouterr().out)


def assert_fails(capsys, status, *, code=2) -> str:
    """One line on stderr, nothing on stdout; returns the line."""
    out, err = capsys.readouterr()
    assert (status, out) == (code, "")
    assert err.count("\n") == 1 and err.startswith("tap-llm: ") and "Traceback" not in err
    return err


def test_default_is_a_table_and_a_picture_beside_the_image(photo, folder, capsys):
    assert describe(photo, *BOX, *POINT, model=folder) == 0
    out, err = capsys.readouterr()
    header, first, *rest = out.splitlines()
    assert header.split() == ["#", "concept", "score", "IoU", "box", "caption"]
    assert first.split()[0] == "1" and rest[-1].split()[0] == "2"
    assert any(name in first for name in ("frog", "green bus", "sky"))
    picture = photo.with_name("photo.tap.png")
    assert err == f"tap-llm: picture: {picture}\n"
    assert files(photo.parent) == {"photo.jpg", "photo.tap.png"}
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width >= 80


def test_json_is_the_pipelines_list_with_rle_masks(photo, folder, capsys):
    results = describe_json(capsys, photo, *BOX, *POINT, model=folder)
    assert files(photo.parent) == {"photo.jpg"}
    regions = [{"box": [10, 20, 60, 50]}, {"points": [[30, 40], [5, 5]], "labels": [1, 0]}]
    expected = RegionPipeline.from_pretrained(folder, device="cpu")(photo, regions)
    assert len(results) == 2
    for result, other in zip(results, expected, strict=True):
        assert list(result) == list(other)
        assert result["mask"]["size"] == [60, 80]
        assert np.array_equal(decode_rle(result["mask"]), other["mask"])
        assert {**result, "mask": None} == {**other, "mask": None}


def test_regions_keep_the_order_of_the_command_line(photo, folder, capsys, tmp_path):
    mask = tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((20, 30), 255, np.uint8), ((10, 30), (10, 40)))).save(mask)
    options = ["--point", "7,8", "--mask", mask, *BOX, "--point", "1,2", "--box=-5,-2.5,30,30"]
    regions = [result["region"] for result in describe_json(capsys, photo, *options, model=folder)]
    assert regions == [
        {"points": [[7, 8]], "labels": [1]},
        {"mask": str(mask)},
        {"box": [10, 20, 60, 50]},
        {"points": [[1, 2]], "labels": [1]},
        {"box": [-5, -2.5, 30, 30]},
    ]


def test_negative_box_needs_no_equals_sign(photo, folder, capsys):
    (result,) = describe_json(capsys, photo, "--box", "-5,0,10,10", model=folder)
    assert result["region"] == {"box": [-5, 0, 10, 10]}


def test_out_names_the_picture_also_with_json(photo, folder, capsys, tmp_path):
    out = tmp_path / "sub" / "seen.WEBP"
    out.parent.mkdir()
    assert len(describe_json(capsys, photo, *BOX, "--out", out, model=folder)) == 1
    assert files(tmp_path) == {"photo.jpg", "sub"} and files(out.parent) == {"seen.WEBP"}
    with Image.open(out) as image:
        assert image.format == "WEBP"


def test_top_k_and_no_captions(photo, folder, capsys):
    (result,) = describe_json(capsys, photo, *BOX, "--top-k", "2", "--no-captions", model=folder)
    assert result["caption"] == "" and len(result["concepts"]) == 2
    assert describe(photo, *BOX, "--top-k", "3", model=folder) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("frog", "green bus", "sky"))


def test_everything(photo, folder, capsys):
    assert describe(photo, "--everything", "--no-captions", model=folder) == 0  # random weights are not stable
    out, _ = capsys.readouterr()
    assert out == "no regions found\n"
    assert files(photo.parent) == {"photo.jpg", "photo.tap.png"}


def test_everything_settings(photo, folder, capsys):
    grids = ["--points-per-side", "2", "--points-per-side", "3", "--crop-layers", "1"]
    assert describe(photo, "--everything", "--json", *grids, model=folder) == 0
    capsys.readouterr()
    assert "go with --everything" in assert_fails(capsys, describe(photo, *BOX, *grids, model=folder))
    status = describe(photo, "--everything", "--points-per-side", "0", model=folder)
    assert "points-per-side" in assert_fails(capsys, status)


def test_a_bare_provisional_model_says_what_it_lacks(photo, bare_folder, capsys):
    assert describe(photo, *BOX, "--json", model=bare_folder) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["caption"] == "" and json.loads(out)[0]["concept"] == ""
    first, second = err.splitlines()
    assert "provisional" in first and "--tokenizer FILE" in second
    assert describe(photo, *BOX, "--no-captions", "--json", model=bare_folder) == 0
    assert "--tokenizer" not in capsys.readouterr().err


def test_concepts_and_tokenizer_can_be_given(photo, bare_folder, folder, capsys):
    (result,) = describe_json(capsys, photo, *BOX, "--concepts", folder, "--tokenizer", folder, model=bare_folder)
    assert result["concept"] in ("frog", "green bus", "sky")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--box x0,y0,x1,y1, --point x,y or --mask FILE"),
        (["--everything", *BOX], "not both"),
        (["--box", "1,2,3"], "--box 1,2,3: expected four numbers"),
        (["--box", "1,2,3,x"], "--box 1,2,3,x: expected four numbers"),
        (["--box", "30,30,10,40"], "region 0: box"),
        (["--box", "nan,0,10,40"], "NaN"),
        ([*BOX, "--box", "500,500,510,510"], "region 1: box"),
        (["--point", "1"], "--point 1: expected x,y"),
        (["--point", "1,2,7"], "--point 1,2,7: expected x,y"),
        (["--point", " "], "expected x,y"),
        (["--mask", "nowhere.png"], "nowhere.png"),
        ([*BOX, "--out", "a.gif"], "a.gif: unknown picture format; use one of .png"),
        ([*BOX, "--out", "no/such/a.png"], "there is no folder no/such"),
        ([*BOX, "--top-k", "0"], "--top-k"),
        ([*BOX, "--device", "warp9"], 'device "warp9"'),
        ([*BOX, "--dtype", "int8"], 'dtype "int8"'),
        ([*BOX, "--model", "tap-tinny"], "tap-tinny"),
        ([*BOX, "--concepts", "nowhere"], "nowhere"),
        ([*BOX, "--tokenizer", "nowhere.model"], "nowhere.model"),
        ([*BOX, "--colour"], "--colour"),
        (["--box"], "--box"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(photo, folder, capsys, options, message):
    assert message in assert_fails(capsys, describe(photo, *options, model=folder))
    assert files(photo.parent) == {"photo.jpg"}


def test_bad_pictures(tmp_path, folder, capsys):
    assert "nowhere.jpg" in assert_fails(capsys, describe(tmp_path / "nowhere.jpg", *BOX, model=folder))
    (tmp_path / "text.jpg").write_text("not a picture")
    assert "text.jpg" in assert_fails(capsys, describe(tmp_path / "text.jpg", *BOX, model=folder))
    assert "text.jpg" in assert_fails(capsys, describe(tmp_path / "text.jpg", *BOX, "--json", model=folder))
    assert files(tmp_path) == {"text.jpg"}


def test_a_folder_is_no_picture(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "folder" in assert_fails(capsys, describe(Path("."), *BOX, model=folder))


def test_the_picture_itself_is_never_overwritten(photo, folder, capsys):
    before = photo.read_bytes()
    assert "overwrite" in assert_fails(capsys, describe(photo, *BOX, "--out", photo, model=folder))
    assert photo.read_bytes() == before


def test_a_failed_write_leaves_nothing(photo, folder, capsys, monkeypatch):
    def full_disk(self, stream, **options):
        stream.write(b"half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    status = describe(photo, *BOX, model=folder)
    out, err = capsys.readouterr()
    assert status == 2 and out.split()[0] == "#"  # the results are not lost
    assert err.count("\n") == 1 and f"{photo.stem}.tap.png" in err and "No space left" in err
    assert files(photo.parent) == {"photo.jpg"}


def raising(error):
    def raise_it(*args):
        raise error

    return raise_it


def test_interrupt_is_130_and_bugs_keep_their_traceback(photo, capsys, monkeypatch):
    monkeypatch.setattr(cli, "check_inputs", raising(KeyboardInterrupt()))
    assert "interrupted" in assert_fails(capsys, describe(photo, *BOX, model="any"), code=130)
    monkeypatch.setattr(cli, "check_inputs", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        describe(photo, *BOX, model="any")


def row(index: int, caption: str) -> dict:
    names = [["frog", 0.5], ["toad", 0.25]]
    return {
        "iou": 0.9, "box": [index, 0, 100, 100], "concept": "frog", "concept_score": 0.5,
        "caption": caption, "concepts": names,
    }  # fmt: skip


def test_table_fits_the_terminal():
    results = [row(1, "a green frog on a very large leaf in a pond"), row(2, "frog")]
    wide = cli._table(results, None).splitlines()
    assert wide[1] == "1  frog     0.50   0.90  1,0,100,100  a green frog on a very large leaf in a pond"
    assert wide[2].split() == ["toad", "0.25"]
    narrow = cli._table(results, 64).splitlines()
    assert max(map(len, narrow)) <= 64
    column = narrow[1].index("a green")
    captions = " ".join(line[column:].strip() for line in narrow[1:] if line[column:])
    assert captions == "a green frog on a very large leaf in a pond frog"


def test_table_of_a_nameless_empty_mask():
    result = {"iou": -0.1, "box": None, "concept": "", "concept_score": 0.0, "caption": ""}
    assert cli._table([result], 80).splitlines()[1].split() == ["1", "-", "-0.10", "empty"]


def test_help_names_commands_and_examples(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "describe" in capsys.readouterr().out
    for command in ("describe", "convert"):
        assert cli.main([command, "--help"]) == 0
        assert f"Example: tap-llm {command}" in capsys.readouterr().out


def test_convert_makes_a_folder_that_describe_takes(photo, folder, capsys, tmp_path):
    checkpoint, out = tmp_path / "official.safetensors", tmp_path / "converted"
    model = TapForConditionalGeneration.from_pretrained(folder)
    official = export_official(model, TapImageProcessor(size={"longest_edge": 256}))
    save_file({name: torch.tensor(value) for name, value in official.items()}, checkpoint)
    assert cli.main(["convert", str(checkpoint), str(out), "--concepts", folder]) == 0
    written, note = capsys.readouterr()
    assert written == f"wrote {out}: every tensor has its place\n" and "--tokenizer" in note
    ours = describe_json(capsys, photo, *BOX, "--no-captions", model=folder)
    assert describe_json(capsys, photo, *BOX, "--no-captions", model=str(out)) == ours
    assert "not an empty folder" in assert_fails(capsys, cli.main(["convert", str(checkpoint), str(out)]))
    assert "none.pkl" in assert_fails(capsys, cli.main(["convert", "none.pkl", str(tmp_path / "new")]))
    assert "new" not in files(tmp_path)


def test_runs_as_a_module(photo, folder):
    command = [sys.executable, "-m", "tap_llm.cli", "describe", str(photo), "--model", folder, "--device", "cpu"]
    done = subprocess.run([*command, *BOX, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["region"] == {"box": [10, 20, 60, 50]}
    assert done.stderr == ""  # nothing of what libraries say
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "") and failed.stderr.count("\n") == 1


def test_a_picture_too_large_for_its_format_is_named(folder, capsys, tmp_path):
    wide, target = tmp_path / "wide.png", tmp_path / "out.webp"
    Image.new("RGB", (16384, 2)).save(wide)
    status = describe(wide, "--box", "0,0,90,2", "--no-captions", "--out", target, model=folder)
    out, err = capsys.readouterr()
    assert status == 2 and out.split()[0] == "#"
    assert err.count("\n") == 1 and str(target) in err and "16384x" in err and "--out" in err
    assert files(tmp_path) == {"wide.png"}


def test_damaged_models_are_one_line(photo, bare_folder, capsys, tmp_path):
    model = tmp_path / "model"
    copytree(bare_folder, model)
    (model / "config.json").write_text("[]")
    assert f"{model} cannot be loaded" in assert_fails(capsys, describe(photo, *BOX, model=str(model)))


def test_convert_of_a_picture_says_so(photo, capsys, tmp_path):
    assert "is no checkpoint" in assert_fails(capsys, cli.main(["convert", str(photo), str(tmp_path / "out")]))
