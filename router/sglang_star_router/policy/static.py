"""Dispatch that never looks ahead: round-robin, least-requests, least-tokens."""

from __future__ import annotations

import numpy as np

from sglang_star_router.policy import load
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.snapshot import Arrival, FleetSnapshot, Placement

NOBODY = Placement(instance=None, reason="no-instance-accepts")


class RoundRobin:
    """Every accepting instance in turn, in the order of their names."""

    name = "round-robin"

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return the ``sequence``-th accepting instance, counting round."""
        inst = snapshot.instances
        rows = np.flatnonzero(inst.accepts)
        if rows.size == 0:
            return NOBODY
        in_turn = rows[np.argsort(load.name_rank(inst.ids)[rows])]
        row = int(in_turn[sequence % rows.size])
        return Placement(inst.ids[row], self.name, {"turn": float(sequence % rows.size)})


class LeastRequests:
    """The instance with the fewest requests, waiting ones included."""

    name = "least-requests"

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return the accepting instance with the fewest requests."""
        snapshot = sane(snapshot)
        inst = snapshot.instances
        count = load.committed_requests(snapshot)
        row = load.lowest(count, inst.accepts, inst.ids)
        if row is None:
            return NOBODY
        return Placement(inst.ids[row], self.name, {"requests": float(count[row])})


class LeastTokens:
    """The instance whose KV pool is committed to the smallest share."""

    name = "least-tokens"

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return the accepting instance with the smallest committed share of KV."""
        snapshot = sane(snapshot)
        inst = snapshot.instances
        share = load.committed_tokens(snapshot) / np.maximum(inst.kv_capacity, 1)
        row = load.lowest(share, inst.accepts, inst.ids)
        if row is None:
            return NOBODY
        return Placement(inst.ids[row], self.name, {"kv_share": float(share[row])})
