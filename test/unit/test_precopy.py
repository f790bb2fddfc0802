"""A pre-copy that catches up, one that never will, and those that wait for another's end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_star.config import StarConfig
from sglang_star.errors import OrderRefused
from sglang_star.migration.outgoing import SLOTS
from sglang_star.migration.pace import BURST_S, Pace
from sglang_star.migration.precopy import (
    AHEAD_STEPS,
    FRESH_S,
    MIN_PIECE,
    PATIENCE,
    YIELD_S,
    Precopy,
)
from sglang_star.migration.states import Sending
from sglang_star.protocol import PagesReady, PagesTaken, Reserved
from unit.no_faults import NoFaults
from unit.test_hold import THERE, Engine

MB = 1_000_000


def move(name: str = "m", *sizes: int, off_batch: bool = False) -> Any:
    """One whose pieces of so many bytes are on their way; a byte is a position."""
    return SimpleNamespace(
        migration_id=name,
        target=THERE,
        token_bytes=1,
        step_ms=30.0,
        off_batch=off_batch,
        machine=SimpleNamespace(state=Sending.COPYING),
        on_their_way=len(sizes),
        full=bool(sizes),
        ahead=sum(sizes),
    )


def measured(rate: int, seconds: int = 10, config: StarConfig | None = None) -> Precopy:
    """A way that has carried so many bytes a second up to second 10."""
    precopy = Precopy(config or StarConfig(predictor="off"))
    for second in range(seconds + 1):
        precopy.took(THERE, rate)  # not counted in the first: nothing was on its way before
        precopy.look([move("m", 1)], float(second))
        precopy.leave([move("m", 1)])
    return precopy


def test_one_whose_kv_is_made_faster_than_it_travels_never_catches_up() -> None:
    precopy = measured(MB)
    assert precopy.refusal(THERE, MB, 0.5 * MB, 30.0, 10.0) == ""
    told = precopy.refusal(THERE, MB, 2.0 * MB, 30.0, 10.0)
    assert "never catch up" in told
    assert "2.00 MB/s" in told
    assert "1.00 MB/s" in told


def test_one_that_would_come_too_late_is_told_so() -> None:
    precopy = measured(MB)
    assert precopy.refusal(THERE, 20 * MB, 0.0, 30.0, 10.0) == ""
    assert "40.0 s" in precopy.refusal(THERE, 20 * MB, 0.5 * MB, 30.0, 10.0)


def test_nothing_is_concluded_from_little_or_old_knowledge() -> None:
    assert Precopy(StarConfig(predictor="off")).refusal(THERE, MB, MB, 1.0, 0.0) == ""
    precopy = measured(MB)
    assert precopy.refusal(THERE, MB, 2.0 * MB, 30.0, 10.0 + FRESH_S + 1) == ""
    precopy.forget(THERE)
    assert precopy.refusal(THERE, MB, 2.0 * MB, 30.0, 10.0) == ""


def test_what_waits_for_step_boundaries_only_measures_nothing() -> None:
    precopy = Precopy(StarConfig(predictor="off"))
    little = move("little", 10)
    little.full = False
    for second in range(20):
        precopy.took(THERE, 10)
        precopy.look([little], float(second))
        precopy.leave([little])
    assert precopy.refusal(THERE, MB, MB, 1.0, 20.0) == ""


def test_a_cap_counts_as_the_way() -> None:
    precopy = measured(100 * MB, config=StarConfig(predictor="off", copy_mb_per_s=1.0))
    assert "never catch up" in precopy.refusal(THERE, MB, 2.0 * MB, 30.0, 10.0)


def test_a_request_leaves_the_batch_when_its_way_is_clear_or_patience_ends() -> None:
    precopy = measured(MB)
    clear, behind = move("clear", 20_000), move("behind", 20_000)
    full = move("full", MB, MB)
    assert precopy.may_park(clear, [clear], 10.0), "a fiftieth of a second is less than a step"
    assert not precopy.may_park(full, [full], 10.0), "two pieces are on their way"
    asked = [precopy.may_park(behind, [behind, full], 10.0) for _ in range(PATIENCE + 1)]
    assert asked == [False] * PATIENCE + [True]
    assert Precopy(StarConfig(predictor="off")).may_park(clear, [clear, full], 0.0), "not known"


def test_what_is_on_its_way_is_a_few_steps_worth_of_what_the_way_carries() -> None:
    alone = move("alone")
    unknown = Precopy(StarConfig(predictor="off")).sizes(alone, [alone])
    assert unknown.pieces == SLOTS
    assert unknown.piece > 1 << 30
    precopy = measured(100 * MB)
    sizes = precopy.sizes(alone, [alone])
    assert 2_900_000 < sizes.piece < 3_100_000, "at 30 ms a step"
    assert sizes.ahead == pytest.approx(AHEAD_STEPS * sizes.piece, abs=AHEAD_STEPS)
    assert sizes.pieces == 4 * SLOTS
    shared = precopy.sizes(alone, [alone, move("other")])
    assert shared.piece == pytest.approx(sizes.piece / 2, abs=1)
    slow = measured(MB).sizes(alone, [alone])
    assert (slow.piece, slow.ahead) == (MIN_PIECE, 2 * MIN_PIECE)


def test_others_put_nothing_on_the_way_of_one_that_is_about_to_end() -> None:
    precopy = measured(MB)
    ending, other, waiting = move("ending", MB), move("other"), move("waiting", off_batch=True)
    moves = [ending, other, waiting]
    assert not precopy.yields(other, moves, 10.0)
    precopy.may_park(ending, moves, 10.0)
    assert precopy.yields(other, moves, 10.0)
    assert not precopy.yields(ending, moves, 10.0)
    assert not precopy.yields(waiting, moves, 10.0), "its client waits, too"
    assert not precopy.yields(other, moves, 10.0 + YIELD_S), "not for ever"
    ending.machine.state = Sending.COMMITTED
    assert not precopy.yields(other, moves, 10.0), "all it had is there"
    precopy.look([other], 10.0)
    assert not precopy.yields(other, [other], 10.0)


def test_a_rate_is_kept_over_time() -> None:
    pace = Pace(per_step=1000, per_s=1000)
    assert pace.allowed(0.0) == 1000 * BURST_S
    pace.took(300)
    assert pace.allowed(0.1) == -100, "what was too much is missing later"
    assert pace.allowed(0.25) == 50
    assert pace.allowed(9.0) == 1000 * BURST_S, "what was not used is not kept for long"
    assert Pace(per_step=1000, per_s=0).allowed(0.0) == 1000


def test_a_move_over_a_way_that_is_too_slow_is_ended_and_the_next_one_refused() -> None:
    """The target takes one piece of 64 tokens in the time in which the request makes a hundred."""
    engine = Engine()
    clock = [0.0]
    engine.now = lambda: clock[0]  # type: ignore[method-assign]
    req = engine.request()
    sent = engine.sender.start(req, "r", THERE, "test", step_ms=1.0)
    engine.sender.on_reserved(engine.answer(Reserved, sent, transport="shm"))
    while engine.sender.moves:
        clock[0] += 0.5
        assert clock[0] < 10.0, "long before its deadline"
        req.output_ids.extend([0] * 100)
        for stamp in list(sent.filled)[:1] if sent.full else ():
            engine.sender.on_taken(engine.answer(PagesTaken, sent, stamp=stamp))
        engine.sender.step(NoFaults())
    [report] = engine.log.reports
    assert (report.outcome, "never catch up" in report.detail) == ("failed", True)
    assert engine.batch == [req]
    assert engine.all_of(PagesReady)
    with pytest.raises(OrderRefused, match="never catch up"):
        engine.sender.start(req, "r", THERE, "test", step_ms=1.0)
    engine.sender.start(req, "r", THERE, "test", step_ms=1.0, hold_after=0)
