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
        request: expected KV of each request, ``[R, H]``.
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
    context = load.context_tokens(snapshot)
    size = context[:, None] + steps
    expected = alive * size
    variance = expected * (size - expected)
    n = len(snapshot.instances.ids)
    mean = np.empty((n, steps.size))
    spread = np.empty((n, steps.size))
    for column in range(steps.size):
        mean[:, column] = np.bincount(requests.instance, expected[:, column], n)
        spread[:, column] = np.bincount(requests.instance, variance[:, column], n)
    return Forecast(steps, mean, spread, expected)
