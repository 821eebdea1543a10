"""Runs that go on where they stopped, and results that say where they come from."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from made_up_benchmark import MODEL as SINE
from made_up_benchmark import Sines

from eval.base import Benchmark, Example, Scores, describe_model, describe_modules, fingerprint, predictions_path, run
from eval.provenance import hash_tensors
from tap_llm.errors import InputError

MODEL = {"name": "m", "sha256": "1"}


class Squares(Benchmark):
    """Predicts the square of a number; a number that is None cannot be read."""

    protocol = "squares-v1"
    unit = "numbers"

    def __init__(self, numbers, stop_at=None, power=2):
        self.numbers, self.stop_at, self.power, self.asked = numbers, stop_at, power, []

    def examples(self):
        return self

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        if self.numbers[index] is None:
            raise InputError(f"number {index} is damaged")
        return Example(str(index), fingerprint(self.numbers[index]))

    def predict(self, example):
        if example.id == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(example.id)
        return {"value": self.numbers[int(example.id)] ** self.power}

    def score(self, predictions):
        return Scores({"mean": np.mean([prediction["value"] for prediction in predictions]).item()})

    def settings(self):
        return {"power": self.power}

    def count(self, prediction):
        return 2


@pytest.fixture
def go(tmp_path):
    def start(benchmark, model=MODEL, **options):
        return run(benchmark, tmp_path / "out" / "results.json", model, report=lambda line: None, **options)

    return start


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "results.json"


def run_sines(out, benchmark=None, **options):
    return run(benchmark or Sines(), out, SINE, report=lambda line: None, progress=False, **options)


def test_results_file(go, out):
    finished = go(Squares([1, 2, 3]), command=["--x"])
    results = json.loads(out.read_text())
    assert results == finished.results
    assert results["protocol"] == "squares-v1"
    assert results["metrics"] == {"mean": pytest.approx(14 / 3)}
    assert results["examples"] == 3
    assert results["numbers"] == 6
    assert results["model"] == MODEL
    assert results["settings"] == {"power": 2}
    assert results["command"] == ["--x"]
    assert results["speed"]["numbers_per_second"] > results["speed"]["examples_per_second"] > 0
    assert {"tap_llm", "torch", "transformers", "python"} <= results["versions"].keys()
    assert len(results["data"]["sha256"]) == 64
    assert [prediction["id"] for prediction in finished.predictions] == ["0", "1", "2"]


def test_goes_on_after_an_interruption(go, out):
    numbers = [0.1, 0.7, 1 / 3, 4, 5]
    whole = go(Squares(numbers)).results
    out.unlink()
    predictions_path(out).unlink()
    with pytest.raises(KeyboardInterrupt):
        go(Squares(numbers, stop_at="3"))
    assert not out.exists()
    rest = Squares(numbers)
    resumed = go(rest).results
    assert rest.asked == ["3", "4"]
    assert {**resumed, "speed": None} == {**whole, "speed": None}


def test_half_written_line_is_cut_off(go, out):
    go(Squares([1, 2, 3]))
    cache = predictions_path(out)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-9])
    again = Squares([1, 2, 3])
    go(again)
    assert again.asked == ["2"]
    assert cache.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}", b"5", b'{"id": 1}', b'"', b"\xff"])
def test_what_follows_a_broken_line_is_made_anew(go, out, line):
    go(Squares([1, 2, 3]))
    cache = predictions_path(out)
    whole = cache.read_bytes()
    lines = whole.splitlines()
    cache.write_bytes(b"\n".join([*lines[:2], line, *lines[3:], b""]))
    again = Squares([1, 2, 3])
    go(again)
    assert again.asked == ["1", "2"]
    assert cache.read_bytes() == whole


def test_finished_run_is_only_scored_again(go):
    first = go(Squares([1, 2, 3])).results
    again = Squares([1, 2, 3])
    second = go(again).results
    assert again.asked == []
    assert second["metrics"] == first["metrics"]
    nothing = {"examples_per_second": None, "numbers_per_second": None}
    assert second["speed"] == {**nothing, "per_process": nothing}


def test_changed_example_is_predicted_anew(go):
    first = go(Squares([1, 2, 3])).results
    changed = Squares([1, 5, 3])
    second = go(changed).results
    assert changed.asked == ["1"]
    assert second["metrics"]["mean"] == pytest.approx(35 / 3)
    assert second["data"] != first["data"]


@pytest.mark.parametrize(
    ("power", "model", "fresh"), [(3, MODEL, False), (2, {**MODEL, "sha256": "2"}, False), (2, MODEL, True)]
)
def test_predictions_of_others_do_not_count(go, power, model, fresh):
    go(Squares([1, 2, 3]))
    again = Squares([1, 2, 3], power=power)
    go(again, model=model, fresh=fresh)
    assert again.asked == ["0", "1", "2"]


def test_same_weights_under_another_name_count(go):
    go(Squares([1, 2]))
    again = Squares([1, 2])
    go(again, model={**MODEL, "name": "elsewhere", "device": "cuda:0"})
    assert again.asked == []


def test_unreadable_examples_are_named(go):
    results = go(Squares([1, None, 3])).results
    assert results["faults"] == ["number 1 is damaged"]
    assert results["examples"] == 2


@pytest.mark.parametrize(("numbers", "message"), [([None], "number 0 is damaged"), ([], "no examples")])
def test_nothing_to_evaluate(go, numbers, message):
    with pytest.raises(InputError, match=message):
        go(Squares(numbers))


def test_failed_predictions_are_named_and_scored(out):
    finished = run_sines(out)
    results = finished.results
    assert results["faults"] == ["number 4 is damaged", "9: below zero"]
    assert [results[key] for key in ("examples", "examples_unusable", "numbers")] == [22, 1, 21]
    [failed] = [prediction for prediction in finished.predictions if "fault" in prediction]
    assert failed == {"number": -1.0, "fault": "below zero", "id": "9"}
    assert results["metrics"]["numbers"] == pytest.approx(sum(0.1 * n for n in range(23)) - 0.4 - 0.9 - 1)


def test_failed_predictions_are_tried_again(out):
    run_sines(out, batch_size=4)
    again = Sines()
    run_sines(out, again)
    assert again.asked == [["9"]]


@pytest.mark.parametrize("batch_size", [2, 4, 50])
def test_metrics_do_not_depend_on_batches(tmp_path, batch_size):
    whole, batched = run_sines(tmp_path / "1.json"), run_sines(tmp_path / "2.json", batch_size=batch_size)
    assert batched.results["metrics"] == whole.results["metrics"]
    assert batched.predictions == whole.predictions
    assert predictions_path(tmp_path / "1.json").read_bytes() == predictions_path(tmp_path / "2.json").read_bytes()


def test_batches_are_asked_at_once_and_the_failing_one_is_found(out):
    benchmark = Sines()
    run_sines(out, benchmark, batch_size=4)
    assert benchmark.asked[:3] == [["0", "1", "2", "3"], ["5", "6", "7"], ["8", "9", "10", "11"]]
    assert benchmark.asked[3:7] == [["8"], ["9"], ["10"], ["11"]]
    assert benchmark.asked[7] == ["12", "13", "14", "15"]


def test_limit(out):
    whole = run_sines(out)
    few = Sines()
    limited = run_sines(out, few, limit=7)
    assert (few.asked, limited.results["examples"], limited.results["limit"]) == ([], 6, 7)
    assert run_sines(out).predictions == whole.predictions  # the others are still there


def test_second_use_of_an_id_is_a_fault(go):
    class Twice(Squares):
        def __getitem__(self, index):
            return super().__getitem__(0 if index == 2 else index)

        def truth(self, example):
            return {"number": self.numbers[int(example.id)]}

        def score(self, predictions):
            return Scores({"seen": [[one["id"], one["number"], one.get("value")] for one in predictions]})

    results = go(Twice([1, 2, 3])).results
    assert results["faults"] == ["0: this id is used twice; example 2 counts as wrong"]
    assert (results["examples"], results["examples_unusable"]) == (3, 0)
    assert results["metrics"]["seen"] == [["0", 1, 1], ["1", 2, 4], ["0 (example 2)", 1, None]]


def test_faults_of_scores_are_kept(go):
    class Picky(Squares):
        def score(self, predictions):
            return Scores({}, faults=["region 3 of 0: empty mask"])

    assert go(Picky([1, None])).results["faults"] == ["number 1 is damaged", "region 3 of 0: empty mask"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run(Squares([1]), tmp_path / "file" / "results.json", MODEL)


def test_fingerprint_sees_every_part():
    pixels = np.arange(6, dtype=np.uint8)
    parts = [
        (pixels, "a"), (pixels.reshape(2, 3), "a"), (pixels.astype(np.int16), "a"), (pixels + 1, "a"), (pixels, "b"),
    ]  # fmt: skip
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint(pixels, "a") == fingerprint(pixels.copy(), "a")
    flags = np.array([True, False, True])
    assert fingerprint(flags) != fingerprint(~flags)


def test_hash_of_tensors():
    tensors = {"b": torch.zeros(2, dtype=torch.bfloat16), "a": torch.tensor(1.5)}
    assert hash_tensors(tensors) == hash_tensors(dict(reversed(tensors.items())))
    assert hash_tensors(tensors) != hash_tensors({**tensors, "a": torch.tensor(1.6)})
    assert hash_tensors(tensors) != hash_tensors(tensors, "text")
    digest = hashlib.sha256(hashlib.sha256(b"").hexdigest().encode())  # by hand
    digest.update(b"a torch.float32 []" + np.float32(1.5).tobytes())
    digest.update(b"b torch.bfloat16 [2]" + bytes(4))
    assert hash_tensors(tensors) == digest.hexdigest()


def test_models_are_told_apart_by_weights(pipe, make_pipe):
    ours, same, other = (describe_model(model, "x") for model in (pipe, make_pipe(), make_pipe(seed=4)))
    assert ours == same
    assert ours["sha256"] != other["sha256"]
    assert ours["concepts"] == len(pipe.concepts)
    assert ours["parameters"] == sum(parameter.numel() for parameter in pipe.model.parameters())
    assert describe_model(make_pipe(words=False), "x")["concepts_sha256"] is None


def test_models_of_several_modules():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, dtype=torch.float16)
    both, turned = describe_modules("pair", first, second), describe_modules("pair", second, first)
    assert (both["parameters"], both["dtype"], turned["dtype"]) == (16, "float32", "float16")
    assert both["device"] == "cpu" and both["name"] == "pair"
    assert len({both["sha256"], turned["sha256"], describe_modules("pair", first)["sha256"]}) == 3
    assert describe_modules("one", first)["sha256"] == hash_tensors(first.state_dict())
