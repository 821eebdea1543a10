"""Broken samples: replaced, counted, named; too many stop the run."""

from __future__ import annotations

import pytest

from tap_llm.data import BrokenCount, SkipBroken, checked, skip_broken
from tap_llm.data.readers import JsonlSamples
from tap_llm.errors import InputError


def lines(folder, broken, total=300):
    records = ["{" * 4 if i in broken else {"image": "1.png", "id": str(i)} for i in range(total)]
    return JsonlSamples(folder.lines("a.jsonl", records))


def number(sample):
    return int(sample.id)


def test_the_next_good_one_takes_the_place(folder):
    samples = SkipBroken(lines(folder, {3, 4, 299}), number, max_share=0.1)
    assert [samples[i] for i in (5, 4, 3, 299, 3)] == [5, 5, 5, 0, 5]
    assert list(samples) == [0, 1, 2, 5, 5, *range(5, 299), 0]


def test_counts_and_names(folder):
    samples = SkipBroken(lines(folder, {3, 4}), number)
    assert [samples[i] for i in (2, 3)] == [2, 5]
    assert (samples.tally.seen, samples.tally.broken) == (4, 2)
    report = samples.tally.report()
    assert report.startswith("2 of 4 samples are broken: line 4: not valid JSON")
    assert "; line 5: not valid" in report


def test_too_many_stop_the_run(folder):
    samples = SkipBroken(lines(folder, range(0, 300, 20)), number)
    with pytest.raises(InputError, match="5 of 100 samples are broken: line 1: .*more than 1.0%.*data validate"):
        list(samples)
    assert len(list(SkipBroken(lines(folder, range(0, 300, 20)), number, max_share=0.06))) == 300


def test_all_broken(folder):
    samples = SkipBroken(lines(folder, range(9), total=9), number)
    with pytest.raises(InputError, match="no sample is usable: 9 of 9 .*and 4 more"):
        samples[0]


def test_what_preparing_finds_counts_too(tmp_path, folder):
    folder.picture("1.png")
    path = folder.lines("a.jsonl", [{"image": f"{i}.png"} for i in range(3)])
    samples = SkipBroken(JsonlSamples(path), checked)
    assert samples[0].image == tmp_path / "1.png"
    assert samples.tally.messages[0].startswith("line 1: image: there is no file")


def test_streams(folder):
    count = BrokenCount()
    assert list(skip_broken(lines(folder, {3, 299}), number, count)) == [0, 1, 2, *range(4, 299)]
    assert (count.seen, count.broken) == (300, 2)
