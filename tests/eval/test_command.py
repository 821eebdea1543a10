"""What all commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_benchmark import MODEL, Sines

from eval.base import Run
from eval.command import (
    SHOWN_FAULTS,
    benchmark_parser,
    cli,
    common_arguments,
    evaluate,
    finish,
    load_pipeline,
    parse,
    speed_lines,
)
from tap_llm.errors import InputError


def parsed(*arguments: str, **options):
    parser = benchmark_parser("mine", "Head.")
    common_arguments(parser, **options)
    return parse(parser, arguments)


def test_results_have_a_place_by_default(tmp_path):
    args = parsed("--model", "some/folder/tap-mine", "--limit", "3")
    assert args.out == Path("runs/eval/mine-tap-mine.json")
    assert (args.limit, args.batch_size, args.device, args.command[:1]) == (3, 64, None, ["--model"])
    assert parsed("--out", "r.json", model="other").model == "other"


def test_what_is_not_asked_for(capsys):
    args = parsed("--out", "r.json", pipeline=False, limit=False)
    assert not {"limit", "tokenizer", "concepts"} & vars(args).keys()
    with pytest.raises(SystemExit):
        parsed("--out", "r.json", "--limit", "0")
    assert "--limit: must be at least 1, got 0" in capsys.readouterr().err


def test_pipeline_of_the_arguments(model_folder):
    pipe = load_pipeline(parsed("--model", str(model_folder), "--device", "cpu", "--dtype", "bfloat16"))
    assert (pipe.device.type, str(pipe.model.dtype)) == ("cpu", "torch.bfloat16")
    with pytest.raises(InputError, match="absent"):
        load_pipeline(parsed("--model", str(model_folder), "--concepts", "absent"))


def test_run_and_what_is_printed(tmp_path, capsys):
    args = parsed("--out", str(tmp_path / "r.json"), "--limit", "12")
    finished = finish(evaluate(Sines(), args, MODEL, batch_size=4), args, notes=["a note"])
    assert finished.results["command"] == args.command and finished.results["limit"] == 12
    lines = capsys.readouterr().out.splitlines()
    assert "NOT EVALUATED: number 4 is damaged" in lines and "NOT EVALUATED: 9: below zero" in lines
    assert any(line.split() == ["total", f"{finished.results['metrics']['total']:.3f}"] for line in lines)
    assert lines[-3] == "a note" and "numbers/s" in lines[-2]
    assert lines[-1] == f"wrote {tmp_path / 'r.json'} and {tmp_path / 'r.predictions.jsonl'}"


def test_only_some_faults_are_printed(tmp_path, capsys):
    speed = {"examples_per_second": None}
    results = {"metrics": {}, "faults": list(map(str, range(50))), "not_measured": {}, "speed": speed, "processes": 1}
    finish(Run(results, []), parsed("--out", str(tmp_path / "r.json")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "NOT EVALUATED" in line]
    assert len(lines) == SHOWN_FAULTS + 1 and f"{50 - SHOWN_FAULTS} more, all named in " in lines[-1]


def test_speed_in_all_and_of_each():
    each = {"examples_per_second": 1.0, "regions_per_second": 4.0}
    both = {"examples_per_second": 1.9, "regions_per_second": 7.5}
    expected = "1.9 examples/s, 7.5 regions/s in all; 1.0 examples/s, 4.0 regions/s in each of 2 processes"
    assert speed_lines({**both, "per_process": each}, 2) == [expected]
    assert speed_lines({**each, "per_process": each}, 1) == ["1.0 examples/s, 4.0 regions/s"]


def test_errors_are_messages(capsys):
    def fails(error):
        raise error

    assert cli(lambda: fails(InputError("no such thing"))) == 2
    assert cli(lambda: fails(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "no such thing\ninterrupted; the same command goes on from here\n"
    assert cli(lambda: None) == 0
