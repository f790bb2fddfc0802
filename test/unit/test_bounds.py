"""Ids and lengths that a model can take, and those that would end its engine."""

from __future__ import annotations

from array import array

import pytest

from sglang_star.engine.bounds import Bounds
from sglang_star.errors import MalformedMessage

BOUNDS = Bounds(vocabulary=100, context=8)


@pytest.mark.parametrize("ids", [(), (0,), (99,), (0, 99, 50), array("q", [5, 6])])
def test_tokens_of_the_model(ids: tuple[int, ...]) -> None:
    BOUNDS.check(ids, beside=5)


@pytest.mark.parametrize("ids", [(-1,), (100,), (5, 2**62, 6), (5, -(2**63))])
def test_others(ids: tuple[int, ...]) -> None:
    with pytest.raises(MalformedMessage, match="vocabulary of 100"):
        BOUNDS.check(ids)


def test_more_than_the_context() -> None:
    BOUNDS.check((1, 2, 3), beside=5)
    with pytest.raises(MalformedMessage, match="9 tokens do not fit a context of 8"):
        BOUNDS.check((1, 2, 3), beside=6)
    with pytest.raises(MalformedMessage):
        BOUNDS.check_length(9)
