"""The paper's rescheduler as we read it: point forecasts, weighted variance, one move at a time.

Every instance's workload now and over a horizon is the sum of its requests' contexts, each
growing by one token per step until its predicted end. Overloaded instances give, underloaded ones
take; each round picks the move that lowers the time-weighted variance between instances most,
provided the request's remaining output repays the move.
"""

from __future__ import annotations

import numpy as np

from sglang_star_router.policy import load
from sglang_star_router.policy.params import StarPointParams
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.slots import MoveSlots
from sglang_star_router.policy.snapshot import FleetSnapshot, FloatArray, IntArray, MoveOrder
from sglang_star_router.policy.survival import point


class StarPoint:
    """Largest reduction of the weighted variance of current and predicted load."""

    name = "star-point"

    def __init__(self, params: StarPointParams) -> None:
        self.params = params
        self.steps = np.linspace(0.0, params.horizon_steps, max(params.horizon_points, 2))
        weight = params.discount ** np.linspace(0.0, 1.0, self.steps.size)
        self.weight = weight / weight.sum()

    def orders(self, snapshot: FleetSnapshot) -> list[MoveOrder]:
        """Return moves until none lowers the variance enough."""
        snapshot = sane(snapshot)
        p, inst, reqs = self.params, snapshot.instances, snapshot.requests
        n = len(inst.ids)
        if n < 2 or not reqs.rids:
            return []
        left = point(reqs, snapshot.prior_output)
        request = np.where(
            left[:, None] > self.steps, load.context_tokens(snapshot)[:, None] + self.steps, 0.0
        )
        loads = np.zeros((n, self.steps.size))
        for instant in range(self.steps.size):
            loads[:, instant] = np.bincount(reqs.instance, request[:, instant], n)
        slots = MoveSlots(snapshot, p.moves_per_instance, p.cooldown_s)
        weighted = loads @ self.weight
        rank = load.name_rank(inst.ids)
        over = np.flatnonzero((weighted > (1.0 + p.overload) * weighted.mean()) & (slots.free > 0))
        over = over[np.lexsort((rank[over], -weighted[over]))]
        orders: list[MoveOrder] = []
        for source in over[: 2 * p.moves_per_round]:
            if len(orders) >= p.moves_per_round:
                break
            order = self._best(snapshot, slots, loads, request, left, int(source))
            if order is not None:
                orders.append(order)
        return orders

    def _best(
        self,
        snapshot: FleetSnapshot,
        slots: MoveSlots,
        loads: FloatArray,
        request: FloatArray,
        left: FloatArray,
        source: int,
    ) -> MoveOrder | None:
        """Pick one move off ``source``, updating ``loads``; None if none is worth it."""
        p, inst = self.params, snapshot.instances
        weighted = loads @ self.weight
        under = slots.open_targets(source)
        under = under[weighted[under] < weighted.mean()]
        if under.size == 0:
            return None
        lowest = under[weighted[under] <= weighted[under].min()]
        target = int(lowest[np.argmin(load.name_rank(inst.ids)[lowest])])
        rows = self._worth_moving(snapshot, slots.candidates(source), left, target, loads)
        if rows.size == 0:
            return None
        reduction = np.round(self._reduction(loads, request, rows, source, target), 3)
        variance = float(loads.var(axis=0) @ self.weight)
        if reduction.max() < p.min_gain * variance:
            return None
        ties = rows[reduction >= reduction.max()]
        row = min(ties, key=lambda r: snapshot.requests.rids[r])
        loads[source] -= request[row]
        loads[target] += request[row]
        slots.take(source, target)
        return MoveOrder(
            rid=snapshot.requests.rids[row],
            source=inst.ids[source],
            target=inst.ids[target],
            reason="imbalance",
            expected_gain=float(reduction.max()),
            explain={
                "variance": variance,
                "source_load": float(weighted[source]),
                "target_load": float(weighted[target]),
                "remaining": float(left[row]),
            },
        )

    def _reduction(
        self, loads: FloatArray, request: FloatArray, rows: IntArray, source: int, target: int
    ) -> FloatArray:
        """How much each row's move lowers the weighted variance."""
        moved = request[rows]
        gap = loads[source] - loads[target]
        gain: FloatArray = 2.0 / len(loads) * ((moved * (gap - moved)) @ self.weight)
        return gain

    def _worth_moving(
        self,
        snapshot: FleetSnapshot,
        rows: IntArray,
        left: FloatArray,
        target: int,
        loads: FloatArray,
    ) -> IntArray:
        """Rows that fit at the target and whose remaining output repays the move."""
        p, inst = self.params, snapshot.instances
        context = snapshot.requests.prompt_tokens[rows] + snapshot.requests.output_tokens[rows]
        step_s = max(float(np.median(inst.step_ms)), 1e-3) / 1e3
        move_steps = context / p.copy_tokens_per_s / step_s
        fits = loads[target, 0] + context <= p.target_limit * inst.kv_capacity[target]
        worth: IntArray = rows[fits & (left[rows] > p.repay_factor * move_steps)]
        return worth
