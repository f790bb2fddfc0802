"""The simulator against closed forms, conservation laws and its own promises."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import PROFILES, Profile, find, roofline
from sglang_star_bench import capacity
from sglang_star_bench.runs import POLICIES, Run, execute
from sglang_star_bench.simulator.emulated import EmulatedPredictor, ErrorCurve
from sglang_star_bench.simulator.fleet import Fleet, FleetConfig
from sglang_star_bench.simulator.histogram import LogHistogram
from sglang_star_bench.simulator.instance import Instance
from sglang_star_bench.simulator.request import Request
from sglang_star_bench.traces import Trace, checked, synthetic
from sglang_star_router.policy.registry import make_dispatch, make_rescheduler

SMALL = replace(PROFILES["24gb-7b"], name="small", kv_capacity=20_000)
RARELY = {"status_interval_s": 1e3, "decision_interval_s": 1e6}
UNTIMED = ("wall_s", "decision_ms")


def trace_of(*rows: tuple[float, int, int]) -> Trace:
    return checked("test", *zip(*rows, strict=True))


def constant(profile: Profile, *, step_ms: float = 10.0) -> Profile:
    """A profile whose step and prefill times depend on nothing."""
    return replace(
        profile,
        base_ms=step_ms,
        per_request_ms=0.0,
        per_token_ms=0.0,
        prefill_base_ms=0.0,
        prefill_token_ms=0.0,
        prefill_square_ms=0.0,
        link_latency_ms=0.0,
        link_bytes_per_s=1e15,
        host_bytes_per_s=1e15,
    )


def simulate(
    trace: Trace, profile: Profile, *, policy: str = "least-tokens", **config: Any
) -> Fleet:
    dispatch, rescheduler, oracle = POLICIES[policy]
    decode = config.pop("decode", (profile,))
    prefill = config.pop("prefill", constant(profile))
    settings_ = {"max_new_tokens": 4096, "drain_s": 1e6, "duration_s": trace.span_s + 1}
    fleet = Fleet(
        trace,
        FleetConfig(decode=decode, prefill=prefill, **(settings_ | config)),
        make_dispatch(dispatch),
        None if rescheduler == "off" else make_rescheduler(rescheduler),
        oracle=oracle,
    )
    fleet.run()
    return fleet


def step_by_step(profile: Profile, prompt: int, output: int) -> float:
    """Decode time of one request alone, adding up its steps, seconds."""
    return sum(profile.step_ms(1, prompt + k) for k in range(output - 1)) / 1e3


@pytest.mark.parametrize(("bias", "sign"), [(0.25, 1), (4.0, -1)])
def test_a_biased_predictor_is_corrected_as_the_router_would(bias: float, sign: int) -> None:
    trace = synthetic(0).window(4.0, 300.0, 0)
    found, left = (
        simulate(
            trace,
            PROFILES["24gb-7b"],
            policy="star",
            decode=(PROFILES["24gb-7b"],) * 4,
            estimate_bias=bias,
            calibrate=calibrate,
            max_new_tokens=32_768,
        )
        for calibrate in (True, False)
    )
    assert sign * found.calibration.shift[2] > 0.5
    assert not left.calibration.shift.any()
    assert not found.calibration._open  # every request ended, and none is remembered


@pytest.mark.parametrize("output", [1, 2, 3, 500, 4000])
def test_one_request_alone_takes_the_sum_of_its_steps(output: int) -> None:
    recorder = simulate(trace_of((1.0, 300, output)), PROFILES["24gb-7b"]).recorder
    assert recorder.completed == 1
    if output > 1:
        expected = step_by_step(PROFILES["24gb-7b"], 300, output) / (output - 1) * 1e3
        assert recorder.tpot.mean == pytest.approx(expected, rel=1e-9)


def test_first_token_waits_for_prefill_and_transfer() -> None:
    profile = PROFILES["24gb-7b"]
    fleet = simulate(trace_of((1.0, 4000, 10)), profile, prefill=profile)
    expected = profile.prefill_ms(4000) + profile.link_latency_ms
    expected += 1e3 * 4000 * profile.kv_bytes / profile.link_bytes_per_s
    assert fleet.recorder.ttft.mean == pytest.approx(expected, rel=1e-9)


def test_equal_requests_together_share_every_step() -> None:
    count, prompt, output = 8, 100, 400
    profile = PROFILES["24gb-7b"]
    rows = [(0.0, prompt, output)] * count
    fleet = simulate(trace_of(*rows), profile, prefill_instances=count)
    steps = [profile.step_ms(count, count * (prompt + k)) for k in range(output - 1)]
    # But for the first ones: KV arrives over one link, one request's after the other's.
    assert fleet.recorder.tpot.mean == pytest.approx(sum(steps) / (output - 1), rel=1e-4)
    assert fleet.recorder.itl.count == pytest.approx(count * (output - 1))


def test_md1_queue_matches_pollaczek_khinchine() -> None:
    """One slot and equal lengths make the decode instance an M/D/1 queue."""
    output, step_ms, load = 101, 10.0, 0.7
    profile = constant(replace(SMALL, max_running=1), step_ms=step_ms)
    service = (output - 1) * step_ms / 1e3
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(service / load, 10_000))
    trace = checked("md1", arrivals, np.full(10_000, 10), np.full(10_000, output))
    waiting_ms = simulate(trace, profile, **RARELY).recorder.ttft.mean
    expected = 1e3 * load * service / (2 * (1 - load))
    assert waiting_ms == pytest.approx(expected, rel=0.08)


def test_mg1_queue_matches_pollaczek_khinchine() -> None:
    """The same with lengths that vary: the wait follows their second moment."""
    step_ms, load, count = 10.0, 0.6, 15_000
    profile = constant(replace(SMALL, max_running=1), step_ms=step_ms)
    rng = np.random.default_rng(6)
    output = rng.choice([21, 401], count, p=[0.8, 0.2])
    service = (output - 1) * step_ms / 1e3
    arrivals = np.cumsum(rng.exponential(service.mean() / load, count))
    trace = checked("mg1", arrivals, np.full(count, 10), output)
    rate = count / arrivals[-1]
    used = rate * service.mean()
    expected = 1e3 * rate * (service**2).mean() / (2 * (1 - used))
    waiting_ms = simulate(trace, profile, **RARELY).recorder.ttft.mean
    assert waiting_ms == pytest.approx(expected, rel=0.1)


def test_mm_infinity_occupancy_follows_littles_law() -> None:
    """With memory for all, requests running = rate x time, whatever the lengths."""
    profile = constant(replace(PROFILES["80gb-7b"], kv_capacity=10**9))
    trace = synthetic(3, rate=2.0, duration_s=2000.0, output_median=800.0)
    fleet = simulate(trace, profile, max_new_tokens=32_768)
    time_s = (trace.output_len - 1).mean() * 0.01
    occupancy = fleet.recorder.itl.total / 1e3 / fleet.now_s
    rate = trace.arrival_s.size / fleet.now_s
    assert occupancy == pytest.approx(rate * time_s, rel=1e-6)


def test_closed_form_steps_equal_single_steps() -> None:
    """Jumping k steps must land exactly where k single steps do."""

    class Deaf:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

    def instance() -> Instance:
        made = Instance(0, "d", PROFILES["24gb-7b"], Deaf())  # type: ignore[arg-type]
        for slot in range(5):
            made._enter(Request(f"r{slot}", slot, 0.0, 100 * slot + 1, 5000, 9000))
        return made

    jumped, walked = instance(), instance()
    jumped.skip(1000)
    for _ in range(1000):
        walked.skip(1)
    assert jumped.steps == walked.steps == 1000
    assert jumped.running_kv == walked.running_kv
    assert jumped.started_s == pytest.approx(walked.started_s, rel=1e-12)
    for seconds in (0.0, 0.01, 1.0, 12.3456):
        steps = jumped.steps_within(seconds)
        assert jumped.span_s(steps) <= seconds + 1e-9
        assert jumped.span_s(steps + 1) > seconds


def test_a_full_pool_retracts_the_request_with_the_fewest_output_tokens() -> None:
    """Three requests outgrow the pool; the youngest must be the one that pauses."""
    profile = constant(replace(SMALL, kv_capacity=7_000))
    rows = [(0.0, 1000, 2500), (0.5, 1000, 2500), (1.0, 1000, 2500)]
    retracted: list[str] = []

    class Watched(Fleet):
        def request_retracted(self, request: Request) -> None:
            retracted.append(request.rid)
            assert request.output == min(
                r.tokens(r.instance.steps) for r in self.live.values() if r.instance
            )
            super().request_retracted(request)

    fleet = Watched(
        trace_of(*rows),
        FleetConfig(
            decode=(profile,),
            prefill=profile,
            max_new_tokens=2500,
            drain_s=1e5,
            host_share=math.inf,
        ),
        make_dispatch("least-tokens"),
        None,
    )
    recorder = fleet.run()
    assert retracted
    assert retracted[0] == "r2"
    assert recorder.completed == 3
    assert recorder.itl.max > 1000.0


def test_nobody_is_admitted_while_retracted_requests_wait() -> None:
    profile = constant(replace(SMALL, kv_capacity=7_000))
    rows = [(0.0, 1000, 2500), (0.5, 1000, 2500), (1.0, 1000, 2500)]
    rows += [(20.0 + k, 50, 20) for k in range(5)]
    seen = 0

    class Watched(Fleet):
        def prefill(self, request: Request, now_s: float) -> None:
            nonlocal seen
            assert request.instance is not None
            assert not request.instance.retracted
            seen += 1
            super().prefill(request, now_s)

    fleet = Watched(
        trace_of(*rows),
        FleetConfig(
            decode=(profile,),
            prefill=profile,
            max_new_tokens=2500,
            drain_s=1e5,
            duration_s=60,
            host_share=math.inf,
        ),
        make_dispatch("round-robin"),
        None,
    )
    recorder = fleet.run()
    assert recorder.completed == seen == 8
    assert recorder.retractions > 0
    assert recorder.ttft.max > 5_000.0


def test_a_move_costs_its_link_time_and_frees_its_source() -> None:
    profile = constant(SMALL)
    slow_link = replace(profile, link_bytes_per_s=1e9)
    rows = [(0.0, 5000, 3000), (0.1, 5000, 3000), (0.2, 100, 20), (0.3, 100, 20)]
    fleet = Fleet(
        trace_of(*rows),
        FleetConfig(decode=(slow_link, slow_link), prefill=profile, duration_s=5, drain_s=1e4),
        make_dispatch("round-robin"),
        None,
    )

    def move(_: None) -> None:
        request = fleet.live["r0"]
        assert fleet.mover.start(request, *fleet.instances, "copy", fleet.now_s)
        assert fleet.instances[1].reserved_kv > 5000

    fleet.at(3.0, move, None)
    recorder = fleet.run()
    assert recorder.completed == 4
    assert recorder.migrations == 1
    context = 5000 + 3.0 / 0.01
    assert recorder.migrated_tokens == pytest.approx(context, rel=0.02)
    # Pre-copied while decoding: the pause is the tail and a boundary, not the whole copy.
    copy_ms = context * profile.kv_bytes / 1e9 * 1e3
    assert recorder.stall.max < 4 * 10.0 < copy_ms


class Checked(Fleet):
    """Asserts after every wake that no instance's books can be wrong."""

    def _wake(self, wake: tuple[Instance, int]) -> None:
        super()._wake(wake)
        instance = wake[0]
        running = sum(r.kv(instance.steps) for r in instance.running.values())
        assert instance.running_kv == running
        assert instance.free_kv >= 0
        assert instance.held_kv >= 0
        assert instance.reserved_kv >= 0
        assert all(r.instance is instance for r in instance.running.values())


