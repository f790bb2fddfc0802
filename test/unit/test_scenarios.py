"""Traces that could break a policy."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_star.errors import ConfigError
from sglang_star_bench import arguments, scenarios, traces

TRACE = traces.synthetic(1, rate=2.0, duration_s=1800.0)


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_every_scenario_is_a_sound_trace_and_the_same_twice(name: str) -> None:
    made, again = scenarios.apply(name, TRACE, 3), scenarios.apply(name, TRACE, 3)
    assert (np.diff(made.arrival_s) >= 0).all()
    assert (made.input_len >= 1).all()
    assert made.name.endswith(name)
    for column in ("arrival_s", "input_len", "output_len"):
        assert (getattr(made, column) == getattr(again, column)).all()


def test_adversarial_sends_every_long_one_to_the_same_turn() -> None:
    long = scenarios.apply("adversarial", TRACE).output_len == scenarios.LONG
    assert long.mean() == pytest.approx(scenarios.LONG_SHARE, abs=0.01)
    assert set(np.flatnonzero(long) % 8) == {0}


def test_a_dominant_client_sends_half_of_all_in_bursts() -> None:
    made = scenarios.apply("dominant-client", TRACE)
    assert made.arrival_s.size == TRACE.arrival_s.size
    at_the_minute = made.arrival_s % scenarios.CLIENT_BURST_S == 0
    assert at_the_minute.mean() == pytest.approx(scenarios.CLIENT_SHARE, abs=0.05)


def test_a_flash_crowd_multiplies_one_minute_in_ten() -> None:
    made = scenarios.apply("flash-crowd", TRACE)
    phase = made.arrival_s % scenarios.CROWD_EVERY_S
    crowd = (phase >= 300) & (phase < 360)
    usual = (~crowd).sum() / (TRACE.span_s * 0.9)
    assert crowd.sum() / (TRACE.span_s * 0.1) == pytest.approx(4 * usual, rel=0.2)


def test_unknown_scenario() -> None:
    with pytest.raises(ConfigError, match="flash-crowd"):
        scenarios.apply("doomsday", TRACE)
    with pytest.raises(ConfigError, match="doomsday"):
        arguments.read_trace(None, "doomsday")
