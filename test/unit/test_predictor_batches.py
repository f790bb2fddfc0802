"""A batch computed at once says what its requests say one by one, whoever comes, goes or moves."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from sglang_star.predictor import head as heads
from sglang_star.predictor.estimator import GROUP, Estimator
from sglang_star.predictor.head import HEADS, Head
from sglang_star.predictor.memory import Memory
from sglang_star.predictor.state import Fusion, export_state, import_state
from sglang_star.star_request import star_of
from unit import predictor_cases as cases
from unit.reference_estimator import Reference

ALWAYS = 10**12
"""Multiplications enough to look at everybody in every step."""


def request(generator: np.random.Generator) -> Any:
    """One with an output that repeats itself now and then."""
    req = cases.request(
        prompt=int(generator.integers(1, 300)), limit=int(generator.integers(30, 2000))
    )
    req.output_ids = generator.integers(0, 5, 3000).tolist()
    req.tokens = 0
    return req


def check(reqs: list[Any]) -> None:
    for req in reqs:
        assert star_of(req).estimate == pytest.approx(req.wanted.tolist(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("head", [cases.head(), *map(heads.load, sorted(HEADS.glob("*")))])
def test_estimates_are_those_of_single_requests(head: Head) -> None:
    generator = np.random.default_rng(5)
    estimator, reference = Estimator(head, ALWAYS), Reference(head)
    reqs: list[Any] = []
    for _ in range(60):
        # About one in a dozen comes, and one goes; the order changes; some gain no token.
        reqs = [req for req in reqs if generator.random() > 0.08]
        reqs += [request(generator) for _ in range(int(generator.integers(0, 4)))]
        generator.shuffle(reqs)  # type: ignore[arg-type]
        if not reqs:
            continue
        rows = generator.standard_normal((len(reqs) + 2, head.width)).astype(np.float32)
        visible: list[int | None] = []
        for i, req in enumerate(reqs):
            gains = generator.random() > 0.1
            req.tokens += gains
            visible.append(req.tokens if gains else None)
            if generator.random() < 0.02:
                rows[i, 0] = np.nan
        estimator.step(rows, reqs, visible)
        reference.step(rows, reqs, visible)
        check([req for req, tokens in zip(reqs, visible, strict=True) if tokens])


def test_a_move_in_the_middle_of_a_batch_changes_nothing() -> None:
    head, generator = cases.head(), np.random.default_rng(6)
    here, there, reference = Estimator(head, ALWAYS), Estimator(head, ALWAYS), Reference(head)
    batches = ([request(generator) for _ in range(6)], [request(generator) for _ in range(6)])
    for step in range(1, 80):
        for estimator, reqs in zip((here, there), batches, strict=True):
            rows = generator.standard_normal((len(reqs), head.width)).astype(np.float32)
            estimator.step(rows, reqs, [step] * len(reqs))
            reference.step(rows, reqs, [step] * len(reqs))
            check(reqs)
        # One goes each way: the state is bytes, and the other's row may be any.
        for source, target in itertools.permutations(batches):
            moved = source.pop(int(generator.integers(len(source))))
            data = export_state(moved)
            del moved._star
            import_state(moved, data)
            target.insert(int(generator.integers(len(target))), moved)


def test_a_request_that_comes_back_to_the_same_batch_brings_what_it_has_now() -> None:
    """It is the only one here, so that this engine makes no step while it is away."""
    head, generator = cases.head(), np.random.default_rng(7)
    here, there, reference = Estimator(head), Estimator(head), Reference(head)
    req = request(generator)
    for step in range(1, 30):
        rows = generator.standard_normal((1, head.width)).astype(np.float32)
        (here, there)[step // 5 % 2].step(rows, [req], [step])
        reference.step(rows, [req], [step])
        check([req])
        if step % 5 == 4:
            data = export_state(req)
            star_of(req).fusion = None
            import_state(req, data)


def test_a_large_batch_is_looked_at_in_turns() -> None:
    head, generator = cases.head(), np.random.default_rng(8)
    estimator, reference = Estimator(head, 1), Reference(head)
    reqs = [request(generator) for _ in range(3 * GROUP)]
    looked: dict[int, list[int]] = {i: [] for i in range(len(reqs))}
    for step in range(1, 8 * GROUP + 1):
        before = [star_of(req).estimate for req in reqs]
        rows = generator.standard_normal((len(reqs), head.width)).astype(np.float32)
        estimator.step(rows, reqs, [step] * len(reqs))
        reference.step(rows, reqs, [step] * len(reqs))
        for i, req in enumerate(reqs):
            estimate, room = star_of(req).estimate, req.sampling_params.max_new_tokens - step
            assert all(0 <= value <= max(room, 0) for value in estimate)
            if estimate == pytest.approx(req.wanted.tolist(), rel=1e-4, abs=1e-3):
                looked[i].append(step)
            elif estimate:
                # A token later, a token less to come.
                less = np.clip(np.array(before[i]) - 1, 0, max(room, 0))
                assert estimate == pytest.approx(less.tolist(), abs=1e-6)
    # One a step on average: a group of eight every eight steps, nobody twice before all were.
    turns = [steps[0] for steps in looked.values()]
    assert sorted(turns) == sorted([GROUP, 2 * GROUP, 3 * GROUP] * GROUP)
    for steps in looked.values():
        assert steps[0] + 3 * GROUP in steps


def test_memory_is_given_back_with_the_request() -> None:
    estimator = Estimator(cases.head())
    for _ in range(50):
        reqs = [cases.request() for _ in range(20)]
        estimator.step(np.ones((20, 4), np.float32), reqs, [2] * 20)
    assert len(estimator._memory.steps) == 64


def test_memory_grows_and_keeps_what_it_has() -> None:
    memory = Memory(3, rows=1)
    fusions = [Fusion(memory) for _ in range(9)]
    for fusion in fusions:
        memory.add(np.array([fusion.row]), np.full((1, 3), fusion.row, np.float32))
    assert [fusion.recent.tolist() for fusion in fusions] == [[float(i)] * 3 for i in range(9)]
    del fusions[4]
    again = Fusion(memory)
    assert (again.row, again.steps, again.total.tolist()) == (4, 0, [0.0] * 3)
