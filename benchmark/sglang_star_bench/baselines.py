"""Policies of other systems, to compare with: written from what is published of their ideas.

``power-of-two`` and ``cache-aware`` are what ``sglang_router`` offers, ``freeness`` is Llumnix's
(Sun et al., OSDI 2024), ``shortest-first`` orders the router's queue by predicted length. They are
for the simulator: none of them is offered to users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_star_router.policy import load
from sglang_star_router.policy.sanity import sane
from sglang_star_router.policy.slots import MoveSlots
from sglang_star_router.policy.snapshot import (
    Arrival,
    FleetSnapshot,
    FloatArray,
    MoveOrder,
    Placement,
)
from sglang_star_router.policy.static import NOBODY, LeastTokens


class PowerOfTwo:
    """Of two instances drawn at random, the one with fewer requests."""

    name = "power-of-two"

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return the less busy of two; the draw depends on ``sequence`` alone."""
        snapshot = sane(snapshot)
        inst = snapshot.instances
        rows = np.flatnonzero(inst.accepts)
        if rows.size == 0:
            return NOBODY
        drawn = np.random.default_rng(sequence).choice(rows, min(2, rows.size), replace=False)
        two = np.zeros(len(inst.ids), dtype=bool)
        two[drawn] = True
        row = load.lowest(load.committed_requests(snapshot), two, inst.ids)
        assert row is not None
        return Placement(inst.ids[row], self.name)


class CacheAware:
    """The least filled prefix tree while requests are spread evenly, else the fewest requests.

    A trace has no text, so no prefix ever matches, and what is left of the policy is its balancing:
    a tree's size is what was sent there. One object serves one run.

    Args:
        absolute, relative: requests are uneven when the most and the fewest differ by more than
            both say, as ``sglang_router``'s flags of these names.
    """

    name = "cache-aware"

    def __init__(self, absolute: int = 64, relative: float = 1.5) -> None:
        self.absolute = absolute
        self.relative = relative
        self._sent: dict[str, int] = {}

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return an accepting instance, and count what it gets."""
        snapshot = sane(snapshot)
        inst = snapshot.instances
        if not inst.accepts.any():
            return NOBODY
        count = load.committed_requests(snapshot)
        most, fewest = count[inst.accepts].max(), count[inst.accepts].min()
        uneven = most - fewest > self.absolute and most > self.relative * fewest
        sent = np.array([self._sent.get(name, 0) for name in inst.ids], dtype=np.float64)
        row = load.lowest(count if uneven else sent, inst.accepts, inst.ids)
        assert row is not None
        name = inst.ids[row]
        self._sent[name] = self._sent.get(name, 0) + arrival.prompt_tokens
        return Placement(name, self.name)


class ShortestFirst(LeastTokens):
    """Least tokens, from a queue in which the request predicted to be the shortest goes first."""

    name = "shortest-first"


class Freeness:
    """The instance that could decode on for the most steps."""

    name = "freeness"

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return the accepting instance of highest freeness."""
        snapshot = sane(snapshot)
        inst = snapshot.instances
        free = freeness(snapshot)
        row = load.lowest(-free, inst.accepts, inst.ids)
        if row is None:
            return NOBODY
        return Placement(inst.ids[row], self.name, {"freeness": float(free[row])})


@dataclass(frozen=True, slots=True, kw_only=True)
class FreenessParams:
    """When Llumnix moves.

    Attributes:
        low: an instance of less freeness gives; high: one of more takes; both in decode steps.
        moves_per_instance, cooldown_s: as in ``ReactiveParams``.
    """

    low: float = 512.0
    high: float = 1024.0
    moves_per_instance: int = 1
    cooldown_s: float = 5.0


class FreenessMoves:
    """Pairs the least free with the most free; the shortest sequence moves."""

    name = "freeness"

    def __init__(self, params: FreenessParams) -> None:
        self.params = params

    def orders(self, snapshot: FleetSnapshot) -> list[MoveOrder]:
        """Return at most one move per pair of instances, the least free source first."""
        snapshot = sane(snapshot)
        p, inst = self.params, snapshot.instances
        free = freeness(snapshot)
        slots = MoveSlots(snapshot, p.moves_per_instance, p.cooldown_s)
        rank = load.name_rank(inst.ids)
        order = np.lexsort((rank, free))
        targets = [int(t) for t in order[::-1] if free[t] > p.high]
        context = load.context_tokens(snapshot)
        orders: list[MoveOrder] = []
        for source in order[free[order] < p.low]:
            open_ = slots.is_open(int(source))
            target = next((t for t in targets if open_[t]), None)
            rows = slots.candidates(int(source))
            if target is None or rows.size == 0 or slots.free[source] <= 0:
                continue
            room = inst.kv_capacity[target] - inst.kv_used[target] - inst.kv_reserved[target]
            rows = rows[context[rows] <= room]
            if rows.size == 0:
                continue
            row = min(rows, key=lambda r: (context[r], snapshot.requests.rids[r]))
            targets.remove(target)
            slots.take(int(source), target)
            orders.append(
                MoveOrder(
                    rid=snapshot.requests.rids[row],
                    source=inst.ids[source],
                    target=inst.ids[target],
                    reason="drain" if inst.draining[source] else "freeness",
                    expected_gain=float(context[row]),
                    explain={"source": float(free[source]), "target": float(free[target])},
                )
            )
        return orders


def freeness(snapshot: FleetSnapshot) -> FloatArray:
    """Decode steps that the memory an instance has left would last its batch, ``[I]``.

    Memory in use is *virtual*: the request at the head of an instance's queue counts with all that
    it wants, though it has nothing yet, which makes freeness negative and moves make room for it;
    one that is being emptied has infinitely much in use.
    """
    inst, reqs, placed = snapshot.instances, snapshot.requests, snapshot.placed
    n = len(inst.ids)
    wanted = np.zeros(n)
    waiting = np.flatnonzero(reqs.queued)
    # The head is whoever waits longest: the last one written.
    waiting = waiting[np.argsort(reqs.since_move_s[waiting], kind="stable")]
    wanted[reqs.instance[waiting]] = load.context_tokens(snapshot)[waiting]
    used = inst.kv_used + inst.kv_reserved + wanted
    used = used + np.bincount(placed.instance, placed.prompt_tokens, n)
    batch = np.maximum(inst.running + np.bincount(placed.instance, minlength=n), 1)
    free: FloatArray = (inst.kv_capacity - used) / batch
    return np.where(inst.draining, -np.inf, free)
