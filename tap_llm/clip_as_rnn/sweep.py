"""Tries settings on a picture: what does not depend on them is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .modeling import ClipAsRnn
from .outputs import CarOutput
from .picture import CarImage


def sweep(
    car: ClipAsRnn, image: Any, queries: Sequence[str], settings: Mapping[str, Sequence[Any]], **options: Any
) -> Iterator[tuple[dict[str, Any], CarOutput]]:
    """Run CaR with every combination of settings.

    The picture goes through f once, every text once, and g sees nothing twice.

    Args:
        car: the model.
        image: see `ClipAsRnn.__call__`.
        queries: see there.
        settings: values to try by the name of a field of [`CarConfig`], such as
            `{"mask_threshold": [0.3, 0.5], "keep_threshold": [0.2, 0.4, 0.6]}`.
        options: other arguments of the call.

    Yields:
        The values of a combination, and what was found with them.

    Raises:
        InputError: see `ClipAsRnn.__call__`.
    """
    encoded = image if isinstance(image, CarImage) else car.encode(image)
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        yield chosen, car(encoded, queries, **chosen, **options)


__all__ = ["sweep"]
