"""Targets from names alone."""

from __future__ import annotations

import pytest
import torch
from small_clip import make_space

from tap_llm.concepts import ConceptSpace
from tap_llm.data.targets import UNKNOWN_NAME, NameTargets
from tap_llm.errors import InputError


def test_names_are_found_in_the_space() -> None:
    space = ConceptSpace(["traffic light", "T-shirt", "t shirt", "dog"], torch.eye(4))
    names = NameTargets(space)
    found = names.indices(["dog", None, "Traffic_Light", "T-shirt", "t shirt", "t_shirt", "no such thing", ""])
    assert found.tolist() == [3, -100, 0, 1, 2, 2, -100, -100] and found.dtype == torch.int64
    assert UNKNOWN_NAME == -100 and names.smoothing == 0.1 and names.num_concepts == 4
    assert names.indices([]).shape == (0,)


def test_data_whose_names_are_all_unknown_is_refused() -> None:
    names = NameTargets(make_space())
    assert names.check(["cat", None, "cow", "dog", "cow"]) == 0.5
    with pytest.raises(InputError, match=r"3 concepts, such as 'cow'; the concepts are 'cat', 'dog', 'bus'"):
        names.check(["cow", None])
    with pytest.raises(InputError, match="no category"):
        names.check([None, None])
    with pytest.raises(InputError, match="smoothing"):
        NameTargets(make_space(), smoothing=1.0)
