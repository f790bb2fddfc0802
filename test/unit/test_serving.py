"""The serving benchmark, as far as it runs without engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import find
from sglang_star_bench import figures, serving
from sglang_star_router.command_line import parse_args

PROFILE = replace(find("24gb-7b*2"), kv_capacity=6000)


def test_lengths_shrink_and_the_rate_makes_the_load() -> None:
    light = serving.parser().parse_args(["--load", "0.5", "--longest", "300"])
    heavy = serving.parser().parse_args(["--load", "1.0", "--longest", "300"])
    few, many = serving.window(light, PROFILE), serving.window(heavy, PROFILE)
    assert many.arrival_s.size == pytest.approx(2 * few.arrival_s.size, rel=0.2)
    assert few.arrival_s.max() <= light.duration
    assert few.output_len.max() <= 300
    assert few.output_len.min() >= 2


@pytest.mark.parametrize(
    "words", [["--shrink", "0"], ["--warmup", "200"], ["--load", "-1"], ["--kv-tokens", "0"]]
)
def test_numbers_that_make_no_sense_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        serving.window(serving.parser().parse_args(words), PROFILE)


def test_a_policy_that_knows_the_future_is_refused() -> None:
    with pytest.raises(ConfigError, match="oracle"):
        serving.main(["--policy", "oracle"])


@pytest.mark.parametrize("policy", [*serving.DEFAULT_POLICIES, "queued-round-robin+off"])
def test_the_router_understands_how_it_is_asked_to_follow_a_policy(policy: str) -> None:
    spec = serving.routing(policy, serving.parser().parse_args([]), PROFILE)
    config = parse_args(
        [
            "--pd-disaggregation",
            *("--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"),
            *("--rescheduler", spec["rescheduler"]),
            *spec["router_arguments"],
        ]
    )
    assert (config.policy, config.rescheduler) == serving.parts(policy)[:2]
    if config.policy.startswith(("star", "queued-")):
        assert config.dispatch_params["tpot_slo_ms"] == serving.parser().parse_args([]).tpot_slo


def test_the_simulated_side_finishes_what_it_is_given(tmp_path: Path) -> None:
    args = serving.parser().parse_args(["--duration", "60", "--warmup", "0", "--load", "0.6"])
    trace = serving.window(args, PROFILE)
    twin = serving.simulate(args, "least-tokens", PROFILE, trace)
    row = twin.summary(60.0) | {"policy": "least-tokens"}
    assert row["completed"] == trace.arrival_s.size
    assert row["throughput_tok_s"] == pytest.approx(trace.output_len.sum() / 60.0, rel=1e-4)
    assert "TPOT P99" in serving.table(row, row)
    figures.distributions([("cluster", twin), ("simulator", twin)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
