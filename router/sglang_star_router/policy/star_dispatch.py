"""Where ``star`` sends an arrival, and when it holds or refuses it.

An arrival goes to the instance whose forecast stays furthest from its limit, among those whose
SGLang would admit it at once. If none would, it waits at the router, where it can still go to
whichever instance frees room first, instead of in one instance's queue, where it cannot.
"""

from __future__ import annotations

import numpy as np

from sglang_star_router.policy import load
from sglang_star_router.policy.forecast import forecast, instants
from sglang_star_router.policy.holding import wait, with_room
from sglang_star_router.policy.limits import token_limit
from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.snapshot import (
    Arrival,
    FleetSnapshot,
    FloatArray,
    Placement,
    Requests,
)
from sglang_star_router.policy.static import NOBODY
from sglang_star_router.policy.survival import survival


class StarDispatch:
    """Least forecast pressure among instances with room; holds and sheds past saturation."""

    name = "star"

    def __init__(self, params: StarParams) -> None:
        self.params = params
        self.steps = instants(params.horizon_steps, params.horizon_points)

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return an instance, a hold, or a refusal once holding is pointless."""
        snapshot = sane(snapshot)
        p, inst = self.params, snapshot.instances
        if not inst.accepts.any():
            return NOBODY
        allowed = inst.accepts
        pressure = self._pressure(snapshot, arrival)
        if p.hold:
            allowed = with_room(snapshot, arrival, p) & (pressure <= p.admit_pressure)
            if not allowed.any():
                return wait(snapshot, arrival, p)
        row = load.lowest(np.round(pressure, 6), allowed, inst.ids)
        if row is None:
            return NOBODY
        return Placement(inst.ids[row], self.name, {"pressure": float(pressure[row])})

    def _pressure(self, snapshot: FleetSnapshot, arrival: Arrival) -> FloatArray:
        """Highest forecast share of each instance's limit with the arrival on it, ``[I]``."""
        p, placed = self.params, snapshot.placed
        alive = self._arrival_survival(snapshot, arrival)
        key = f"need:{p.risk_sigma}:{p.tpot_slo_ms}:{p.weight_tokens}"
        if key not in snapshot.derived:
            need = forecast(snapshot, self.steps).need(p.risk_sigma)
            snapshot.derived[key] = (need, token_limit(snapshot, p))
        need, limit = snapshot.derived[key]
        n = len(snapshot.instances.ids)
        tokens = np.bincount(placed.instance, placed.prompt_tokens, n) + arrival.prompt_tokens
        count = np.bincount(placed.instance, minlength=n) + 1
        added = (tokens[:, None] + count[:, None] * self.steps) * alive
        pressure: FloatArray = ((need + added) / limit[:, None]).max(axis=1)
        return pressure

    def _arrival_survival(self, snapshot: FleetSnapshot, arrival: Arrival) -> FloatArray:
        """P(still decoding) of the arrival at every instant: from the prior, or exact if known."""
        if np.isfinite(arrival.true_output_tokens):
            return (arrival.true_output_tokens > self.steps).astype(np.float64)
        key = f"arrival:{arrival.max_new_tokens}"
        if key not in snapshot.derived:
            one = np.ones(1, dtype=np.int64)
            flag = one.astype(bool)
            blank = Requests(
                rids=("",),
                instance=one * 0,
                prompt_tokens=one,
                output_tokens=one * 0,
                max_new_tokens=one * arrival.max_new_tokens,
                remaining=np.full((1, 5), np.nan),
                true_remaining=np.full(1, np.nan),
                movable=flag,
                queued=flag,
                since_move_s=np.zeros(1),
            )
            snapshot.derived[key] = survival(blank, snapshot.prior_output, self.steps)[:, 0]
        alive: FloatArray = snapshot.derived[key]
        return alive
