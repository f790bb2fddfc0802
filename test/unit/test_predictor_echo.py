"""How much of an output repeats: against a plain count, in pieces, and after a move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_star.predictor import echo
from sglang_star.predictor.echo import GRAM, MEMORY, WINDOW, Echo


def counted(ids: list[int], visible: int) -> float:
    """The definition, word for word."""
    hits = 0
    for end in range(max(visible - WINDOW, 0) + 1, visible + 1):
        run = ids[end - GRAM : end]
        begins = range(max(end - MEMORY, GRAM), end)
        hits += end >= GRAM and any(ids[other - GRAM : other] == run for other in begins)
    return hits / WINDOW


def looping(period: int, length: int) -> list[int]:
    return [i % period for i in range(length)]


@given(st.lists(st.integers(0, 2), max_size=200), st.data())
@settings(max_examples=60, deadline=None)
def test_it_counts_what_it_says_however_it_is_read(ids: list[int], data: st.DataObject) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(0, len(ids)), min_size=1, max_size=5)))
    read = Echo()
    assert [read.share(ids, n) for n in lengths] == [counted(ids, n) for n in lengths]


def test_a_loop_is_heard_and_new_text_is_not() -> None:
    assert Echo().share(looping(10, 300), 300) == 1.0
    assert Echo().share(list(range(300)), 300) == 0.0


@pytest.mark.parametrize(("period", "share"), [(MEMORY, 1.0), (MEMORY + 1, 0.0)])
def test_it_looks_back_so_far_and_no_further(period: int, share: float) -> None:
    ids = looping(period, 3 * MEMORY)
    step_by_step = Echo()
    for visible in range(1, len(ids) + 1):
        last = step_by_step.share(ids, visible)
    assert last == Echo().share(ids, len(ids)) == share


def test_another_instance_hears_the_same() -> None:
    generator = np.random.default_rng(0)
    ids = [int(i) for i in generator.integers(0, 6, 5000)]
    home = Echo()
    heard = [home.share(ids, visible) for visible in range(1, len(ids) + 1)]
    for moved_at in (100, 1500, 4999):
        assert Echo().share(ids, moved_at) == heard[moved_at - 1]
    assert len(home._last) <= 2 * MEMORY


def test_a_collection_is_read_like_a_stream() -> None:
    ids = np.array(looping(7, 90), np.int32)
    tokens = np.array([1, 21, 41, 61, 81])
    found = echo.shares(ids, tokens)
    assert found == pytest.approx([counted(ids.tolist(), int(n)) for n in tokens])


def test_an_output_shorter_than_said_is_read_as_far_as_it_goes() -> None:
    assert Echo().share([], 5) == 0.0
