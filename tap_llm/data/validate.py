"""Read a whole file of samples and name everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import InputError
from .readers import SampleReader


@dataclass
class Validation:
    """What was found; filled while [`validate`] is consumed.

    Attributes:
        good: samples without a fault.
        broken: samples with at least one.
        regions: regions of the good ones.
    """

    good: int = 0
    broken: int = 0
    regions: int = 0
    _ids: set[str] = field(default_factory=set, repr=False)

    def check(self, reader: SampleReader, index: int) -> list[str]:
        """Read sample `index` in full, count it, and return its faults, the place in front."""
        where = reader.where(index)
        try:
            sample = reader[index]
            problems = [f"{where}: {problem}" for problem in sample.problems()]
            if sample.id and sample.id in self._ids:
                problems.append(f"{where}: id: {sample.id!r} is used twice")
            self._ids |= {sample.id} - {""}
        except InputError as error:
            problems = [str(error)]
        if problems:
            self.broken += 1
        else:
            self.good += 1
            self.regions += len(sample.regions)
        return problems


def validate(reader: SampleReader, result: Validation, limit: int | None = None) -> Iterator[list[str]]:
    """Check the first `limit` samples (all by default), one after the other.

    Args:
        reader: from `open_samples`.
        result: the counts, kept up to date.
        limit: check so many samples.

    Yields:
        The faults of each sample, empty for a good one. Faults of the file as a whole are in `reader.faults`.
    """
    total = len(reader) if limit is None else min(limit, len(reader))
    return (result.check(reader, index) for index in range(total))
