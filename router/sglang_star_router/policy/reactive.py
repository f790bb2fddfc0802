"""Moves on current load alone: the most loaded instance gives its smallest request to the least.

This is the load balancing that live-migration systems without a length predictor do.
"""

from __future__ import annotations

import numpy as np

from sglang_star_router.policy import load
from sglang_star_router.policy.params import ReactiveParams
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.slots import MoveSlots
from sglang_star_router.policy.snapshot import FleetSnapshot, MoveOrder


class Reactive:
    """Pairs the i-th most loaded with the i-th least loaded while they differ by a gap."""

    name = "reactive"

    def __init__(self, params: ReactiveParams) -> None:
        self.params = params

    def orders(self, snapshot: FleetSnapshot) -> list[MoveOrder]:
        """Return at most one move per pair of instances, the widest gap first."""
        snapshot = sane(snapshot)
        p, inst = self.params, snapshot.instances
        if len(inst.ids) < 2:
            return []
        slots = MoveSlots(snapshot, p.moves_per_instance, p.cooldown_s)
        capacity = np.maximum(inst.kv_capacity, 1)
        # A draining instance counts as overfull, whatever it holds.
        share = load.committed_tokens(snapshot) / capacity + np.where(inst.draining, 10.0, 0.0)
        rank = load.name_rank(inst.ids)
        context = load.context_tokens(snapshot)
        least_first = np.lexsort((rank, share))
        sources = np.flatnonzero(slots.free > 0)
        sources = sources[np.lexsort((rank[sources], -share[sources]))]
        orders: list[MoveOrder] = []
        for source in sources:
            targets = least_first[slots.is_open(int(source))[least_first]]
            if targets.size == 0:
                continue
            target = targets[0]
            gap = share[source] - share[target]
            if gap <= p.gap:
                continue
            least_first = least_first[least_first != target]
            rows = slots.candidates(int(source))
            room = min(p.target_limit - share[target], gap) * capacity[target]
            rows = rows[context[rows] <= room]
            if rows.size == 0:
                continue
            smallest = rows[context[rows] == context[rows].min()]
            row = min(smallest, key=lambda r: snapshot.requests.rids[r])
            orders.append(
                MoveOrder(
                    rid=snapshot.requests.rids[row],
                    source=inst.ids[source],
                    target=inst.ids[target],
                    reason="drain" if inst.draining[source] else "imbalance",
                    expected_gain=float(context[row]),
                    explain={
                        "source_share": float(share[source]),
                        "target_share": float(share[target]),
                        "context_tokens": float(context[row]),
                    },
                )
            )
        return orders
