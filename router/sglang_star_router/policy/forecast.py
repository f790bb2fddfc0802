"""Expected KV of every instance at several instants ahead, and how sure that is.

Counts only what is known to the fleet now: requests that will arrive later replace those that
finish, so the forecast is meant for horizons within which few of them do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_star_router.policy import load
from sglang_star_router.policy.snapshot import FleetSnapshot, FloatArray
from sglang_star_router.policy.survival import survival


@dataclass(frozen=True, slots=True)
class Forecast:
    """KV tokens ahead.

    Attributes:
        steps: decode steps ahead, ``[H]``, the first 0.
        mean, variance: of the KV tokens wanted per instance, ``[I, H]``.
        request: expected KV of each request, ``[H, R]``: instants first, so that sums over
            requests run through contiguous memory.
    """

    steps: FloatArray
    mean: FloatArray
    variance: FloatArray
    request: FloatArray

    def need(self, sigma: float) -> FloatArray:
        """Mean plus ``sigma`` standard deviations, ``[I, H]`` tokens."""
        need: FloatArray = self.mean + sigma * np.sqrt(self.variance)
        return need


def instants(horizon_steps: int, points: int) -> FloatArray:
    """Instants at which a forecast is evaluated: now, then evenly up to the horizon."""
    return np.linspace(0.0, horizon_steps, max(points, 2))


def forecast(snapshot: FleetSnapshot, steps: FloatArray, *, true_lengths: bool = False) -> Forecast:
    """Forecast every instance; computed once per snapshot and set of instants.

    Args:
        true_lengths: use ``true_remaining`` instead of the estimates (the oracle).
    """
    key = f"forecast:{true_lengths}:{steps.size}:{steps[-1]:.0f}"
    if key not in snapshot.derived:
        snapshot.derived[key] = _forecast(snapshot, steps, true_lengths)
    found: Forecast = snapshot.derived[key]
    return found


def _forecast(snapshot: FleetSnapshot, steps: FloatArray, true_lengths: bool) -> Forecast:
    requests = snapshot.requests
    if true_lengths:
        known = np.repeat(requests.true_remaining[:, None], 5, axis=1)
        requests = replace(requests, remaining=known)
    alive = survival(requests, snapshot.prior_output, steps)
    context = load.context_tokens(snapshot).astype(np.float64)
    size = context + steps[:, None]
    expected = alive * size
    variance = expected * (size - expected)
    n = len(snapshot.instances.ids)
    owner = requests.instance
    mean, spread = np.zeros((n, steps.size)), np.zeros((n, steps.size))
    for instant in range(steps.size):
        mean[:, instant] = np.bincount(owner, expected[instant], n)
        spread[:, instant] = np.bincount(owner, variance[instant], n)
    return Forecast(steps, mean + _unlisted(snapshot)[:, None], spread, expected)


def _unlisted(snapshot: FleetSnapshot) -> FloatArray:
    """KV in use that no listed request accounts for, ``[I]``: taken to stay."""
    inst, reqs = snapshot.instances, snapshot.requests
    held = ~reqs.queued
    listed = np.bincount(reqs.instance[held], load.context_tokens(snapshot)[held], len(inst.ids))
    unlisted: FloatArray = np.maximum(inst.kv_used - listed, 0.0)
    return unlisted
