"""Fusion per request: what is remembered, how it travels, and what a bad step does."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_star.errors import MalformedMessage
from sglang_star.predictor.estimator import Estimator
from sglang_star.predictor.state import export_state, import_state
from sglang_star.star_request import star_of
from unit import predictor_cases as cases

WIDTH = 4


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def test_every_request_that_grew_gets_ascending_estimates_within_its_limit() -> None:
    reqs = [cases.request(limit=limit) for limit in (5, 100, 10_000)]
    estimator = Estimator(cases.head())
    for tokens in range(1, 5):
        estimator.step(rows(3, tokens), reqs, [tokens] * 3)
        for req in reqs:
            estimate = star_of(req).estimate
            assert len(estimate) == 5
            assert list(estimate) == sorted(estimate)
            assert estimate[0] >= 0
            assert estimate[-1] <= req.sampling_params.max_new_tokens - tokens
    assert estimator.fallbacks == 0


def test_a_request_that_gained_nothing_is_left_alone() -> None:
    reqs = [cases.request(), cases.request()]
    Estimator(cases.head()).step(rows(2), reqs, [None, 1])
    assert not star_of(reqs[0]).estimate
    assert star_of(reqs[1]).estimate


def test_estimates_do_not_depend_on_the_company_in_the_batch() -> None:
    together = [cases.request(prompt=n) for n in (3, 30, 300)]
    estimator = Estimator(cases.head())
    estimator.step(rows(3), together, [1, 1, 1])
    for i, req in enumerate(together):
        alone = cases.request(prompt=len(req.origin_input_ids))
        Estimator(cases.head()).step(rows(3)[i : i + 1], [alone], [1])
        assert star_of(alone).estimate == pytest.approx(star_of(req).estimate, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_state_falls_back_to_age_and_is_counted(bad: float) -> None:
    req, other = cases.request(limit=1000), cases.request(limit=1000)
    estimator = Estimator(cases.head())
    batch = rows(2)
    batch[0, 1] = bad
    estimator.step(batch, [req, other], [60, 60])
    assert star_of(req).estimate == (6.0, 7.0, 8.0, 9.0, 10.0)
    assert estimator.fallbacks == 1
    # The bad step left nothing behind.
    estimator.step(rows(2, 1), [req, other], [61, 61])
    assert estimator.fallbacks == 1
    assert np.isfinite(star_of(req).fusion.total).all()
    assert star_of(req).fusion.steps == 1
    assert star_of(other).fusion.steps == 2


def test_a_moved_request_goes_on_as_if_it_had_stayed() -> None:
    stayed, moved, target = (cases.request(output=6) for _ in range(3))
    estimator = Estimator(cases.head())
    for step in range(5):
        estimator.step(rows(2, step)[[0, 0]], [stayed, moved], [step + 1] * 2)
    import_state(target, export_state(moved))
    assert star_of(target).estimate == star_of(moved).estimate
    elsewhere = Estimator(cases.head())
    estimator.step(rows(1, 9), [stayed], [6])
    elsewhere.step(rows(1, 9), [target], [6])
    assert star_of(target).estimate == pytest.approx(star_of(stayed).estimate, rel=1e-6)


def test_a_decode_instance_needs_nothing_of_what_prefill_saw() -> None:
    whole, decode_only = cases.request(output=4), cases.request(output=4)
    estimator, elsewhere = Estimator(cases.head()), Estimator(cases.head())
    estimator.step(rows(1, 1), [whole], [1])
    assert export_state(whole) == b""  # only prefill was seen, and that tells nobody anything
    for tokens in (2, 3, 4):
        estimator.step(rows(1, tokens), [whole], [tokens])
        elsewhere.step(rows(1, tokens), [decode_only], [tokens])
        assert star_of(whole).estimate == star_of(decode_only).estimate


def test_a_state_of_another_head_is_started_again() -> None:
    source, target = cases.request(), cases.request()
    Estimator(cases.head(width=7)).step(np.ones((1, 7), np.float32), [source], [2])
    import_state(target, export_state(source))
    Estimator(cases.head()).step(rows(1), [target], [3])
    assert star_of(target).fusion.steps == 1


def test_no_state_is_no_bytes_and_back() -> None:
    req = cases.request()
    assert export_state(req) == b""
    import_state(req, b"")
    assert star_of(req).fusion is None


def encoded(steps: int, recent: list[float], total: list[float], estimate: list[float]) -> bytes:
    def pack(values: list[float]) -> bytes:
        return np.array(values, "<f4").tobytes()

    return msgspec.msgpack.encode([steps, pack(recent), pack(total), estimate])


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"garbage",
        msgspec.msgpack.encode([1, b"abc", b"abc", []]),
        msgspec.msgpack.encode([1, bytes(4), bytes(8), []]),
        encoded(0, [1.0], [1.0], []),
        encoded(1, [], [], []),
        encoded(1, [1.0], [1.0, 2.0], []),
        encoded(1, [float("nan")], [1.0], []),
        encoded(1, [1.0], [1.0], [float("inf")]),
        encoded(1, [1.0] * 5000, [1.0] * 5000, []),
    ],
)
def test_bytes_that_are_no_state_change_nothing(data: bytes) -> None:
    req = cases.request()
    with pytest.raises(MalformedMessage):
        import_state(req, data)
    assert star_of(req).fusion is None


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        import_state(cases.request(), data)
