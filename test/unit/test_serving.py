"""The serving benchmark, as far as it runs without engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import find
from sglang_star.star_request import star_of
from sglang_star_bench import figures, serving
from sglang_star_bench.replay import STOP, TOKEN_IDS, body
from sglang_star_router import calls
from sglang_star_router.command_line import parse_args
from unit import predictor_cases as cases

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


# --------------------------------------------------------------------------- who knows the length


def asked(length: int) -> dict[str, Any]:
    return body("replay-0-3-1-", prompt=40, length=length, limit=2048, seed=7)


def test_the_router_reads_the_same_of_requests_of_all_lengths() -> None:
    short, long = (
        calls.read_facts("/generate", json.dumps(asked(length) | {"stream": True}).encode())
        for length in (2, 1500)
    )
    assert short is not None
    assert short == long
    assert short.max_new_tokens == 2048
    assert asked(2)["input_ids"] == asked(1500)["input_ids"]


def estimates(length: int) -> Iterator[tuple[float, ...]]:
    """What the predictor says of a request at each of its first ten tokens."""
    sampling = pytest.importorskip("sglang.srt.sampling.sampling_params")
    from sglang_star.predictor.estimator import Estimator

    head = cases.head()
    estimator = Estimator(head)
    req = cases.request()
    fields = asked(length)
    req.origin_input_ids = fields["input_ids"]
    req.sampling_params = sampling.SamplingParams(**fields["sampling_params"])
    generator = np.random.default_rng(0)
    for tokens in range(1, 11):
        req.output_ids.append(100 + tokens)
        row = generator.standard_normal((1, head.width)).astype(np.float32)
        estimator.step(row, [req], [tokens])
        yield star_of(req).estimate


def test_the_predictor_says_the_same_of_requests_of_all_lengths() -> None:
    short, long = list(estimates(12)), list(estimates(1500))
    assert short == long
    assert short[-1][-1] > 12, "limited by a length that it should not know"


def test_the_end_token_comes_when_it_may_and_not_before() -> None:
    fields = asked(1500)["sampling_params"]
    assert STOP not in TOKEN_IDS
    assert fields["stop_token_ids"] == [STOP]
    assert fields["min_new_tokens"] == 1499  # masked until then, and beyond rivalry afterwards
    assert fields["logit_bias"] == {str(STOP): 1e4}


def test_a_limit_below_the_longest_output_is_refused() -> None:
    args = serving.parser().parse_args(["--limit", "1000", "--longest", "1001"])
    with pytest.raises(ConfigError, match="within --limit 1000"):
        serving.window(args, PROFILE)
