"""Where an arrival goes: the policy decides, and what it holds waits here in order.

Held requests wait first come, first served: nobody overtakes the head of the queue. A request that
waits too long, or finds the queue full, gets an honest refusal with ``Retry-After``.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from sglang_star_router.calls import Call
from sglang_star_router.cluster import Cluster, Dispatch, Instance
from sglang_star_router.policy.base import DispatchPolicy
from sglang_star_router.policy.snapshot import Arrival, Placement
from sglang_star_router.replies import Rejected
from sglang_star_router.snapshot import Snapshots

RECHECK_S = 0.1
"""The head of the queue asks the policy again at least this often, seconds."""


@dataclass(slots=True)
class Seat:
    """Where one attempt at a request goes.

    Attributes:
        decode: instance that streams to the client; prefill: its partner, None if aggregated.
        tickets: what the cluster counts until the attempt ends.
    """

    decode: Instance
    prefill: Instance | None
    reason: str
    tickets: list[tuple[Instance, Dispatch]] = field(default_factory=list)


class Dispatcher:
    """Seats arrivals by policy.

    Attributes:
        sequence: arrivals seated so far; holding: requests waiting now.
        held: requests that had to wait; refused: those sent away, by HTTP status.
    """

    def __init__(
        self,
        cluster: Cluster,
        decode_policy: DispatchPolicy,
        decode_snapshots: Snapshots,
        *,
        prefill_policy: DispatchPolicy | None = None,
        prefill_snapshots: Snapshots | None = None,
        queue_size: int,
        queue_timeout_s: float,
        true_lengths: bool = False,
    ) -> None:
        self.sequence = 0
        self.held = 0
        self.refused: dict[int, int] = {429: 0, 503: 0}
        self._cluster = cluster
        self._policy = decode_policy
        self._snapshots = decode_snapshots
        self._prefill_policy = prefill_policy
        self._prefill_snapshots = prefill_snapshots
        self._queue: deque[asyncio.Event] = deque()
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._true_lengths = true_lengths
        cluster.watch(self._wake)

    @property
    def holding(self) -> int:
        """Requests waiting for an instance."""
        return len(self._queue)

    async def seat(self, call: Call, rid: str, excluded: Collection[str]) -> Seat:
        """Choose instances for a request, waiting if the policy says so.

        Args:
            excluded: URLs that have failed this request already.

        Raises:
            Rejected: no instance is left, the queue is full, or the wait was too long.
        """
        arrival = self._arrival(call, rid)
        placement = None
        if not self._queue:
            placement = self._place(arrival, excluded)
        if placement is None or placement.instance is None:
            placement = await self._hold(arrival, excluded)
        self.sequence += 1
        decode = self._named(placement.instance)
        seat = Seat(decode, self._partner(arrival, excluded), placement.reason)
        for instance in (decode, seat.prefill):
            if instance is not None:
                ticket = self._cluster.sent(
                    instance, rid, arrival.prompt_tokens, call.prompt_bytes, arrival.max_new_tokens
                )
                seat.tickets.append((instance, ticket))
        return seat

    def prefilled(self, seat: Seat) -> None:
        """Note that prefill has done its part, long before the attempt ends."""
        for instance, ticket in seat.tickets[1:]:
            self._cluster.ended(instance, ticket)
        del seat.tickets[1:]

    def leave(self, seat: Seat) -> None:
        """End an attempt."""
        for instance, ticket in seat.tickets:
            self._cluster.ended(instance, ticket)
        seat.tickets.clear()

    # ------------------------------------------------------------------ inside

    def _arrival(self, call: Call, rid: str) -> Arrival:
        prompt = call.prompt_ids or self._cluster.tokens_of(call.prompt_bytes)
        limit = call.max_new_tokens
        if not limit:
            limits = (one.context_limit for one in self._cluster.decoding())
            limit = max(1, max(limits, default=0) - prompt // call.batch)
        total = limit * call.batch * call.samples
        return Arrival(
            rid=rid,
            prompt_tokens=prompt,
            max_new_tokens=total,
            arrived_s=time.monotonic(),
            true_output_tokens=float(total) if self._true_lengths else float("nan"),
        )

    def _place(self, arrival: Arrival, excluded: Collection[str]) -> Placement | None:
        """Ask the policy once; None means wait.

        Raises:
            Rejected: nobody could take it even with room, or the policy says to refuse.
        """
        candidates = [one for one in self._cluster.decoding() if one.endpoint.url not in excluded]
        if not any(one.healthy for one in candidates):
            raise self._refusal(503, _why_nobody(self._cluster.decoding()))
        snapshot = self._snapshots.for_arrival(excluded, held=len(self._queue))
        placement = self._policy.place(snapshot, arrival, self.sequence)
        if placement.reject:
            raise self._refusal(429, "the fleet is saturated and cannot serve this in time")
        return placement if placement.instance is not None else None

    async def _hold(self, arrival: Arrival, excluded: Collection[str]) -> Placement:
        if len(self._queue) >= self._queue_size:
            raise self._refusal(429, f"{len(self._queue)} requests are waiting already")
        turn = asyncio.Event()
        self._queue.append(turn)
        self.held += 1
        deadline = time.monotonic() + self._queue_timeout_s
        try:
            while True:
                if self._queue[0] is turn:
                    placement = self._place(arrival, excluded)
                    if placement is not None:
                        return placement
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._refusal(503, "no instance had room in time")
                turn.clear()
                try:
                    async with asyncio.timeout(min(left, RECHECK_S)):
                        await turn.wait()
                except TimeoutError:
                    pass
        finally:
            self._queue.remove(turn)
            self._wake()

    def _partner(self, arrival: Arrival, excluded: Collection[str]) -> Instance | None:
        if self._prefill_policy is None or self._prefill_snapshots is None:
            return None
        snapshot = self._prefill_snapshots.for_arrival(excluded)
        arrival = replace(arrival, max_new_tokens=1)
        placement = self._prefill_policy.place(snapshot, arrival, self.sequence)
        if placement.instance is None:
            raise self._refusal(503, _why_nobody(self._cluster.of_role("prefill")))
        return self._named(placement.instance)

    def _named(self, name: str | None) -> Instance:
        instance = self._cluster.find(name or "")
        if instance is None:
            raise self._refusal(503, f"the policy chose {name!r}, which is not in the fleet")
        return instance

    def _wake(self) -> None:
        if self._queue:
            self._queue[0].set()

    def _refusal(self, status: int, message: str) -> Rejected:
        self.refused[status] += 1
        kind = "rate_limit_exceeded" if status == 429 else "service_unavailable"
        return Rejected(message, status=status, kind=kind, retry_after_s=1)


def _why_nobody(instances: list[Instance]) -> str:
    roles = "/".join(sorted({one.role for one in instances}))
    reasons = "; ".join(
        f"{one.name}: {one.trouble or ('draining' if one.draining else 'failed this request')}"
        for one in instances
    )
    return f"no {roles} instance can take the request ({reasons})"
