"""What TAP's concept head learns of regions that have names: the same distribution over concepts, without a teacher.

Where a CLIP model is the teacher (TAP, arXiv:2312.09128, section 3), see `target_cache`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..concepts import ConceptSpace
from ..errors import InputError

UNKNOWN_NAME = -100  # what PyTorch's losses leave out


class NameTargets:
    """The teacher that knows only the names of regions.

    Args:
        concepts: the names that can be learnt.
        smoothing: share of the probability that goes evenly to all concepts; for the loss.

    Raises:
        InputError: `smoothing` is not in [0, 1).
    """

    def __init__(self, concepts: ConceptSpace, smoothing: float = 0.1) -> None:
        if not 0 <= smoothing < 1:
            raise InputError(f"smoothing must be at least 0 and less than 1, got {smoothing}")
        self.smoothing = smoothing
        self.num_concepts = len(concepts)
        self._examples = ", ".join(map(repr, concepts.names[:3]))
        folded = {_fold(name): index for index, name in reversed(list(enumerate(concepts.names)))}
        self._index = folded | {name: index for index, name in enumerate(concepts.names)}

    def indices(self, names: Iterable[str | None]) -> Tensor:
        """Concept of each name: the same string, else the same but for case, "_" and "-" (as TAP's lists merge).

        Args:
            names: N names; None where a region has none.

        Returns:
            (N,) int64, `UNKNOWN_NAME` (-100) where the space does not know the name.
        """
        return torch.tensor([self._find(name) for name in names], dtype=torch.int64)

    def _find(self, name: str | None) -> int:
        if name is None:
            return UNKNOWN_NAME
        return self._index.get(name, self._index.get(_fold(name), UNKNOWN_NAME))

    def check(self, names: Iterable[str | None]) -> float:
        """Share of a data set's named regions whose name is known.

        Raises:
            InputError: none is: nothing could be learnt.
        """
        named = [name for name in names if name is not None]
        known = int((self.indices(named) != UNKNOWN_NAME).sum())
        if known:
            return known / len(named)
        told = f"such as {named[0]!r}" if named else "for its regions have no category"
        raise InputError(
            f"no name of the data set is among the {self.num_concepts} concepts, {told}; the concepts are "
            f"{self._examples}, ...: choose other concepts"
        )


def _fold(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
