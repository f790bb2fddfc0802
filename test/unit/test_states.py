from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_star.errors import IllegalTransition
from sglang_star.migration import states
from sglang_star.migration.states import (
    OFF_BATCH,
    Hosting,
    Lent,
    Machine,
    Receiving,
    ReceivingEvent,
    Sending,
    SendingEvent,
)

E, R = SendingEvent, ReceivingEvent
TABLES: dict[Any, Mapping[Any, Any]] = {
    Sending: states.SENDING,
    Receiving: states.RECEIVING,
    Hosting: states.HOSTING,
    Lent: states.LENT,
}
ENDS: dict[Any, set[Any]] = {
    Sending: {Sending.HANDED_OVER, Sending.CANCELLED, Sending.FINISHED, Sending.ABORTED},
    Receiving: {Receiving.INSERTED, Receiving.CANCELLED},
    Hosting: {Hosting.FINISHED, Hosting.MOVED_ON},
    Lent: {Lent.RETURNED, Lent.FINISHED, Lent.ABORTED, Lent.RECLAIMED},
}
PRE_COPIED = (E.RESERVED, E.PARK, E.COMMIT)
HELD_AT_ONCE = (E.PARK, E.RESERVED, E.COMMIT)


@pytest.mark.parametrize("way", [PRE_COPIED, HELD_AT_ONCE])
@pytest.mark.parametrize("steps", range(4))
def test_every_state_before_the_hand_over_can_cancel(
    way: tuple[SendingEvent, ...], steps: int
) -> None:
    machine = states.sending()
    for event in way[:steps]:
        machine.fire(event)
    # Out of the batch it has to wait for its last step before it can be put back.
    parked = E.PARK in way[:steps]
    assert machine.fire(E.CANCEL) is (Sending.RESUMING if parked else Sending.CANCELLED)
    if parked:
        assert machine.fire(E.RESUME) is Sending.CANCELLED


def test_a_held_request_waits_off_the_batch_for_its_target() -> None:
    machine = states.sending()
    assert machine.fire(E.PARK) is Sending.HELD
    assert not machine.allows(E.COMMIT)
    assert not machine.allows(E.PARK)
    assert machine.fire(E.RESERVED) is Sending.PARKED


def test_a_resuming_request_answers_to_nobody_but_its_batch() -> None:
    allowed = {event for state, event in states.SENDING if state is Sending.RESUMING}
    assert allowed == {E.RESUME, E.FINISH, E.ABORT}


def test_a_request_leaves_the_batch_by_one_event_and_comes_back_by_one() -> None:
    for (state, event), following in states.SENDING.items():
        if state not in OFF_BATCH and following in OFF_BATCH:
            assert event is E.PARK
        # The others give up its place here for good.
        if state in OFF_BATCH and following is Sending.CANCELLED:
            assert event is E.RESUME


@pytest.mark.parametrize("kind", TABLES)
def test_nothing_leaves_an_end_and_everything_is_reached(kind: Any) -> None:
    table = TABLES[kind]
    assert {state for state, _ in table} == set(kind) - ENDS[kind]
    assert {next(iter(kind)), *table.values()} == set(kind)


def test_a_decoding_request_can_always_end() -> None:
    for state in set(Sending) - ENDS[Sending] - {Sending.COMMITTED}:
        assert (state, E.FINISH) in states.SENDING
    for waiting in set(Receiving) - ENDS[Receiving]:
        assert (waiting, R.CANCEL) in states.RECEIVING


@pytest.mark.parametrize("kind", TABLES)
@given(data=st.data())
def test_only_the_table_moves_a_machine(kind: Any, data: st.DataObject) -> None:
    table = TABLES[kind]
    machine: Machine[Any, Any] = Machine(next(iter(kind)), dict(table))
    events = list({event for _, event in table})
    for event in data.draw(st.lists(st.sampled_from(events), max_size=30)):
        before = machine.state
        if machine.allows(event):
            assert machine.fire(event) is table[before, event]
        else:
            with pytest.raises(IllegalTransition):
                machine.fire(event)
            assert machine.state is before


@given(st.lists(st.sampled_from(list(SendingEvent)), max_size=40))
def test_a_request_off_the_batch_always_finds_a_way_on(events: list[SendingEvent]) -> None:
    """Whatever came before: it moves on, or is back in its batch two events later."""
    machine = states.sending()
    for event in events:
        if machine.allows(event):
            machine.fire(event)
    if machine.state in OFF_BATCH:
        if machine.allows(E.CANCEL):
            machine.fire(E.CANCEL)
        assert machine.fire(E.RESUME) is Sending.CANCELLED


def test_a_request_joins_only_after_its_pages_and_its_commit() -> None:
    machine = states.receiving()
    machine.fire(R.SEAT)
    for early in (R.COMMIT, R.JOIN):
        with pytest.raises(IllegalTransition):
            machine.fire(early)
    machine.fire(R.PAGES)
    with pytest.raises(IllegalTransition):
        machine.fire(R.JOIN)
    for event in (R.PAGES, R.COMMIT, R.JOIN):
        machine.fire(event)
    assert machine.state is Receiving.INSERTED
