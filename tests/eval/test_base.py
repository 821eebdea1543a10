"""Runs that go on where they stopped, and results that say where they come from."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

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


def test_finished_run_is_only_scored_again(go):
    first = go(Squares([1, 2, 3])).results
    again = Squares([1, 2, 3])
    second = go(again).results
    assert again.asked == []
    assert second["metrics"] == first["metrics"]
    assert second["speed"] == {"examples_per_second": None, "numbers_per_second": None}


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
