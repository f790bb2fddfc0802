"""One simulated run, from names and numbers to a row of the result JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import PROFILES, Profile, find
from sglang_star_bench.simulator.emulated import ErrorCurve
from sglang_star_bench.simulator.fleet import Fleet, FleetConfig, Progress
from sglang_star_bench.simulator.saturation import (
    prefill_needed,
    saturation_rate,
    scale_for_load,
)
from sglang_star_bench.traces import Trace
from sglang_star_router.policy.base import DispatchPolicy, ReschedulePolicy
from sglang_star_router.policy.registry import make_dispatch, make_rescheduler

POLICIES: dict[str, tuple[str, str, bool]] = {
    "round-robin": ("round-robin", "off", False),
    "least-requests": ("least-requests", "off", False),
    "least-tokens": ("least-tokens", "off", False),
    "reactive": ("least-tokens", "reactive", False),
    "star-point": ("least-tokens", "star-point", False),
    "star": ("star", "star", False),
    "oracle": ("star", "oracle", True),
}
"""Name -> dispatch, rescheduler, whether true lengths are known.

``DISPATCH+RESCHEDULER`` names any other combination, e.g. ``least-tokens+star`` or ``star+off``.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to simulate.

    Attributes:
        profile: one name for all, or comma-separated names repeated round the fleet.
        rate_scale: how much faster than recorded the trace is played; or load: multiple of the
            saturation rate, which then sets the rate scale.
        prefill: instances of the prefill pool; 0 sizes it automatically.
        link_gbps: every decode instance's link, gigabits per second; None keeps the profile's.
        config: further :class:`FleetConfig` fields.
        star, reactive, star_point: policy parameters.
    """

    policy: str
    trace: Trace
    profile: str = "24gb-7b"
    decode: int = 8
    rate_scale: float = 1.0
    load: float | None = None
    duration_s: float = 600.0
    warmup_s: float = 0.0
    seed: int = 0
    prefill: int = 0
    prefill_profile: str = "80gb-7b"
    link_gbps: float | None = None
    error_scale: float = 1.0
    curve: ErrorCurve = field(default_factory=ErrorCurve.read)
    config: Mapping[str, Any] = field(default_factory=dict)
    star: Mapping[str, Any] = field(default_factory=dict)
    reactive: Mapping[str, Any] = field(default_factory=dict)
    star_point: Mapping[str, Any] = field(default_factory=dict)

    def profiles(self) -> tuple[Profile, ...]:
        """The profile of every decode instance.

        Raises:
            ConfigError: unknown profile, or no instance.
        """
        if self.decode < 1:
            raise ConfigError(f"a fleet needs at least one decode instance, not {self.decode}")
        names = self.profile.split(",")
        found = [find(names[row % len(names)]) for row in range(self.decode)]
        if self.link_gbps is None:
            return tuple(found)
        if not 0 < self.link_gbps < float("inf"):
            raise ConfigError(f"link speed must be positive, not {self.link_gbps} Gb/s")
        return tuple(replace(p, link_bytes_per_s=self.link_gbps * 1e9 / 8) for p in found)


def execute(run: Run, progress: Progress | None = None) -> tuple[dict[str, Any], Fleet]:
    """Simulate; returns the result row and the fleet, which still holds its histograms.

    Raises:
        ConfigError: anything wrong with the run's names or numbers.
    """
    decode = run.profiles()
    scale = run.rate_scale
    if run.load is not None:
        scale = scale_for_load(run.trace, decode, run.load, run.duration_s, run.seed)
    window = run.trace.window(scale, run.duration_s, run.seed)
    if window.arrival_s.size == 0:
        raise ConfigError(
            f"no request of {run.trace.name} arrives within {run.duration_s} s",
            hint="use a longer --duration or a higher --rate-scale",
        )
    dispatch, rescheduler, oracle = _policies(run, decode[0])
    extra = dict(run.config)
    if "hold_deadline_s" in run.star:
        extra.setdefault("hold_deadline_s", run.star["hold_deadline_s"])
    pool = find(run.prefill_profile)
    config = FleetConfig(
        decode=decode,
        prefill=pool,
        prefill_instances=run.prefill or prefill_needed(window, pool, run.duration_s),
        duration_s=run.duration_s,
        warmup_s=run.warmup_s,
        curve=run.curve,
        error_scale=run.error_scale,
        **extra,
    )
    started = time.perf_counter()
    fleet = Fleet(window, config, dispatch, rescheduler, seed=run.seed, oracle=oracle)
    recorder = fleet.run(progress)
    wall = time.perf_counter() - started
    head = {
        "policy": run.policy,
        "profile": run.profile,
        "trace": run.trace.name,
        "instances": run.decode,
        "prefill_instances": config.prefill_instances,
        "rate_scale": round(scale, 6),
        "load": round(window.arrival_s.size / run.duration_s / saturation_rate(window, decode), 4),
        "seed": run.seed,
        "error_scale": None if run.error_scale == float("inf") else run.error_scale,
        "predictor": "none" if fleet.view.predictor is None else f"emulated: {run.curve.label}",
        "duration_s": run.duration_s,
        "warmup_s": run.warmup_s,
    }
    row = head | recorder.summary(run.duration_s - run.warmup_s)
    row["simulated_s"] = round(fleet.now_s, 3)
    row["wall_s"] = round(wall, 4)
    return row, fleet


def _policies(run: Run, profile: Profile) -> tuple[DispatchPolicy, ReschedulePolicy | None, bool]:
    """Build the policies with the numbers only the fleet knows filled in."""
    dispatch_name, rescheduler_name, oracle = parts(run.policy)
    known = fleet_params(profile)
    star = known["star"] | dict(run.star)
    params: dict[str, Mapping[str, Any]] = {
        "star": star,
        "oracle": star,
        "reactive": run.reactive,
        "star-point": known["star-point"] | dict(run.star_point),
    }
    dispatch = make_dispatch(dispatch_name, **dispatch_params(dispatch_name, params))
    if rescheduler_name == "off":
        return dispatch, None, oracle
    return dispatch, make_rescheduler(rescheduler_name, **params.get(rescheduler_name, {})), oracle


def parts(policy: str) -> tuple[str, str, bool]:
    """Dispatch, rescheduler, and whether true lengths are known.

    Raises:
        ConfigError: no such policy.
    """
    if policy in POLICIES:
        return POLICIES[policy]
    if "+" in policy:
        dispatch, rescheduler = policy.split("+", 1)
        return dispatch, rescheduler, rescheduler == "oracle"
    raise ConfigError(
        f"no policy {policy!r}",
        hint=f"choose from {', '.join(POLICIES)} or DISPATCH+RESCHEDULER",
    )


def dispatch_params(name: str, params: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a dispatch policy takes of ``params`` by policy: ``queued-*`` has star's queue."""
    return params.get("star" if name.startswith("queued-") else name, {})


def fleet_params(profile: Profile) -> dict[str, dict[str, float]]:
    """Policy parameters that follow from the hardware, by policy."""
    copy = profile.link_bytes_per_s / profile.kv_bytes
    return {
        "star": {"weight_tokens": profile.weight_tokens, "copy_tokens_per_s": copy},
        "star-point": {"copy_tokens_per_s": copy},
    }


__all__ = ["POLICIES", "PROFILES", "Run", "dispatch_params", "execute", "fleet_params", "parts"]
