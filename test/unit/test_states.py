from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_star.errors import IllegalTransition
from sglang_star.migration.states import (
    HOME_TRANSITIONS,
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


@pytest.mark.parametrize("steps", range(1, 5))
def test_every_state_before_the_hand_over_can_cancel_back_to_running(steps: int) -> None:
    machine = home_machine()
    for event in (E.ORDER, E.RESERVED, E.PARK, E.COMMIT)[:steps]:
        machine.fire(event)
    assert machine.fire(E.CANCEL) is Home.RUNNING


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


def test_a_guest_is_inserted_only_after_its_pages() -> None:
    machine = target_machine()
    with pytest.raises(IllegalTransition):
        machine.fire(T.COMMIT)
    for event in itertools.chain([T.PAGES, T.PAGES, T.COMMIT], [T.DECODED] * 3, [T.FINISH]):
        machine.fire(event)
    assert machine.state is Target.FINISHED
