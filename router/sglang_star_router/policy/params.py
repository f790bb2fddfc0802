"""Every number a policy can be tuned by, with its unit and why it has its default.

The sweeps behind the defaults are in ``benchmark/LOG.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sglang_star.errors import ConfigError

P = TypeVar("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticParams:
    """Round-robin, least-requests and least-tokens have nothing to tune."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactiveParams:
    """Moves on current load alone.

    Attributes:
        gap: move when source and target differ by more than this share of KV capacity.
        moves_per_instance: migrations one instance takes part in at a time.
        cooldown_s: a request that moved stays where it is for so long, seconds.
        target_limit: share of KV capacity a target may be filled to by a move.
    """

    gap: float = 0.1
    moves_per_instance: int = 1
    cooldown_s: float = 5.0
    target_limit: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class StarPointParams:
    """The paper's rule as we read it: point forecasts and the variance they leave.

    Attributes:
        horizon_steps: decode steps looked ahead; horizon_points: how many instants in it.
        discount: weight of the last instant relative to the first, spread geometrically.
        overload: an instance is overloaded above ``1 + overload`` times the mean load, and
            underloaded below the mean.
        min_gain: least relative reduction of the weighted variance one move must bring.
        repay_factor: the remaining output must exceed this many times the move's own steps.
        moves_per_round: orders per decision; moves_per_instance, cooldown_s, target_limit: as in
            :class:`ReactiveParams`.
        copy_tokens_per_s: context tokens one link carries per second.
    """

    horizon_steps: int = 1024
    horizon_points: int = 6
    discount: float = 0.5
    overload: float = 0.05
    min_gain: float = 0.02
    repay_factor: float = 4.0
    moves_per_round: int = 8
    moves_per_instance: int = 1
    cooldown_s: float = 5.0
    target_limit: float = 0.95
    copy_tokens_per_s: float = 50_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StarParams:
    """Dispatch, admission and moves of ``star``; ``oracle`` uses the same ones.

    Attributes:
        horizon_steps: overflow further away than this many decode steps is not acted upon: by
            then most of what is running has finished and what replaces it is unknown.
        horizon_points: instants at which the forecast is evaluated.
        risk_sigma: standard deviations of forecast KV held in reserve when judging overflow.
        target_limit: share of KV capacity a target may be forecast to reach through a move.
        excess_min: share of capacity by which the forecast must exceed it before anything moves.
        repay_factor: as in :class:`StarPointParams`.
        moves_per_round, moves_per_instance, cooldown_s, copy_tokens_per_s: as above.
        recompute_tokens_per_s: context tokens one prefill instance recomputes per second; 0
            forbids recomputing.
        tpot_slo_ms: a step slower than this counts as an instance's limit, as full KV does.
        weight_tokens: KV tokens whose bytes equal the model's weights: with it the step time an
            instance would have under another load follows from the one it has now.
        clip_new_tokens: SGLang's ceiling on the output it reckons with at admission.
        admit_pressure: hold an arrival while every instance with room is forecast to pass this
            share of its limit within the horizon.
        late_spare: a request past its deadline is placed only where this share of KV stays free
            beyond what admission wants, so that it does not make a fresher one late; scaled by
            how many others are held.
        late_full: held requests per instance at which ``late_spare`` applies in full.
        hold: keep arrivals no instance would admit at once at the router.
        hold_deadline_s: a request held longer than this has missed its TTFT limit; it yields to
            fresher ones.
        hold_max_s: after this it is answered 429.
        hold_max_requests: held requests beyond this are answered 429 at once.
    """

    horizon_steps: int = 1536
    horizon_points: int = 8
    risk_sigma: float = 1.0
    target_limit: float = 0.97
    excess_min: float = 0.0
    repay_factor: float = 2.0
    moves_per_round: int = 32
    moves_per_instance: int = 1
    cooldown_s: float = 10.0
    copy_tokens_per_s: float = 50_000.0
    recompute_tokens_per_s: float = 0.0
    tpot_slo_ms: float = 50.0
    weight_tokens: float = 265_000.0
    clip_new_tokens: int = 4096
    admit_pressure: float = 1.1
    late_spare: float = 0.3
    late_full: float = 0.5
    hold: bool = True
    hold_deadline_s: float = 1.5
    hold_max_s: float = 30.0
    hold_max_requests: int = 4096


def build(kind: type[P], given: Mapping[str, Any]) -> P:
    """Make a parameter set, refusing names it does not have.

    Raises:
        ConfigError: unknown name, or a value of another type or negative.
    """
    known = {f.name: f.default for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"{kind.__name__} has no parameter {name!r}",
                hint=f"it has: {', '.join(sorted(known)) or 'none'}",
            )
        wanted = type(known[name])
        if isinstance(value, bool) is not (wanted is bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} wants a {wanted.__name__}, not {value!r}")
        if not value >= 0 or (wanted is int and value != int(value)):
            raise ConfigError(f"{name} must be a {wanted.__name__} of at least 0, not {value!r}")
    return kind(**given)
