"""Broken samples during training: skipped, counted, named; too many of them stop the run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from ..errors import InputError
from .samples import RegionSample

T = TypeVar("T")
_REMEMBERED = 5  # messages kept for the report


class BrokenCount:
    """Counts good and broken samples, over all processes that inherit it: data workers are judged together.

    Args:
        max_share: more than this share of broken samples stops the run.
        min_seen: so many samples are seen before the share is judged.

    Attributes:
        messages: the first few that this process met, each with the place of its sample.
    """

    def __init__(self, max_share: float = 0.01, min_seen: int = 100) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"max_share must lie between 0 and 1, got {max_share}")
        self.max_share, self.min_seen = max_share, min_seen
        self._counts = multiprocessing.Array("q", 2)  # seen and broken
        self.messages: list[str] = []

    @property
    def seen(self) -> int:
        """Samples asked for so far."""
        return self._counts[0]

    @property
    def broken(self) -> int:
        """Those of them that were broken; one that is asked for in every epoch counts every time."""
        return self._counts[1]

    def add(self, problem: str | None = None) -> None:
        """Count one sample; `problem` says what is wrong with it.

        Raises:
            InputError: too many were broken.
        """
        if problem is not None and problem not in self.messages and len(self.messages) < _REMEMBERED:
            self.messages.append(problem)
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += problem is not None
            seen, broken = self._counts[:]
        if seen >= self.min_seen and broken > self.max_share * seen:
            raise InputError(
                f"{self.report()}. That is more than {self.max_share:.1%}: mend the data (tap-llm data validate names "
                "every broken record), or allow a larger share"
            )

    def report(self) -> str:
        """One line: how many, and the first few of them."""
        more = self.broken - len(self.messages) if len(self.messages) == _REMEMBERED else 0
        listed = "; ".join(self.messages) + (f"; and {more} more" if more > 0 and self.messages else "")
        return f"{self.broken} of {self.seen} samples are broken" + (f": {listed}" if listed else "")


class SkipBroken(Sequence[T], Generic[T]):
    """A sequence of samples without the broken ones, of the same length.

    A broken sample is replaced by the next good one, so that index i always gives the same, whatever was asked for
    before: shards and resumed runs stay exact.

    Args:
        samples: any random-access source; its `where(index)`, where there is one, names places in messages.
        prepare: what training makes of a sample; a sample on which it raises [`InputError`] or `OSError` is
            broken. With [`checked`] a sample is read in full and returned.
        max_share: see [`BrokenCount`].
        min_seen: see [`BrokenCount`].

    Raises:
        InputError: on access, if too many samples are broken, or all of them.
    """

    def __init__(
        self,
        samples: Sequence[RegionSample],
        prepare: Callable[[RegionSample], T],
        max_share: float = 0.01,
        min_seen: int = 100,
    ) -> None:
        self.samples = samples
        self.prepare = prepare
        self.tally = BrokenCount(max_share, min_seen)
        self._problems: dict[int, str] = {}  # known to be broken: not read again

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> T:  # type: ignore[override]
        total = len(self.samples)
        if not -total <= index < total:
            raise IndexError(f"sample {index} of {total}")
        for step in range(total):
            candidate = (index + step) % total
            if candidate not in self._problems:
                try:
                    good = self.prepare(self.samples[candidate])
                except (InputError, OSError) as error:
                    self._problems[candidate] = with_place(self.samples, candidate, error)
                else:
                    self.tally.add()
                    return good
            self.tally.add(self._problems[candidate])
        raise InputError(f"no sample is usable: {self.tally.report()}")


def skip_broken(
    samples: Iterable[RegionSample], prepare: Callable[[RegionSample], T], count: BrokenCount
) -> Iterator[T]:
    """The same for a stream: prepared samples in order, broken ones left out and counted in `count`.

    Args:
        samples: an iterable whose iterator goes on after an error, as those of `SampleStream` and readers do.
        prepare: see [`SkipBroken`].
        count: the tally.
    """
    stream = iter(samples)
    while True:
        name = "a sample"
        try:
            sample = next(stream)
            name = f"sample {sample.id}" if sample.id else name
            good = prepare(sample)
        except StopIteration:
            return
        except (InputError, OSError) as error:
            count.add(f"{name}: {error}")
        else:
            count.add()
            yield good


def checked(sample: RegionSample) -> RegionSample:
    """The sample itself, after all of it was read once."""
    sample.check()
    return sample


def with_place(samples: Sequence[RegionSample], index: int, error: Exception) -> str:
    """The message with the sample's place in front, once."""
    where = getattr(samples, "where", "record {}".format)(index)
    text = str(error)
    return text if text.startswith(f"{where}:") else f"{where}: {text}"
