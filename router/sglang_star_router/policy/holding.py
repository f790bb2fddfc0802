"""The queue at the router: who may leave it, who gives up, and in which order they are tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sglang_star_router.policy.base import DispatchPolicy
from sglang_star_router.policy.limits import admits_now
from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.snapshot import Arrival, BoolArray, FleetSnapshot, Placement


def retry_order(held: Sequence[Arrival], now_s: float, deadline_s: float) -> tuple[list[int], int]:
    """Positions in ``held`` in the order to try them, and how many of them are still in time.

    Those that can still meet their TTFT limit come first, oldest first; a request past it no
    longer delays them and takes what is left over, oldest first.

    Args:
        held: oldest first.
        deadline_s: how long a request may wait and still be in time.
    """
    fresh = [k for k, a in enumerate(held) if now_s - a.arrived_s <= deadline_s]
    late = [k for k, a in enumerate(held) if now_s - a.arrived_s > deadline_s]
    return fresh + late, len(fresh)


def with_room(snapshot: FleetSnapshot, arrival: Arrival, params: StarParams) -> BoolArray:
    """Instances that would admit ``arrival`` at once, ``[I]``.

    A request past its deadline must leave some KV free, the more of it the more others wait.
    """
    spare = 0.0
    if snapshot.now_s - arrival.arrived_s > params.hold_deadline_s:
        crowd = (snapshot.held - 1) / max(params.late_full * len(snapshot.instances.ids), 1e-9)
        spare = params.late_spare * min(crowd, 1.0)
    return admits_now(snapshot, arrival.prompt_tokens, arrival.max_new_tokens, spare, params)


def wait(snapshot: FleetSnapshot, arrival: Arrival, params: StarParams) -> Placement:
    """Hold ``arrival``, or refuse it once it has waited too long or too many are held."""
    waited = snapshot.now_s - arrival.arrived_s
    explain = {"waited_s": waited, "held": float(snapshot.held)}
    if snapshot.held > params.hold_max_requests or waited >= params.hold_max_s:
        return Placement(None, "overload", explain, reject=True)
    return Placement(None, "no-room", explain)


class Queued:
    """Another policy behind the same queue as ``star``: the fair comparison for what it foresees.

    Its name is ``queued-`` and that of the other one.
    """

    def __init__(self, inner: DispatchPolicy, params: StarParams) -> None:
        self.name = f"queued-{inner.name}"
        self.params = params
        self._inner = inner

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return the other policy's choice among instances with room; hold or refuse if none."""
        snapshot = sane(snapshot)
        allowed = with_room(snapshot, arrival, self.params)
        if not allowed.any() and snapshot.instances.accepts.any():
            return wait(snapshot, arrival, self.params)
        instances = replace(snapshot.instances, accepts=allowed)
        return self._inner.place(replace(snapshot, instances=instances), arrival, sequence)
