"""What the simulator lets a policy know, and what it lets it have for nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import PROFILES
from sglang_star_bench import paired, policy_bench
from sglang_star_bench.runs import Run, execute
from sglang_star_bench.simulator.fleet import Fleet, FleetConfig
from sglang_star_bench.simulator.histogram import LogHistogram
from sglang_star_bench.simulator.instance import Instance
from sglang_star_bench.simulator.links import Links
from sglang_star_bench.simulator.request import Request
from sglang_star_bench.traces import checked, synthetic
from sglang_star_router.policy.registry import make_dispatch

CARD = PROFILES["24gb-7b"]
TRACE = synthetic(1, rate=1.5)


def test_windows_share_no_request_and_know_only_what_came_before() -> None:
    windows = [TRACE.part(2.0, 200.0, index) for index in range(4)]
    begins = [int(np.searchsorted(TRACE.arrival_s / 2.0, 200.0 * (k + 1))) for k in range(5)]
    for index, window in enumerate(windows):
        assert window.arrival_s.size == begins[index + 1] - begins[index]
        assert np.array_equal(
            window.output_len, TRACE.output_len[begins[index] : begins[index + 1]]
        )
        assert np.array_equal(window.past, TRACE.output_len[: begins[index]])
    with pytest.raises(ConfigError, match="windows of 200 s"):
        TRACE.part(2.0, 200.0, 100)


def test_the_predictors_prior_holds_nothing_of_the_judged_window() -> None:
    count = 400
    lengths = np.where(np.arange(count) < 200, 50, 3000)
    trace = checked("two halves", np.arange(count) * 1.0, np.full(count, 10), lengths)
    window = trace.part(1.0, 199.0, 0)
    assert set(window.past) == {50}
    assert 3000 in window.output_len
    fleet = Fleet(window, FleetConfig(decode=(CARD,)), make_dispatch("star"), None)
    predictor = fleet.view.predictor
    assert predictor is not None
    blind = replace(predictor.curve, log_error_std=np.full(10, 1e6))
    predictor.curve = blind
    (found,) = predictor.quantiles(np.zeros(1), np.array([3000.0]), np.zeros((1, 2)))
    assert found[2] == pytest.approx(50, rel=0.01)


def test_a_predictor_without_a_past_is_refused() -> None:
    trace = checked("short", np.arange(9) * 1.0, np.full(9, 10), np.full(9, 100))
    with pytest.raises(ConfigError, match="before the window"):
        Fleet(trace, FleetConfig(decode=(CARD,)), make_dispatch("star"), None)


@pytest.mark.parametrize(("shared", "waits"), [(True, True), (False, False)])
def test_prefill_waits_for_the_link_that_a_move_uses(shared: bool, waits: bool) -> None:
    calls: list[tuple[float, Any, Any]] = []
    links = Links(lambda when, call, what: calls.append((when, call, what)), shared=shared)

    class Deaf:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

    source, target = (Instance(k, f"d{k}", CARD, Deaf()) for k in (0, 1))  # type: ignore[arg-type]
    links.send(source, target, 5000, 0.0, print, "move")
    links.send(None, target, 1000, 0.0, print, "prompt")
    (moved, *_), (prefilled, *_) = calls
    alone = 1000 * CARD.kv_bytes / CARD.link_bytes_per_s + CARD.link_latency_ms / 1e3
    assert prefilled == pytest.approx(alone + (5000 / 1000 * (alone - 1e-3) if waits else 0.0))
    assert (prefilled > moved) is waits


def test_a_long_transfer_lets_others_in_between_its_segments() -> None:
    profile = replace(CARD, link_latency_ms=0.0)
    trace = checked("x", [0.0], [1], [1])
    fleet = Fleet(trace, FleetConfig(decode=(profile, profile)), make_dispatch("round-robin"), None)
    arrived: list[str] = []
    source, target = fleet.instances
    fleet.links.send(source, target, 80_000, 0.0, arrived.append, "move")
    fleet.links.send(None, target, 100, 0.0, arrived.append, "prompt")
    fleet.run()
    assert arrived == ["prompt", "move"]


@pytest.mark.parametrize(("share", "aborts"), [(math.inf, False), (0.2, True)])
def test_what_finds_host_memory_full_is_aborted(share: float, aborts: bool) -> None:
    profile = replace(CARD, kv_capacity=7_000)
    rows = [(0.0, 1000, 2500), (0.5, 1000, 2500), (1.0, 1000, 2500)]
    seen: list[float] = []

    class Watched(Fleet):
        def request_retracted(self, request: Request) -> None:
            assert request.instance is not None
            seen.append(request.instance.host_kv)
            super().request_retracted(request)

    fleet = Watched(
        checked("full", *zip(*rows, strict=True)),
        FleetConfig(
            decode=(profile,), max_new_tokens=2500, drain_s=1e5, host_share=share, duration_s=9
        ),
        make_dispatch("least-tokens"),
        None,
    )
    recorder = fleet.run()
    assert (recorder.aborted > 0) is aborts
    assert recorder.completed + recorder.failed == 3
    assert recorder.failed == recorder.aborted
    assert all(kv <= share * 7_000 for kv in seen)
    assert fleet.instances[0].host_kv == 0


def test_what_was_not_served_is_infinitely_late() -> None:
    histogram = LogHistogram()
    for value in (1.0, 2.0, 3.0, math.inf):
        histogram.add(value)
    assert histogram.quantile(0.75) == pytest.approx(3.0, rel=0.01)
    assert histogram.quantile(0.76) == math.inf
    run = Run(policy="star", trace=TRACE, decode=2, load=2.5, duration_s=200.0)
    row = execute(replace(run, star={"hold_max_s": 3.0}))[0]
    assert row["failed"] > 0.01 * row["requests"]
    assert row["ttft_ms"]["p99"] is None
    assert row["ttft_served_ms"]["p99"] > 0
    json.dumps(row, allow_nan=False)


def test_policies_are_told_what_a_user_would_say() -> None:
    run = Run(policy="star", trace=TRACE, decode=2, duration_s=60.0, rate_scale=0.2)
    told = run.told
    assert told["weights"] != 1.0
    assert told["link"] != 1.0
    exact = replace(run, told={"weights": 1.0, "link": 1.0, "slo": 1.0})
    assert exact.key != run.key


@pytest.mark.parametrize("reserve", ["age", "head", "oracle"])
def test_the_forecast_sets_the_reserve(reserve: str) -> None:
    run = Run(
        policy="queued-least-tokens+reactive", trace=TRACE, decode=2, load=1.2, duration_s=150.0,
        config={"reserve": reserve},
    )  # fmt: skip
    row, fleet = execute(run)
    assert row["completed"] + row["failed"] == row["requests"]
    assert all(i.reserved != 512 for i in fleet.instances)


def test_who_knows_that_all_is_over_soon_reserves_little() -> None:
    """Requests that will end now need no room to grow; those that go on need all of it."""

    def reserved(length: int) -> int:
        trace = checked("x", np.zeros(4), np.full(4, 100), np.full(4, length))
        config = FleetConfig(
            decode=(CARD,), reserve="oracle", reserve_horizon=1000, duration_s=5.0,
            drain_s=0.0, prefill_instances=4,
        )  # fmt: skip
        fleet = Fleet(trace, config, make_dispatch("least-tokens"), None)
        fleet.run()
        return fleet.instances[0].reserved

    assert reserved(9000) == pytest.approx(1000, rel=0.02)
    assert reserved(400) < 250


@pytest.mark.parametrize(
    "policy",
    [
        "power-of-two+off",
        "queued-power-of-two+off",
        "queued-cache-aware+off",
        "queued-shortest-first+off",
        "queued-freeness+freeness",
    ],
)
def test_policies_of_other_systems_serve_every_request(policy: str) -> None:
    run = Run(policy=policy, trace=TRACE, decode=3, load=0.5, duration_s=120.0)
    row = execute(run)[0]
    assert row["completed"] == row["requests"] > 20


def test_freeness_moves_from_the_least_free_to_the_most() -> None:
    base = policy_bench.random_fleet(0, 3, 8)
    capacity = base.instances.kv_used + np.array([100, 5_000, 80_000])
    snapshot = replace(base, instances=replace(base.instances, kv_capacity=capacity))
    from sglang_star_bench.baselines import FreenessMoves, FreenessParams, freeness

    assert freeness(snapshot).round().tolist() == [12, 625, 10_000]
    (order,) = FreenessMoves(FreenessParams()).orders(snapshot)
    assert (order.source, order.target) == ("decode-0", "decode-2")
    mine = snapshot.requests.instance == 0
    context = (snapshot.requests.prompt_tokens + snapshot.requests.output_tokens)[mine]
    assert order.expected_gain == context.min()


def test_a_file_of_other_parameters_is_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    args = ["--policy", "least-tokens", "--decode", "2", "--loads", "0.3", "--duration", "30"]
    args += ["--windows", "1", "--json", str(out), "--resume"]
    assert policy_bench.main(args) == 0
    (row,) = json.loads(out.read_text())
    assert {"code", "trace_sha", "told", "config"} <= set(row["parameters"])
    assert policy_bench.main(args) == 0
    assert json.loads(out.read_text()) == [row]
    assert policy_bench.main([*args, "--set", "config.reserved_tokens=64"]) == 2
    assert "other code or other parameters" in capsys.readouterr().err
    assert json.loads(out.read_text()) == [row]


def test_paired_intervals() -> None:
    mean, half = paired.difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(paired.difference([math.inf, 1.0], [1.0, 1.0])[0])
