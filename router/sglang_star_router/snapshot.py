"""From statuses to what a policy sees.

The part that comes from statuses is kept until one changes, together with whatever the policy
derived from it; the requests sent since are laid over it for every arrival, so that a burst does
not land on one instance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from sglang_star_router.breaker import Circuit
from sglang_star_router.fleet import Fleet
from sglang_star_router.instance import Instance
from sglang_star_router.obstacles import groups
from sglang_star_router.policy.snapshot import FleetSnapshot, Instances, Placed, Requests

MIN_AGE_S = 0.005
"""A younger snapshot is used even if a status came in since: large fleets publish all the time."""
MAX_AGE_S = 0.05
"""An older one is rebuilt anyhow, for the ages in it and what has become stale."""


class Snapshots:
    """Snapshots of one group of instances, e.g. all that decode.

    Args:
        members: the group, in a fixed order.
        stale_s: age at which a status is no longer acted upon, seconds.
        true_lengths: fill ``true_remaining`` with ``max_new_tokens - output_tokens``, which is the
            truth only for requests that ignore end-of-sequence, as in emulated runs.
    """

    def __init__(
        self,
        fleet: Fleet,
        members: list[Instance],
        *,
        stale_s: float,
        true_lengths: bool = False,
        moves: Callable[[Instance], tuple[int, int]] = lambda _: (0, 0),
        busy: Collection[str] = (),
    ) -> None:
        self._fleet = fleet
        self._members = members
        self._stale_s = stale_s
        self._true_lengths = true_lengths
        self._moves = moves
        self._busy = busy
        self._base: FleetSnapshot | None = None
        self._base_version = -1

    def decide_moves(self) -> FleetSnapshot:
        """Snapshot for the rescheduler: what has no fresh status neither takes nor gives."""
        return replace(self._build(time.monotonic(), fresh_only=True), placed=self._placed())

    def for_arrival(self, excluded: Collection[str] = (), held: int = 0) -> FleetSnapshot:
        """Snapshot for dispatch.

        Args:
            excluded: URLs that have failed this arrival already.
            held: requests waiting at the router.
        """
        now = time.monotonic()
        base = self._base
        limit = MIN_AGE_S if self._base_version != self._fleet.version else MAX_AGE_S
        if base is None or now - base.now_s > limit:
            base = self._base = self._build(now, fresh_only=False)
            self._base_version = self._fleet.version
        shut = [not m.breaker.admits for m in self._members]
        if excluded or any(shut):
            base = self._without(base, excluded, shut)
        return FleetSnapshot(
            now, base.instances, base.requests, base.prior_output, self._placed(), held,
            base.derived,
        )  # fmt: skip

    def _without(
        self, base: FleetSnapshot, excluded: Collection[str], shut: list[bool]
    ) -> FleetSnapshot:
        """Close what has failed this arrival, and what has an open circuit unless all have."""
        untried = np.array([m.endpoint.url not in excluded for m in self._members], np.bool_)
        willing = np.array([m.healthy and not m.draining for m in self._members], np.bool_)
        admits = ~np.array(shut, np.bool_)
        fresh = base.instances.accepts & untried
        # Rather one that is silent than none, rather one with an open circuit than none.
        choices = (fresh & admits, willing & untried & admits, fresh, willing & untried)
        accepts = next((one for one in choices if one.any()), fresh)
        return replace(base, instances=replace(base.instances, accepts=accepts), derived={})

    def _build(self, now: float, *, fresh_only: bool) -> FleetSnapshot:
        members, statuses = self._members, [m.status for m in self._members]
        ages = np.array([m.age_s(now) for m in members], np.float64)
        willing = np.array([m.healthy and not m.draining for m in members], np.bool_)
        plain = np.array([m.described and m.advertisement is None for m in members], np.bool_)
        fresh = ages <= self._stale_s
        accepts = willing & (fresh | (plain & ~np.bool_(fresh_only)))
        if fresh_only:
            accepts &= np.array([m.breaker.state is Circuit.CLOSED for m in members], np.bool_)
        elif not accepts.any():
            # Silence everywhere says more about the telemetry than about the instances.
            accepts = willing

        def column(
            attribute: str, otherwise: int = 0
        ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.array(
                [otherwise if s is None else getattr(s, attribute) for s in statuses], np.int64
            )

        capacity = np.array(
            [m.kv_capacity if s is None else s.kv_capacity_tokens
             for m, s in zip(members, statuses, strict=True)], np.int64,
        )  # fmt: skip
        moves = [self._moves(m) for m in members]
        instances = Instances(
            ids=tuple(m.name for m in members),
            kv_capacity=capacity,
            kv_used=column("kv_used_tokens"),
            kv_reserved=column("kv_reserved_tokens"),
            reserve_each=np.array([m.reserve_each for m in members], np.int64),
            guest_reserve=np.array([m.guest_reserve for m in members], np.int64),
            running=column("running"),
            queued=column("queued"),
            retracted=column("retracted"),
            step_ms=np.array([0.0 if s is None else s.step_ms_ema for s in statuses], np.float64),
            age_s=ages,
            accepts=accepts,
            draining=np.array([m.draining for m in members], np.bool_),
            group=groups([m.advertisement for m in members]),
            moves_out=np.array([out for out, _ in moves], np.int64),
            moves_in=np.array([into for _, into in moves], np.int64),
        )
        requests = self._requests(now, fresh_only=fresh_only)
        return FleetSnapshot(now, instances, requests, self._fleet.lengths.prior())

    def _requests(self, now: float, *, fresh_only: bool) -> Requests:
        tables = [m.table for m in self._members]
        output = np.concatenate([t.output_tokens for t in tables])
        limit = np.concatenate([t.max_new_tokens for t in tables])
        movable = np.concatenate([t.movable for t in tables])
        start = 0
        for member, table in zip(self._members, tables, strict=True):
            if fresh_only and not member.alive(now, self._stale_s):
                movable[start : start + len(table.rids)] = False
            for rid in self._busy:
                row = table.row(rid)
                if row is not None:
                    movable[start + row] = False
            start += len(table.rids)
        return Requests(
            rids=tuple(rid for t in tables for rid in t.rids),
            instance=np.repeat(np.arange(len(tables)), [len(t.rids) for t in tables]),
            prompt_tokens=np.concatenate([t.prompt_tokens for t in tables]),
            output_tokens=output,
            max_new_tokens=limit,
            remaining=self._fleet.lengths.calibration.corrected(
                np.concatenate([t.remaining for t in tables])
            ),
            true_remaining=(
                np.maximum(limit - output, 0).astype(np.float64)
                if self._true_lengths
                else np.full(len(output), np.nan)
            ),
            movable=movable,
            queued=np.concatenate([t.queued for t in tables]),
            since_move_s=now - np.concatenate([t.settled_s for t in tables]),
        )

    def _placed(self) -> Placed:
        rows: list[int] = []
        tokens: list[int] = []
        for row, member in enumerate(self._members):
            unseen = [sent.prompt_tokens for sent in member.unseen()]
            rows += [row] * len(unseen)
            tokens += unseen
        return Placed(np.array(rows, np.int64), np.array(tokens, np.int64))