runs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "policy": st.sampled_from(list(POLICIES)),
        "instances": st.integers(1, 5),
        "rate": st.floats(0.2, 4.0),
        "median": st.sampled_from([20.0, 300.0, 1500.0]),
        "error": st.sampled_from([0.0, 1.0, math.inf]),
    }
)


@settings(max_examples=25, deadline=None)
@given(runs)
def test_requests_and_tokens_are_conserved(run: dict[str, Any]) -> None:
    trace = synthetic(
        run["seed"], rate=run["rate"], duration_s=60.0, output_median=run["median"],
        max_output=6000, max_prompt=8000,
    )  # fmt: skip
    dispatch, rescheduler, oracle = POLICIES[run["policy"]]
    config = FleetConfig(
        decode=(SMALL, SMALL.slowed(1.7))[: run["instances"]] * run["instances"],
        prefill_instances=2,
        duration_s=60.0,
        drain_s=1e6,
        max_new_tokens=6000,
        error_scale=run["error"],
    )
    fleet = Checked(
        trace,
        config,
        make_dispatch(dispatch),
        None if rescheduler == "off" else make_rescheduler(rescheduler),
        seed=run["seed"],
        oracle=oracle,
    )
    recorder = fleet.run()
    assert recorder.requests == trace.arrival_s.size
    assert recorder.completed + recorder.failed == recorder.requests
    if not recorder.failed:
        assert recorder.output_tokens == trace.output_len.sum()
        assert recorder.decoded_tokens == (trace.output_len - 1).sum()
    assert not fleet.live
    assert fleet.table.live == 0
    for instance in fleet.instances:
        assert instance.used_kv == instance.reserved_kv == 0
        assert instance.moves_in == instance.moves_out == instance.copies == 0
        assert not [*instance.queue, *instance.arrived, *instance.retracted]


