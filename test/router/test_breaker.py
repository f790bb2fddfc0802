"""The circuit breaker by itself: when it opens, and that it never shuts a whole fleet."""

from __future__ import annotations

import pytest

from sglang_star.errors import ConfigError
from sglang_star_router.breaker import Breaker, Circuit
from sglang_star_router.command_line import parse_args
from sglang_star_router.faults import FaultLimits
from sglang_star_router.first_event import error_in
from sglang_star_router.line import PREFILL_FLOOR_TOKENS_S, Line
from sglang_star_router.pairs import Pairs
from sglang_star_router.retry import RetryBudget, backoff_s


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def group(count: int, **fields) -> tuple[Clock, list[Breaker]]:
    clock = Clock()
    limits = FaultLimits(**({"cb_failure_threshold": 4, "cb_success_threshold": 2} | fields))
    breakers = [Breaker(limits, clock=clock) for _ in range(count)]
    for one in breakers:
        one.others = lambda one=one: [other for other in breakers if other is not one]
    return clock, breakers


def fails(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.begin().failure("answer")


def works(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        trial = breaker.begin()
        trial.succeeded()
        trial.over()


def test_it_opens_on_a_share_of_its_latest_traffic():
    _, (a, b) = group(2)
    works(a, 1000)
    works(b, 10)
    fails(a, 3)
    assert a.state is Circuit.CLOSED
    fails(a)
    assert a.state is Circuit.OPEN
    assert not a.admits
    works(b, 5)
    fails(b, 2)
    works(b, 5)
    assert b.state is Circuit.CLOSED


def test_old_failures_and_those_of_nobody_do_not_count():
    clock, (a, b) = group(2, cb_window=10.0)
    fails(a, 3)
    clock.now += 11
    fails(a, 3)
    for _ in range(20):
        a.begin().neutral("local")
    assert (a.tally(), a.state) == ((3, 3), Circuit.CLOSED)
    assert b.tally() == (0, 0)


def test_a_fleet_that_fails_as_a_whole_stays_open():
    _, breakers = group(4)
    for _ in range(50):
        for one in breakers:
            fails(one)
    assert sum(one.state is Circuit.CLOSED for one in breakers) >= 1
    _, (alone,) = group(1)
    fails(alone, 50)
    assert alone.state is Circuit.CLOSED


def test_probes_close_it_or_open_it_again():
    clock, (a, _) = group(2, cb_timeout=5.0)
    fails(a, 4)
    clock.now += 4.9
    assert not a.admits
    clock.now += 0.2
    assert a.state is Circuit.HALF_OPEN
    probes = [a.begin(), a.begin()]
    assert not a.admits, "as many probes as must succeed, no more"
    probes[0].succeeded()
    probes[0].over()
    assert a.state is Circuit.HALF_OPEN
    probes[1].failure("broken")
    assert a.state is Circuit.OPEN
    clock.now += 5.1
    works(a, 2)
    assert (a.state, a.opened) == (Circuit.CLOSED, 2)


def test_what_was_sent_before_it_opened_neither_closes_nor_prolongs_it():
    clock, (a, _) = group(2, cb_timeout=5.0)
    early = [a.begin() for _ in range(6)]
    fails(a, 4)
    clock.now += 5.1
    for trial in early[:3]:
        trial.succeeded()
    for trial in early[3:]:
        trial.failure("broken")
    assert a.state is Circuit.HALF_OPEN


def test_a_stream_that_breaks_is_a_failure_after_all():
    _, (a, _) = group(2)
    for _ in range(4):
        trial = a.begin()
        trial.succeeded()
        trial.failure("stream")
    assert a.state is Circuit.OPEN
    assert a.counts == {"ok": 4, "stream": 4}


def test_streams_that_break_count_as_of_now():
    _, (a, _) = group(2)
    long_ago = [a.begin() for _ in range(4)]
    for trial in long_ago:
        trial.succeeded()
    works(a, 4)
    assert a.tally() == (0, 8)
    works(a, 100)
    for trial in long_ago:
        trial.failure("stream")
    assert a.state is Circuit.OPEN


def test_after_it_has_closed_a_few_failures_open_it_again():
    clock, (a, _) = group(2, cb_failure_threshold=10, cb_success_threshold=2)
    fails(a, 10)
    clock.now += 5.1
    probes = [a.begin(), a.begin()]
    for trial in probes:
        trial.succeeded()
    assert not a.admits, "an answer that has begun may still break"
    clock.now += 5.1  # it has gone on for long enough
    assert a.admits
    assert a.state is Circuit.CLOSED
    for trial in probes:
        trial.failure("stream")
    assert a.state is Circuit.OPEN
    clock.now += 5.1
    works(a, 30)
    fails(a, 9)
    assert a.state is Circuit.CLOSED


def test_forgiven_failures_are_undone():
    _, (a, _) = group(2)
    trials = [a.begin() for _ in range(4)]
    for trial in trials:
        trial.failure("answer")
    assert a.state is Circuit.OPEN
    trials[0].forgive()
    assert (a.state, a.tally()) == (Circuit.CLOSED, (3, 3))


def test_it_can_be_disabled():
    _, (a, _) = group(2, circuit_breaker=False)
    fails(a, 50)
    assert a.admits


def test_whoever_fails_with_everybody_is_guilty():
    pairs = Pairs()
    pairs.note("p1", "d1", worked=False)
    assert set(pairs.guilty("p1", "d1")) == {"p1", "d1"}
    pairs.note("p2", "d1", worked=True)
    assert pairs.guilty("p1", "d1") == ("p1",)
    pairs.note("p2", "d1", worked=False)
    pairs.note("p2", "d2", worked=True)
    assert pairs.guilty("p2", "d1") == ("d1",)


def test_waits_grow_and_are_capped():
    limits = FaultLimits(retry_jitter_factor=0.0, retry_max_backoff_ms=100.0)
    assert [backoff_s(limits, n) for n in range(4)] == [0.05, 0.075, 0.1, 0.1]


def test_the_budget_allows_what_waits_at_one_instance_and_no_storm():
    budget = RetryBudget(FaultLimits(retry_budget=0.25))
    budget.floor = 2.0
    for _ in range(400):
        budget.arrived()
    assert sum(budget.grant() for _ in range(400)) == 100
    for _ in range(400):
        budget.ended()
    granted = 0
    for _ in range(1000):
        budget.arrived()
        granted += budget.grant()
        budget.ended()
    assert granted <= 0.25 * 1000


def test_a_long_prompt_may_be_silent_for_longer():
    line, exchange = Line(), object()
    assert line.silence_s() == 0.0
    line.wait(exchange, int(1e6 * PREFILL_FLOOR_TOKENS_S))
    assert line.silence_s() == 0.0
    line._waiting[exchange] = (line._waiting[exchange][0] - 50.0, 1.0)
    assert 48.5 < line.silence_s() < 60
    line.begun(exchange)
    assert line.silence_s() == 0.0


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'data: {"text": "an \\"error\\" and an \\"abort\\""}\n\n', None),
        (b'data: {"error": null, "text": "x"}\n\n', None),
        (b'data: {"error": {"message": "x", "code": 503}}\r\n\r\n', 503),
        (b'data: {"error": {"message": "x", "type": "invalid_request_error"}}\n\n', 400),
        (b'data: {"error": "boom"}\n\n', 500),
        (b'data: {"error": {"code": true}}\n\n', 500),
        (b'data: {"meta_info": {"finish_reason": {"type": "abort"}}, "x": "abort"}\n\n', None),
        (b'data: "error"\n\n', None),
        (b'data: {"error"', None),
    ],
)
def test_errors_are_told_from_answers(payload, code):
    found = error_in(payload)
    assert (found.code if found else None) == code


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cb-failure-threshold", "0"], "--cb-failure-threshold"),
        (["--cb-timeout-duration-secs", "-1"], "--cb-timeout-duration-secs"),
        (["--retry-jitter-factor", "2"], "--retry-jitter-factor"),
        (["--retry-backoff-multiplier", "0.5"], "--retry-backoff-multiplier"),
        (["--token-timeout-secs", "0"], "--token-timeout-secs"),
    ],
)
def test_useless_limits_are_refused_by_name(flags, words):
    with pytest.raises(ConfigError, match=words):
        parse_args(["--worker-urls", "http://127.0.0.1:1", *flags])


def test_flags_reach_the_limits():
    flags = ["--disable-retries", "--disable-circuit-breaker", "--cb-window-duration-secs", "7"]
    limits = parse_args(["--worker-urls", "http://127.0.0.1:1", *flags]).faults
    assert (limits.retry_max_retries, limits.circuit_breaker, limits.cb_window) == (0, False, 7.0)
