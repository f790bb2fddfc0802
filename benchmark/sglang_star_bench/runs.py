"""One simulated run, from names and numbers to a row of the result JSON."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from sglang_star.errors import ConfigError
from sglang_star.platform.profile import PROFILES, Profile, find
from sglang_star_bench import baselines, version
from sglang_star_bench.simulator.emulated import ErrorCurve
from sglang_star_bench.simulator.fleet import Fleet, FleetConfig, Progress
from sglang_star_bench.simulator.saturation import (
    prefill_needed,
    saturation_rate,
    scale_for_load,
)
from sglang_star_bench.traces import Trace
from sglang_star_router.policy.base import DispatchPolicy, ReschedulePolicy
from sglang_star_router.policy.holding import Queued
from sglang_star_router.policy.params import StarParams, build
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

_OTHERS: Final[dict[str, Callable[[], DispatchPolicy]]] = {
    "power-of-two": baselines.PowerOfTwo,
    "cache-aware": baselines.CacheAware,
    "freeness": baselines.Freeness,
    "shortest-first": baselines.ShortestFirst,
}
"""Dispatch that only the simulator has; ``queued-`` puts it behind star's queue."""

TOLD: Final = {"weights": 0.8, "link": 2.0, "slo": 1.0}
"""What a policy is told as a multiple of the truth. A user gives weights by the parameter count and
a link by its data sheet; the SLO is the user's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to simulate.

    Attributes:
        profile: one name for all, or comma-separated names repeated round the fleet.
        rate_scale: how much faster than recorded the trace is played; or load: multiple of the
            saturation rate, which then sets the rate scale.
        prefill: instances of the prefill pool; 0 sizes it automatically.
        link_gbps: every decode instance's link, gigabits per second; None keeps the profile's.
        part: play this one of the disjoint stretches of the trace instead of one that the seed
            picks; the load is then a multiple of the whole trace's saturation rate, since nobody
            knows a stretch's own beforehand.
        own_past: take the judged window's own lengths for its past, which no predictor can know:
            only to show what that is worth.
        told: multiples of the truth that policies are told, see :data:`TOLD`.
        config: further :class:`FleetConfig` fields.
        star, reactive, star_point, freeness: policy parameters.
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
    part: int | None = None
    own_past: bool = False
    prefill: int = 0
    prefill_profile: str = "80gb-7b"
    link_gbps: float | None = None
    error_scale: float = 1.0
    curve: ErrorCurve = field(default_factory=ErrorCurve.read)
    told: Mapping[str, float] = field(default_factory=lambda: dict(TOLD))
    config: Mapping[str, Any] = field(default_factory=dict)
    star: Mapping[str, Any] = field(default_factory=dict)
    reactive: Mapping[str, Any] = field(default_factory=dict)
    star_point: Mapping[str, Any] = field(default_factory=dict)
    freeness: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[str, Any]:
        """All that decides the result, code and trace included, as JSON has it."""
        known: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("trace", "curve")
        }
        known |= {"trace": self.trace.name, "trace_sha": version.of_trace(self.trace)}
        curve = [self.curve.label, self.curve.log_error_std.tolist(), self.curve.turns]
        known |= {"curve": curve, "code": version.of_code()}
        if self.error_scale == float("inf"):  # JSON knows no infinity
            known["error_scale"] = "inf"
        settled: dict[str, Any] = json.loads(json.dumps(known, sort_keys=True, default=dict))
        return settled

    @property
    def key(self) -> str:
        """Names the result: equal keys, equal rows."""
        text = json.dumps(self.parameters(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
    window, scale = window_of(run)
    if run.own_past:
        window = replace(window, past=window.output_len)
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
        "part": run.part,
        "error_scale": None if run.error_scale == float("inf") else run.error_scale,
        "predictor": "none" if fleet.view.predictor is None else f"emulated: {run.curve.label}",
        "duration_s": run.duration_s,
        "warmup_s": run.warmup_s,
    }
    row = head | recorder.summary(run.duration_s - run.warmup_s)
    row["simulated_s"] = round(fleet.now_s, 3)
    row["wall_s"] = round(wall, 4)
    row |= {"key": run.key, "parameters": run.parameters()}
    return row, fleet


def window_of(run: Run) -> tuple[Trace, float]:
    """What is played of the run's trace, and how much faster than recorded."""
    decode, scale = run.profiles(), run.rate_scale
    if run.part is not None:
        if run.load is not None:
            scale = run.load * saturation_rate(run.trace, decode) / run.trace.rate
        return run.trace.part(scale, run.duration_s, run.part), scale
    if run.load is not None:
        scale = scale_for_load(run.trace, decode, run.load, run.duration_s, run.seed)
    return run.trace.window(scale, run.duration_s, run.seed), scale


def _policies(run: Run, profile: Profile) -> tuple[DispatchPolicy, ReschedulePolicy | None, bool]:
    """Build the policies with the numbers only the fleet knows filled in."""
    dispatch_name, rescheduler_name, oracle = parts(run.policy)
    known = fleet_params(profile, run.told)
    star = known["star"] | dict(run.star)
    if "tpot_slo_ms" in star:
        star["tpot_slo_ms"] *= run.told["slo"]
    params: dict[str, Mapping[str, Any]] = {
        "star": star,
        "oracle": star,
        "reactive": run.reactive,
        "star-point": known["star-point"] | dict(run.star_point),
    }
    dispatch = _dispatch(dispatch_name, dispatch_params(dispatch_name, params))
    if rescheduler_name == "off":
        return dispatch, None, oracle
    if rescheduler_name == baselines.FreenessMoves.name:
        chosen = build(baselines.FreenessParams, run.freeness)
        return dispatch, baselines.FreenessMoves(chosen), oracle
    return dispatch, make_rescheduler(rescheduler_name, **params.get(rescheduler_name, {})), oracle


def _dispatch(name: str, params: Mapping[str, Any]) -> DispatchPolicy:
    inner = name.removeprefix("queued-")
    if inner not in _OTHERS:
        return make_dispatch(name, **params)
    other = _OTHERS[inner]()
    return other if inner == name else Queued(other, build(StarParams, params))


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


def fleet_params(
    profile: Profile, told: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """Policy parameters that follow from the hardware, by policy; ``told``: see :data:`TOLD`."""
    told = told or {"weights": 1.0, "link": 1.0}
    copy = told["link"] * profile.link_bytes_per_s / profile.kv_bytes
    weights = told["weights"] * profile.weight_tokens
    return {
        "star": {"weight_tokens": weights, "copy_tokens_per_s": copy},
        "star-point": {"copy_tokens_per_s": copy},
    }


__all__ = ["POLICIES", "PROFILES", "Run", "dispatch_params", "execute", "fleet_params", "parts"]