def row_of(policy: str, **changes: Any) -> dict[str, Any]:
    run = Run(policy=policy, trace=synthetic(1, rate=1.5), decode=4, duration_s=200.0)
    return execute(replace(run, **changes))[0]


@pytest.mark.parametrize("policy", ["reactive", "star"])
def test_runs_are_deterministic_per_seed(policy: str) -> None:
    first, second, other = (row_of(policy, seed=s) for s in (3, 3, 4))
    for row in (first, second, other):
        for key in UNTIMED:
            del row[key]
    assert first == second
    assert first != other


def test_result_rows_are_the_documented_json() -> None:
    row = json.loads(json.dumps(row_of("star"), allow_nan=False))
    documented = (
        "policy profile trace instances rate_scale seed requests completed failed ttft_ms tpot_ms "
        "itl_ms slo slo_attainment goodput_rps throughput_tok_s retractions recomputed_tokens "
        "migrations migrated_tokens stall_ms load_cv decision_ms wall_s"
    )
    assert set(documented.split()) <= set(row)
    assert set(row["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert set(row["itl_ms"]) == {"mean", "p50", "p90", "p99", "max"}
    assert "emulated" in row["predictor"]


def test_star_keeps_goodput_past_saturation_where_static_dispatch_loses_it() -> None:
    run = {"load": 1.6, "duration_s": 600.0, "warmup_s": 200.0}
    star, static = row_of("star", **run), row_of("least-tokens", **run)
    assert star["goodput_rps"] > 1.5 * static["goodput_rps"]


def test_star_moves_far_less_than_reactive_below_saturation() -> None:
    star, reactive = (row_of(p, load=0.75, duration_s=600.0) for p in ("star", "reactive"))
    assert reactive["migrations"] > 20
    assert star["migrations"] <= reactive["migrations"] / 5
    assert star["slo_attainment"] >= reactive["slo_attainment"]


def test_perfect_and_useless_predictors() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(7, 1, 4000).astype(np.int64) + 1
    output = (lengths * rng.random(4000)).astype(np.float64)
    noise = rng.standard_normal((4000, 2))
    curve = ErrorCurve.read()
    left = np.maximum(lengths - output, 1.0)
    exact = EmulatedPredictor(lengths, curve, 0.0).quantiles(output, lengths * 1.0, noise)
    assert exact[:, 2] == pytest.approx(left)
    blind = EmulatedPredictor(lengths, curve, math.inf).quantiles(output, lengths * 1.0, noise)
    order = np.argsort(output)
    assert (np.diff(blind[order, 2]) != 0).any()
    same_age = EmulatedPredictor(lengths, curve, math.inf).quantiles(
        np.full(2, 100.0), np.array([200.0, 9000.0]), noise[:2]
    )
    assert same_age[0] == pytest.approx(same_age[1])


def test_emulated_quantiles_are_calibrated() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(7, 1, 20_000).astype(np.int64) + 1
    predictor = EmulatedPredictor(lengths, ErrorCurve.read(), 1.0)
    age = np.zeros(lengths.size)
    noise = rng.standard_normal((lengths.size, 2))
    found = predictor.quantiles(age, lengths.astype(np.float64), noise)
    inside = (found[:, 0] <= lengths) & (lengths <= found[:, 4])
    assert inside.mean() == pytest.approx(0.8, abs=0.03)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_histogram_quantiles_are_within_a_bin(values: list[float], level: float) -> None:
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    exact = float(np.quantile(values, level, method="inverted_cdf"))
    assert histogram.quantile(level) == pytest.approx(exact, rel=0.006)
    assert histogram.mean == pytest.approx(np.mean(values))
    assert histogram.max == max(values)


def test_profiles_follow_from_the_datasheet() -> None:
    card = roofline("x", memory_gb=80, bandwidth=3.35e12, flops=989e12, link_bytes_per_s=1e9)
    weights_ms = 1e3 * 2 * 7.62e9 / (3.35e12 * 0.8)
    assert card.base_ms == pytest.approx(weights_ms + 1.5)
    assert card.kv_bytes == 2 * 2 * 28 * 512
    assert card.kv_capacity * card.kv_bytes <= 80e9 * 0.9 - 2 * 7.62e9
    assert find("24gb-7b*2").step_ms(3, 500) == pytest.approx(2 * find("24gb-7b").step_ms(3, 500))


@pytest.mark.parametrize("name", ["40gb-7b", "24gb-7b*0", "24gb-7b*x", "24gb-7b*-1", ""])
def test_unknown_profiles_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        find(name)


def test_what_can_never_fit_fails_at_once_and_the_rest_goes_on() -> None:
    rows = [(0.0, 100, 50), (1.0, 19_000, 50), (2.0, 100, 50)]
    recorder = simulate(trace_of(*rows), SMALL).recorder
    assert (recorder.completed, recorder.too_long) == (2, 1)


def test_fleets_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one decode"):
        execute(Run(policy="star", trace=synthetic(0), decode=0))
    with pytest.raises(ConfigError, match="no policy"):
        execute(Run(policy="magic", trace=synthetic(0)))
    with pytest.raises(ConfigError, match="rate scale"):
        execute(Run(policy="star", trace=synthetic(0), rate_scale=0.0))


def test_error_curves_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    good = {"label": "x", "measured": False, "progress": [0, 1], "log_error_std": [1, 0.5]}
    file.write_text(json.dumps(good))
    assert ErrorCurve.read(file).label == "x"
    for change in ({"progress": [1, 0]}, {"log_error_std": [1]}, {"log_error_std": [-1, 1]}):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError):
            ErrorCurve.read(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not an error curve"):
        ErrorCurve.read(file)


def test_capacity_search_finds_the_edge() -> None:
    run = Run(policy="star", trace=synthetic(0))

    def by_instances(probe: Run) -> dict[str, Any]:
        return {"slo_attainment": 1.0 if probe.decode >= 13 else 0.5}

    assert capacity.fewest_instances(run, 0.99, by_instances)["instances"] == 13

    def by_load(probe: Run) -> dict[str, Any]:
        assert probe.load is not None
        return {
            "slo_attainment": 1.0 if probe.load <= 0.83 else 0.5,
            "requests": 100,
            "duration_s": 10.0,
            "warmup_s": 0.0,
            "goodput_rps": 10.0,
        }

    found = capacity.highest_load(run, 0.99, by_load)
    assert found["load"] == pytest.approx(0.83, abs=0.02)
    assert capacity.fewest_instances(run, 2.0, by_instances)["instances"] is None
