"""Histories written by hand: what a seed would seldom meet, and must not be lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_star.migration.cargo import Cargo
from sglang_star.migration.outgoing import Outgoing
from simulation.history import History
from simulation.plan import EngineShape, Event, Plan
from simulation.run import quiet
from simulation.shrink import story
from simulation.tokens import Spec
from simulation.transport import Fetch


def plan(*events: tuple[object, ...], overlap: bool, seed: int = 1) -> Plan:
    shape = EngineShape(page_size=1, pages=400, rows=8, overlap=overlap, step_s=0.02)
    spec = Spec("r0", (5, 6, 7), 300, 10**9, -1, 0.0, sampled=True)
    return Plan(
        seed,
        dict.fromkeys("abc", shape),
        copy_tokens=64,
        requests=((0.0, "a", spec),),
        events=tuple(Event(at, str(what), args, True) for at, what, *args in events),  # type: ignore[call-overload, misc]
    )


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("after", [0.02, 0.03, 0.04, 0.05, 0.06])
def test_a_target_that_inserts_what_its_source_has_given_up(overlap: bool, after: float) -> None:
    quiet()
    history = History(
        plan(
            (0.3, "move", "r0", "b", -1),
            (1.0, "move", "r0", "c", -1),
            (1.0 + after, "stick", "c", 2.3),
            (1.2, "cut_off", "b", "c", 8.0),
            overlap=overlap,
        )
    )
    assert not history.run(), story(history.plan, history)


@pytest.mark.parametrize(("lasts", "reclaimed"), [(6.0, 1), (1.2, 0)])
def test_a_host_whose_scheduler_hangs_loses_its_guests(lasts: float, reclaimed: int) -> None:
    """Its process goes on, and so would its heartbeats; one that is merely slow keeps them."""
    quiet()
    history = History(plan((0.3, "move", "r0", "b", -1), (1.0, "stick", "b", lasts), overlap=False))
    assert not history.run(), story(history.plan, history)
    assert history.nodes["a"].mover.log.outcomes["reclaimed"] == reclaimed


@pytest.mark.parametrize(
    ("overlap", "looks"),
    [(False, True), (True, True), (False, False)],
    ids=["stamps", "stamps-overlap", "no-stamps"],
)
def test_a_target_that_reads_a_slot_when_another_move_has_it(
    overlap: bool, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B gives a move to C up and sends another request; C reads then, and has the commit."""
    quiet()
    if not looks:
        monkeypatch.setattr(Fetch, "intact", lambda fetch: True)
    made = plan(
        (0.3, "move", "r0", "b", -1),
        (1.0, "move", "r0", "c", 0),
        (1.032, "stick", "c", 2.3),
        (1.2, "cut_off", "b", "c", 8.0),
        (3.06, "move", "r1", "a", 0),
        overlap=overlap,
    )
    other = Spec("r1", tuple(range(9, 90)), 300, 10**9, -1, 0.0, sampled=True)
    history = History(replace(made, requests=(*made.requests, (0.0, "b", other))))
    failure = history.run()
    assert ("wrong" in failure) != looks, story(history.plan, history)
    assert not (looks and failure), story(history.plan, history)


def two_moves_at_once(seed: int) -> History:
    """One is aborted while its first piece is being gathered; the other takes that slot."""
    made = plan(
        (0.3, "move", "r0", "b", -1),
        (0.34, "abort", "r0", ""),
        (0.34, "move", "r1", "b", -1),
        overlap=False,
        seed=seed,
    )
    other = Spec("r1", tuple(range(9, 40)), 100, 10**9, -1, 0.0)
    shapes = {name: replace(shape, copy_s=0.3) for name, shape in made.shapes.items()}
    requests = (*made.requests, (0.0, "a", other))
    return History(replace(made, shapes=shapes, requests=requests))


def test_a_slot_is_nobody_elses_while_a_copy_of_an_ended_move_writes_into_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet()
    for seed in range(20):
        history = two_moves_at_once(seed)
        assert not history.run(), story(history.plan, history)
    give = Cargo.unload

    def give_all(cargo: Cargo, move: Outgoing) -> None:
        for piece in move.loading:
            move.filled[piece.grant.stamp] = piece
        move.loading.clear()
        give(cargo, move)

    monkeypatch.setattr(Cargo, "unload", give_all)
    assert any("wrong" in two_moves_at_once(seed).run() for seed in range(20))
