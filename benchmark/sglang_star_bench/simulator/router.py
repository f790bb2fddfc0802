"""The router's side of the simulation: dispatch, the hold queue, the rescheduling rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sglang_star_bench.simulator.recorder import Recorder
from sglang_star_bench.simulator.request import Request
from sglang_star_router.policy.base import DispatchPolicy, ReschedulePolicy
from sglang_star_router.policy.holding import retry_order
from sglang_star_router.policy.snapshot import Arrival, FleetSnapshot, MoveOrder, Placed

RETRIES = 4
"""Held requests in a row that find no room before the rest is left for the next status."""


class SimRouter:
    """Decides on the latest status, as the real router does.

    Args:
        send: puts a request on an instance; refuse: answers 429; move: carries an order out.
        oracle: arrivals carry their true output length.
        predicted: output tokens expected of a request before it runs: the shortest goes first
            where the dispatch policy is ``shortest-first``. None: the oldest always does.
        hold_deadline_s: held longer than this, a request yields to fresher ones.
    """

    def __init__(
        self,
        dispatch: DispatchPolicy,
        rescheduler: ReschedulePolicy | None,
        recorder: Recorder,
        *,
        send: Callable[[Request, str], None],
        refuse: Callable[[Request], None],
        move: Callable[[MoveOrder], None],
        oracle: bool,
        hold_deadline_s: float,
        predicted: Callable[[Request], float] | None = None,
    ) -> None:
        self.dispatch = dispatch
        self.rescheduler = rescheduler
        self.recorder = recorder
        self.send = send
        self.refuse = refuse
        self.move = move
        self.oracle = oracle
        self.hold_deadline_s = hold_deadline_s
        self.predicted = predicted
        self.snapshot: FleetSnapshot | None = None
        self.rows: dict[str, int] = {}
        self.sequence = 0
        self.held: list[tuple[Arrival, Request]] = []
        self._placed: list[tuple[float, int, int]] = []

    def status(self, snapshot: FleetSnapshot, taken_s: float, now_s: float) -> None:
        """A new status of the fleet, taken at ``taken_s``, has come in."""
        self.snapshot = snapshot
        self.rows = {name: row for row, name in enumerate(snapshot.instances.ids)}
        self._placed = [p for p in self._placed if p[0] > taken_s]
        self._retry(now_s)

    def arrive(self, request: Request, now_s: float) -> None:
        """Place, hold or refuse a new request."""
        arrival = Arrival(
            rid=request.rid,
            prompt_tokens=request.prompt,
            max_new_tokens=request.max_new,
            arrived_s=now_s,
            true_output_tokens=float(request.length) if self.oracle else float("nan"),
        )
        ahead = [h for h in self.held if now_s - h[0].arrived_s <= self.hold_deadline_s]
        if self.predicted is not None:
            own = self.predicted(request)
            ahead = [h for h in ahead if self.predicted(h[1]) <= own]
        self.held.append((arrival, request))
        if not ahead and self._try(len(self.held) - 1, now_s):
            self.held.pop()

    def reschedule(self, now_s: float) -> None:
        """One round of the rescheduler, timed in processor time."""
        if self.rescheduler is None or self.snapshot is None:
            return
        snapshot = replace(self.snapshot, now_s=now_s)
        started = time.thread_time()
        orders = self.rescheduler.orders(snapshot)
        self.recorder.decision.add((time.thread_time() - started) * 1e3)
        for order in orders:
            self.move(order)

    def _retry(self, now_s: float) -> None:
        """Go through the held requests, those in time first, each group until it stalls."""
        if not self.held:
            return
        order, in_time = retry_order([a for a, _ in self.held], now_s, self.hold_deadline_s)
        if self.predicted is not None:
            cost = {k: self.predicted(self.held[k][1]) for k in order[:in_time]}
            order[:in_time] = sorted(order[:in_time], key=cost.__getitem__)
        gone: set[int] = set()
        for group in (order[:in_time], order[in_time:]):
            failures = 0
            for position in group:
                if self._try(position, now_s):
                    gone.add(position)
                    continue
                failures += 1
                if failures >= RETRIES:
                    break
        self.held = [h for k, h in enumerate(self.held) if k not in gone]

    def _try(self, position: int, now_s: float) -> bool:
        """Whether the held request at ``position`` left the queue, either way."""
        arrival, request = self.held[position]
        assert self.snapshot is not None
        sent = np.array([(row, tokens) for _, row, tokens in self._placed], dtype=np.int64)
        sent = sent.reshape(-1, 2)
        snapshot = replace(
            self.snapshot,
            now_s=now_s,
            placed=Placed(sent[:, 0], sent[:, 1]),
            held=len(self.held),
        )
        placement = self.dispatch.place(snapshot, arrival, self.sequence)
        if placement.instance is None:
            if placement.reject:
                self.refuse(request)
            return placement.reject
        self.sequence += 1
        self._placed.append((now_s, self.rows[placement.instance], request.prompt))
        self.send(request, placement.instance)
        return True
