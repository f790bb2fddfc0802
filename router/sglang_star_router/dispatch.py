"""Where an arrival goes: the policy decides; what it holds waits in ``held``."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from sglang_star_router.calls import Call
from sglang_star_router.fleet import Fleet
from sglang_star_router.held import HeldRequests
from sglang_star_router.instance import Instance
from sglang_star_router.policy.base import DispatchPolicy
from sglang_star_router.policy.snapshot import Arrival, FleetSnapshot, Placement
from sglang_star_router.policy.static import LeastTokens
from sglang_star_router.seat import Seat
from sglang_star_router.snapshot import Snapshots

logger = logging.getLogger(__name__)


class Dispatcher:
    """Seats arrivals by policy.

    Attributes:
        sequence: arrivals seated so far; queue: those that have to wait.
        policy_errors: decisions of a policy that failed, by its name; another one took them.

    Args:
        hold_deadline_s: how long a held request may wait and still be in time; later it yields
            to fresher ones.
        queue_timeout_s: how long it may wait at all.
    """

    def __init__(
        self,
        fleet: Fleet,
        decode_policy: DispatchPolicy,
        decode_snapshots: Snapshots,
        *,
        prefill_policy: DispatchPolicy | None = None,
        prefill_snapshots: Snapshots | None = None,
        queue_size: int,
        queue_timeout_s: float,
        hold_deadline_s: float,
        true_lengths: bool = False,
    ) -> None:
        self.sequence = 0
        self.policy_errors: Counter[str] = Counter()
        self._fleet = fleet
        self._policy = decode_policy
        self._snapshots = decode_snapshots
        self._prefill_policy = prefill_policy
        self._prefill_snapshots = prefill_snapshots
        self.queue = HeldRequests(
            size=queue_size, timeout_s=queue_timeout_s, deadline_s=hold_deadline_s,
            attempt=self._try, leave=self.leave,
        )  # fmt: skip
        self._true_lengths = true_lengths
        self._plain = LeastTokens()
        self._said: set[str] = set()
        fleet.watch(self.queue.changed)

    @property
    def holding(self) -> int:
        """Requests waiting for an instance."""
        return len(self.queue)

    @property
    def refused(self) -> dict[int, int]:
        """Requests sent away, by HTTP status."""
        return self.queue.refused

    def retry_after_s(self) -> int:
        """When a client should come again, seconds."""
        return self.queue.retry_after_s()

    def refuse_if_full(self) -> None:
        """Refuse at once what :meth:`seat` would refuse whatever it is.

        Raises:
            Rejected: the queue is full, and somebody in it comes first.
        """
        if self.queue.full and self.queue.comes_first(time.monotonic()):
            waiting = f"{len(self.queue)} requests are waiting already"
            raise self.queue.refusal(429, waiting, close=True)

    async def seat(
        self,
        call: Call,
        rid: str,
        excluded: Collection[str],
        since: float | None = None,
        deadline: float = math.inf,
    ) -> Seat:
        """Choose instances for a request, waiting if the policy says so.

        Args:
            excluded: URLs that have failed this request already.
            since: it has been seated before and came at this time: it waits for nobody in the
                queue, and takes its old place there if it must.
            deadline: loop time until which it may be held, at the longest.

        Raises:
            Rejected: no instance is left, the queue is full, or the wait was too long.
            TimeoutError: the deadline has passed.
        """
        arrival = self._arrival(call, rid, since)
        if since is not None or not self.queue or not self.queue.comes_first(arrival.arrived_s):
            seat = self._try(call, arrival, excluded)
            if seat is not None:
                return seat
        if since is None and self.queue.full:
            raise self.queue.refusal(429, f"{len(self.queue)} requests are waiting already")
        return await self.queue.wait(call, arrival, excluded, deadline)

    def prefilled(self, seat: Seat) -> None:
        """Note that prefill has done its part, long before the attempt ends."""
        for instance, ticket in seat.tickets[1:]:
            self._fleet.ended(instance, ticket)
        del seat.tickets[1:]

    def leave(self, seat: Seat) -> None:
        """End an attempt; what its instances were not told of it is not theirs to answer for."""
        for trial in seat.trials.values():
            trial.over()
        for instance, ticket in seat.tickets:
            self._fleet.ended(instance, ticket)
        seat.tickets.clear()

    def others(self, instance: Instance, excluded: Collection[str]) -> set[str]:
        """URLs of instances of the same role that could take what failed on ``instance``."""
        return {
            one.endpoint.url
            for one in self._fleet.of_role(instance.role)
            if one is not instance and one.healthy and not one.draining
        } - set(excluded)

    # ------------------------------------------------------------------ one decision

    def _arrival(self, call: Call, rid: str, since: float | None) -> Arrival:
        prompt = call.prompt_tokens(self._fleet.prompts.tokens_of)
        longest = max((one.context_limit for one in self._fleet.decoding()), default=0)
        if longest:
            # What is longer will be refused by the engine and takes no room there.
            prompt = min(prompt, longest * call.batch)
        limit = call.max_new_tokens or max(1, longest - prompt // call.batch)
        total = limit * call.batch * call.samples
        return Arrival(
            rid=rid,
            prompt_tokens=prompt,
            max_new_tokens=total,
            arrived_s=time.monotonic() if since is None else since,
            true_output_tokens=float(total) if self._true_lengths else float("nan"),
        )

    def _try(self, call: Call, arrival: Arrival, excluded: Collection[str]) -> Seat | None:
        """Ask the policy once; None means wait.

        Raises:
            Rejected: nobody could take it even with room, or the policy says to refuse.
        """
        if not any(
            one.healthy and one.endpoint.url not in excluded for one in self._fleet.decoding()
        ):
            raise self.queue.refusal(503, _why_nobody(self._fleet.decoding()))
        snapshot = self._snapshots.for_arrival(excluded, held=len(self.queue))
        placement = self._place(self._policy, snapshot, arrival)
        if placement.reject:
            raise self.queue.refusal(429, "the fleet is saturated and cannot serve this in time")
        if placement.instance is None:
            return None
        partner = self._partner(arrival, excluded)
        seat = Seat(self._named(placement.instance), partner, arrival.prompt_tokens)
        self.sequence += 1
        for instance in (seat.decode, seat.prefill):
            if instance is not None:
                ticket = self._fleet.sent(
                    instance,
                    arrival.rid,
                    arrival.prompt_tokens,
                    call.learnable_bytes,
                    arrival.max_new_tokens,
                )
                seat.tickets.append((instance, ticket))
                seat.trials[instance.endpoint.url] = instance.breaker.begin()
        return seat

    def _partner(self, arrival: Arrival, excluded: Collection[str]) -> Instance | None:
        if self._prefill_policy is None or self._prefill_snapshots is None:
            return None
        snapshot = self._prefill_snapshots.for_arrival(excluded)
        arrival = replace(arrival, max_new_tokens=1)
        placement = self._place(self._prefill_policy, snapshot, arrival)
        if placement.instance is None:
            raise self.queue.refusal(503, _why_nobody(self._fleet.of_role("prefill")))
        return self._named(placement.instance)

    def _place(
        self, policy: DispatchPolicy, snapshot: FleetSnapshot, arrival: Arrival
    ) -> Placement:
        """Ask a policy; where it fails, the plain one decides, so that a defect refuses nobody."""
        try:
            placement = policy.place(snapshot, arrival, self.sequence)
            if placement.instance is None or self._fleet.find(placement.instance) is not None:
                return placement
            raise LookupError(f"{placement.instance!r} is not in the fleet")
        except Exception as error:
            self.policy_errors[policy.name] += 1
            if repr(error) not in self._said:
                self._said.add(repr(error))
                logger.exception(
                    "policy %s failed; %s decides in its place", policy.name, self._plain.name
                )
            return self._plain.place(snapshot, arrival, self.sequence)

    def _named(self, name: str) -> Instance:
        instance = self._fleet.find(name)
        if instance is None:
            raise self.queue.refusal(503, f"the policy chose {name!r}, which is not in the fleet")
        return instance


def _why_nobody(instances: list[Instance]) -> str:
    roles = "/".join(sorted({one.role for one in instances}))
    reasons = "; ".join(
        f"{one.name}: {one.trouble or ('draining' if one.draining else 'failed this request')}"
        for one in instances
    )
    return f"no {roles} instance can take the request ({reasons})"
