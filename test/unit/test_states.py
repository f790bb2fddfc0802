from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_star.errors import IllegalTransition
from sglang_star.migration.states import (
    HOME_TRANSITIONS,
    OFF_BATCH,
    OWNER,
    TARGET_TRANSITIONS,
    Home,
    HomeEvent,
    Target,
    TargetEvent,
    home_machine,
    target_machine,
)

E, T = HomeEvent, TargetEvent
HOME_ENDS = {Home.FINISHED, Home.ABORTED, Home.RECLAIMED, Home.HANDED_OVER}
TARGET_ENDS = {Target.FINISHED, Target.ABORTED, Target.CANCELLED, Target.MOVED_ON}


def test_a_move_and_a_way_back() -> None:
    machine = home_machine()
    for event in (E.ORDER, E.RESERVED, E.PARK, E.COMMIT, E.INSERTED_OWN, E.RETURN, E.ORDER):
        machine.fire(event)
    assert machine.state is Home.RESERVING


PRE_COPIED = (E.ORDER, E.RESERVED, E.PARK, E.COMMIT)
HELD_AT_ONCE = (E.ORDER, E.PARK, E.RESERVED, E.COMMIT)


@pytest.mark.parametrize("way", [PRE_COPIED, HELD_AT_ONCE])
@pytest.mark.parametrize("steps", range(1, 5))
def test_every_state_before_the_hand_over_can_cancel_back_to_running(
    way: tuple[HomeEvent, ...], steps: int
) -> None:
    machine = home_machine()
    for event in way[:steps]:
        machine.fire(event)
    # Out of the batch it has to wait for its last step before it can be put back.
    parked = E.PARK in way[:steps]
    assert machine.fire(E.CANCEL) is (Home.RESUMING if parked else Home.RUNNING)
    if parked:
        assert machine.fire(E.RESUME) is Home.RUNNING


def test_a_held_request_waits_off_the_batch_for_its_target() -> None:
    machine = home_machine()
    machine.fire(E.ORDER)
    assert machine.fire(E.PARK) is Home.HELD
    assert not machine.allows(E.COMMIT)
    assert not machine.allows(E.PARK)
    assert machine.fire(E.RESERVED) is Home.PARKED


def test_a_resuming_request_answers_to_nobody_but_its_batch() -> None:
    allowed = {event for state, event in HOME_TRANSITIONS if state is Home.RESUMING}
    assert allowed == {E.RESUME, E.FINISH, E.ABORT}


def test_a_request_leaves_the_batch_by_one_event_and_comes_back_by_one() -> None:
    for (state, event), following in HOME_TRANSITIONS.items():
        if state not in OFF_BATCH and following in OFF_BATCH:
            assert event is E.PARK
        # The others give up its place here for good.
        if state in OFF_BATCH and following is Home.RUNNING:
            assert event is E.RESUME


def test_nothing_leaves_an_end() -> None:
    assert not {state for state, _ in HOME_TRANSITIONS} & HOME_ENDS
    assert not {state for state, _ in TARGET_TRANSITIONS} & TARGET_ENDS


def test_every_state_has_one_owner_and_can_be_reached() -> None:
    assert set(OWNER) == {*Home, *Target}
    assert {Home.RUNNING, *HOME_TRANSITIONS.values()} == set(Home)
    assert {Target.RESERVED, *TARGET_TRANSITIONS.values()} == set(Target)


def test_a_decoding_request_can_always_end() -> None:
    for state in set(Home) - HOME_ENDS - {Home.COMMITTED}:
        assert (state, E.FINISH) in HOME_TRANSITIONS
        assert (state, E.ABORT) in HOME_TRANSITIONS
    for guest in set(Target) - TARGET_ENDS:
        assert (guest, T.CANCEL) in TARGET_TRANSITIONS


@given(st.lists(st.sampled_from(list(HomeEvent)), max_size=30))
def test_only_the_table_moves_the_machine(events: list[HomeEvent]) -> None:
    machine = home_machine()
    for event in events:
        before = machine.state
        if machine.allows(event):
            assert machine.fire(event) is HOME_TRANSITIONS[before, event]
        else:
            with pytest.raises(IllegalTransition):
                machine.fire(event)
            assert machine.state is before


@given(st.lists(st.sampled_from(list(HomeEvent)), max_size=40))
def test_a_request_off_the_batch_always_finds_a_way_on(events: list[HomeEvent]) -> None:
    """Whatever came before: it moves on, or is back in its batch two events later."""
    machine = home_machine()
    for event in events:
        if machine.allows(event):
            machine.fire(event)
    if machine.state in OFF_BATCH:
        if machine.allows(E.CANCEL):
            machine.fire(E.CANCEL)
        assert machine.fire(E.RESUME) is Home.RUNNING


def test_a_guest_may_be_handed_on_before_its_first_token() -> None:
    machine = target_machine()
    for event in (T.PAGES, T.COMMIT, T.MOVE_ON):
        machine.fire(event)
    assert machine.state is Target.MOVED_ON


def test_a_guest_is_inserted_only_after_its_pages() -> None:
    machine = target_machine()
    with pytest.raises(IllegalTransition):
        machine.fire(T.COMMIT)
    for event in itertools.chain([T.PAGES, T.PAGES, T.COMMIT], [T.DECODED] * 3, [T.FINISH]):
        machine.fire(event)
    assert machine.state is Target.FINISHED
