"""How long the next step can wait: from when the device began the one in flight, not from now."""

from __future__ import annotations

import pytest

from sglang_star.flight import HOLD_SHARE, Flight

STEP_S = 0.03


@pytest.mark.parametrize(
    ("boundary_s", "previous_s", "began_s"),
    [
        (5.000, 5.028, 5.028),  # launched while the device was busy: it began when that was over
        (5.000, 4.900, 5.000),  # the device was idle: it began when it was launched
        (5.000, 5.000, 5.000),
    ],
)
def test_the_hold_ends_with_the_step_in_flight(
    boundary_s: float, previous_s: float, began_s: float
) -> None:
    flight = Flight(boundary_s, previous_s)
    assert flight.hold_until(STEP_S) == pytest.approx(began_s + HOLD_SHARE * STEP_S)


@pytest.mark.parametrize("late_s", [0.0, 0.001, 0.02, 0.1])
def test_a_boundary_that_is_reached_late_leaves_less(late_s: float) -> None:
    """After a long result or a long receive the step in flight is nearly over, or is."""
    flight = Flight(boundary_s=1.0, previous_s=2.0)
    now = 2.0 + late_s
    assert flight.hold_until(STEP_S) - now == pytest.approx(HOLD_SHARE * STEP_S - late_s)


def test_nothing_is_held_while_the_length_of_a_step_is_unknown() -> None:
    assert Flight(boundary_s=1.0, previous_s=2.0).hold_until(0.0) <= 2.0
