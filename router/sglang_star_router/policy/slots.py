"""Which requests and instances may take part in a move right now."""

from __future__ import annotations

import numpy as np

from sglang_star_router.policy.snapshot import BoolArray, FleetSnapshot, IntArray


class MoveSlots:
    """Free migration slots of every instance, taken as orders are made.

    Attributes:
        free: slots left per instance, ``[I]``.
        targets: instances that may receive anything at all, ``[I]``: accepting, nothing queued
            or retracted, since a guest would take the room those wait for.
    """

    def __init__(self, snapshot: FleetSnapshot, per_instance: int, cooldown_s: float) -> None:
        inst, reqs = snapshot.instances, snapshot.requests
        self.free: IntArray = per_instance - inst.moves_out - inst.moves_in
        self._group = inst.group
        self.targets: BoolArray = inst.accepts & (inst.queued == 0) & (inst.retracted == 0)
        eligible = reqs.movable & ~reqs.queued & (reqs.since_move_s >= cooldown_s)
        rows = np.flatnonzero(eligible)
        owner = reqs.instance[rows]
        order = np.argsort(owner, kind="stable")
        self._rows = rows[order]
        self._bounds = np.searchsorted(owner[order], np.arange(len(inst.ids) + 1))

    def candidates(self, instance: int) -> IntArray:
        """Rows of the requests on ``instance`` that may move."""
        return self._rows[self._bounds[instance] : self._bounds[instance + 1]]

    def is_open(self, source: int) -> BoolArray:
        """Which instances can receive a guest from ``source`` now, ``[I]``."""
        can: BoolArray = self.targets & (self.free > 0) & (self._group == self._group[source])
        can[source] = False
        return can

    def open_targets(self, source: int) -> IntArray:
        """Rows of the instances that can receive a guest from ``source`` now."""
        return np.flatnonzero(self.is_open(source))

    def take(self, source: int, target: int) -> None:
        """Count one move from ``source`` to ``target``."""
        self.free[source] -= 1
        self.free[target] -= 1
