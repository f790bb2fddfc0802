"""Moves driven by forecast overflow: only what will not fit here, only to where it will.

Every instance's KV is forecast over the horizon. One that is going to pass its limit gives away
the request whose leaving lowers the overflow most for what moving it costs, to the instance that
has most room over the whole horizon with the guest on it, of those that would grant it now. Nothing
else moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_star_router.policy import load
from sglang_star_router.policy.forecast import Forecast, forecast, instants
from sglang_star_router.policy.limits import guest_room, kept_free, token_limit
from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.slots import MoveSlots
from sglang_star_router.policy.snapshot import (
    BoolArray,
    FleetSnapshot,
    FloatArray,
    IntArray,
    MoveOrder,
)


@dataclass(frozen=True, slots=True)
class _Round:
    """What one decision looks at; arrays are brought up to date as orders are made.

    Attributes:
        ahead: forecast KV; need: of each instance, ``[I, K]``; limit: what it may hold, ``[I]``.
        room: below the limit with ``target_limit``, ``[I, K]``; grants: context that each would
            take in now, ``[I]``.
    """

    snapshot: FleetSnapshot
    ahead: Forecast
    need: FloatArray
    limit: FloatArray
    room: FloatArray
    grants: IntArray
    slots: MoveSlots


class StarMoves:
    """The ``star`` rescheduler; with ``true_lengths`` the ``oracle``."""

    def __init__(self, params: StarParams, *, true_lengths: bool = False) -> None:
        self.params = params
        self.name = "oracle" if true_lengths else "star"
        self.true_lengths = true_lengths
        self.steps = instants(params.horizon_steps, params.horizon_points)

    def orders(self, snapshot: FleetSnapshot) -> list[MoveOrder]:
        """Return moves, the worst overflow's first; empty when nothing will overflow."""
        snapshot = sane(snapshot)
        p, inst = self.params, snapshot.instances
        if len(inst.ids) < 2 or not snapshot.requests.rids:
            return []
        ahead = forecast(snapshot, self.steps, true_lengths=self.true_lengths)
        limit = np.where(inst.draining, 0.0, token_limit(snapshot, p))
        need = ahead.need(p.risk_sigma)
        slots = MoveSlots(snapshot, p.moves_per_instance, p.cooldown_s)
        room = p.target_limit * limit[:, None] - need
        now = _Round(snapshot, ahead, need, limit, room, guest_room(snapshot), slots)
        excess = (need - limit[:, None]).max(axis=1)
        share = np.round(excess / np.maximum(inst.kv_capacity, 1), 6)
        sources = np.flatnonzero((share > p.excess_min) & (slots.free > 0))
        sources = sources[np.lexsort((load.name_rank(inst.ids)[sources], -share[sources]))]
        orders: list[MoveOrder] = []
        # A round makes few moves, so only the worst are looked at: cost stays linear.
        for source in sources[: 2 * p.moves_per_round]:
            while slots.free[source] > 0 and len(orders) < p.moves_per_round:
                order = self._relieve(now, int(source))
                if order is None:
                    break
                orders.append(order)
        return orders

    def _relieve(self, now: _Round, source: int) -> MoveOrder | None:
        """Pick the best move off ``source``, updating all that it changes."""
        p, inst, reqs = self.params, now.snapshot.instances, now.snapshot.requests
        ahead, room, slots = now.ahead, now.room, now.slots
        over = now.need[source] - now.limit[source]
        if over.max() <= p.excess_min * inst.kv_capacity[source]:
            return None
        worst = int(np.argmax(over))
        rows = slots.candidates(source)
        if rows.size == 0:
            return None
        context = reqs.prompt_tokens[rows] + reqs.output_tokens[rows]
        # What leaves a draining instance is taken without the reserve for those that run.
        granted = now.grants + (kept_free(inst) if inst.draining[source] else 0)
        targets = slots.open_targets(source)
        targets = targets[granted[targets] >= context.min()]
        if targets.size == 0:
            return None
        slack = np.round(room[targets].min(axis=1))
        widest = targets[slack >= slack.max()]
        target = int(widest[np.argmin(load.name_rank(inst.ids)[widest])])
        fits = (room[target] >= ahead.request[:, rows].T).all(axis=1) & (granted[target] >= context)
        if not fits.any():
            return None
        rows, context = rows[fits], context[fits]
        cost_s, recompute = self._cost_s(context)
        left_s = self._expected_steps(ahead, rows) * max(inst.step_ms[source], 1e-3) / 1e3
        relief = np.minimum(ahead.request[worst, rows], over[worst])
        value = np.round(relief / (context + ahead.steps[-1]), 9)
        value[left_s < p.repay_factor * cost_s] = -1.0
        best = value.max()
        if best <= 0:
            return None
        pick = min(np.flatnonzero(value >= best), key=lambda k: reqs.rids[rows[k]])
        row = int(rows[pick])
        now.need[source] -= ahead.request[:, row]
        room[target] -= ahead.request[:, row]
        now.grants[target] -= context[pick] + inst.guest_reserve[target]
        slots.take(source, target)
        return MoveOrder(
            rid=reqs.rids[row],
            source=inst.ids[source],
            target=inst.ids[target],
            reason="drain" if inst.draining[source] else "overflow",
            expected_gain=float(relief[pick]),
            explain={
                "overflow_tokens": float(over[worst]),
                "overflow_in_steps": float(ahead.steps[worst]),
                "target_room_tokens": float(slack.max()),
                "context_tokens": float(context[pick]),
                "cost_s": float(cost_s[pick]),
            },
            mode="recompute" if recompute[pick] else "copy",
        )

    def _cost_s(self, context: IntArray) -> tuple[FloatArray, BoolArray]:
        """Seconds to move each context by the cheaper way, and whether that is recomputing."""
        p = self.params
        copy = context / p.copy_tokens_per_s
        if p.recompute_tokens_per_s <= 0:
            return copy, np.zeros(context.size, dtype=bool)
        again = context / p.recompute_tokens_per_s
        return np.minimum(copy, again), again < copy

    def _expected_steps(self, ahead: Forecast, rows: IntArray) -> FloatArray:
        """Expected decode steps left within the horizon, from the survival the forecast used."""
        size = ahead.request[:, rows]
        alive = size / np.maximum(size[0] + ahead.steps[:, None], 1.0)
        steps: FloatArray = alive.mean(axis=0) * ahead.steps[-1]
        return steps
