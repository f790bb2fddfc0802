"""Where an arrival goes: the policy decides, and what it holds waits here.

Held requests are tried again whenever the fleet has changed, those that can still meet their TTFT
limit first, the oldest first among them (``policy.holding``). One that waits too long, or finds the
queue full, gets an honest refusal with ``Retry-After``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from sglang_star_router.breaker import Trial
from sglang_star_router.calls import Call
from sglang_star_router.fleet import Dispatch, Fleet, Instance
from sglang_star_router.policy.base import DispatchPolicy
from sglang_star_router.policy.holding import retry_order
from sglang_star_router.policy.snapshot import Arrival, FleetSnapshot, Placement
from sglang_star_router.policy.static import LeastTokens
from sglang_star_router.replies import Rejected
from sglang_star_router.snapshot import Snapshots

logger = logging.getLogger(__name__)

RETRY_AFTER_CHANGE_S = 0.005
"""Changes of the fleet are gathered for so long before held requests are tried again."""
RETRY_ANYHOW_S = 0.1
"""They are tried again at least this often: a policy may also wait for time to pass."""
RATE_SEATS = 32
"""Held requests seated last, from which the queue's speed is told."""
LONGEST_RETRY_AFTER_S = 60
FAILURES = 4
"""Held requests in a row that find no room before the rest is left for the next change."""


@dataclass(slots=True)
class Seat:
    """Where one attempt at a request goes.

    Attributes:
        decode: instance that streams to the client; prefill: its partner, None if aggregated.
        tickets: what the cluster counts until the attempt ends.
        trials: what their breakers are to be told, by URL.
        prompt_tokens: estimate.
    """

    decode: Instance
    prefill: Instance | None
    prompt_tokens: int = 0
    tickets: list[tuple[Instance, Dispatch]] = field(default_factory=list)
    trials: dict[str, Trial] = field(default_factory=dict)

    def trial(self, instance: Instance) -> Trial:
        """The trial of one of its instances."""
        return self.trials[instance.endpoint.url]


@dataclass(slots=True, eq=False)
class _Held:
    call: Call
    arrival: Arrival
    excluded: Collection[str]
    seated: asyncio.Future[Seat]


class Dispatcher:
    """Seats arrivals by policy.

    Attributes:
        sequence: arrivals seated so far; held: those that had to wait.
        refused: those sent away, by HTTP status.
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
        self.held = 0
        self.refused: dict[int, int] = {429: 0, 503: 0}
        self.policy_errors: Counter[str] = Counter()
        self._fleet = fleet
        self._policy = decode_policy
        self._snapshots = decode_snapshots
        self._prefill_policy = prefill_policy
        self._prefill_snapshots = prefill_snapshots
        self._queue: list[_Held] = []
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._hold_deadline_s = hold_deadline_s
        self._true_lengths = true_lengths
        self._timer: asyncio.TimerHandle | None = None
        self._plain = LeastTokens()
        self._said: set[str] = set()
        self._left_at: deque[float] = deque(maxlen=RATE_SEATS)
        fleet.watch(self._on_change)

    @property
    def holding(self) -> int:
        """Requests waiting for an instance."""
        return len(self._queue)

    def refuse_if_full(self) -> None:
        """Refuse at once what :meth:`seat` would refuse whatever it is.

        Raises:
            Rejected: the queue is full, and somebody in it comes first.
        """
        waiting = len(self._queue)
        now = time.monotonic()
        if waiting >= self._queue_size and any(self._in_time(one, now) for one in self._queue):
            raise self._refusal(429, f"{waiting} requests are waiting already", close=True)

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
        if (
            since is not None
            or not self._queue
            or not any(self._in_time(one, arrival.arrived_s) for one in self._queue)
        ):
            seat = self._try(call, arrival, excluded)
            if seat is not None:
                return seat
        if since is None and len(self._queue) >= self._queue_size:
            raise self._refusal(429, f"{len(self._queue)} requests are waiting already")
        return await self._hold(call, arrival, excluded, deadline)

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
        prompt = call.prompt_tokens(self._fleet.tokens_of)
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
            raise self._refusal(503, _why_nobody(self._fleet.decoding()))
        snapshot = self._snapshots.for_arrival(excluded, held=len(self._queue))
        placement = self._place(self._policy, snapshot, arrival)
        if placement.reject:
            raise self._refusal(429, "the fleet is saturated and cannot serve this in time")
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
            raise self._refusal(503, _why_nobody(self._fleet.of_role("prefill")))
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
            raise self._refusal(503, f"the policy chose {name!r}, which is not in the fleet")
        return instance

    def _refusal(self, status: int, message: str, *, close: bool = False) -> Rejected:
        self.refused[status] += 1
        kind = "rate_limit_exceeded" if status == 429 else "service_unavailable"
        return Rejected(
            message,
            status=status,
            kind=kind,
            retry_after_s=self.retry_after_s(),
            close=close,
        )

    def retry_after_s(self) -> int:
        """When a client should come again, seconds: once the queue before it will have gone.

        As long as nobody has left the queue lately, as long again as the oldest has waited.
        """
        if not self._queue:
            return 1
        now = time.monotonic()
        oldest = now - self._queue[0].arrival.arrived_s
        seats = [at for at in self._left_at if now - at < LONGEST_RETRY_AFTER_S]
        if len(seats) >= 2:
            each = (now - seats[0]) / len(seats)
            wait = (len(self._queue) + 1) * each
        else:
            wait = oldest
        return max(1, min(LONGEST_RETRY_AFTER_S, math.ceil(wait)))

    # ------------------------------------------------------------------ holding

    async def _hold(
        self, call: Call, arrival: Arrival, excluded: Collection[str], deadline: float
    ) -> Seat:
        loop = asyncio.get_running_loop()
        seated: asyncio.Future[Seat] = loop.create_future()
        held = _Held(call, arrival, excluded, seated)
        # Oldest first, as the retries expect: one that comes back takes its old place.
        insort(self._queue, held, key=lambda one: one.arrival.arrived_s)
        self.held += 1
        self._retry_in(RETRY_ANYHOW_S)
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + self._queue_timeout_s)):
                return await asyncio.shield(seated)
        except BaseException as error:
            # It may have been seated in the very moment the client left or time ran out.
            if seated.done() and not seated.cancelled() and seated.exception() is None:
                self.leave(seated.result())
            if isinstance(error, TimeoutError) and loop.time() < deadline:
                raise self._refusal(503, "no instance had room in time") from None
            raise
        finally:
            if held in self._queue:
                self._queue.remove(held)

    def _in_time(self, held: _Held, now: float) -> bool:
        return now - held.arrival.arrived_s <= self._hold_deadline_s

    def _on_change(self) -> None:
        if self._queue:
            self._retry_in(RETRY_AFTER_CHANGE_S)

    def _retry_in(self, delay_s: float) -> None:
        """Try the queue again after ``delay_s``, or sooner if that is planned."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay_s:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay_s, self._retry)

    def _retry(self) -> None:
        """Go through the queue, those in time first, each group until it stalls."""
        self._timer = None
        now = time.monotonic()
        order, in_time = retry_order(
            [one.arrival for one in self._queue], now, self._hold_deadline_s
        )
        queue = list(self._queue)
        for group in (order[:in_time], order[in_time:]):
            failures = 0
            for position in group:
                failures = 0 if self._settle(queue[position]) else failures + 1
                if failures >= FAILURES:
                    break
        if self._queue:
            self._retry_in(RETRY_ANYHOW_S)

    def _settle(self, held: _Held) -> bool:
        """Whether a held request left the queue, seated or refused."""
        if held.seated.done():
            return True
        try:
            seat = self._try(held.call, held.arrival, held.excluded)
        except Exception as error:
            held.seated.set_exception(error)
        else:
            if seat is None:
                return False
            held.seated.set_result(seat)
            self._left_at.append(time.monotonic())
        self._queue.remove(held)
        return True


def _why_nobody(instances: list[Instance]) -> str:
    roles = "/".join(sorted({one.role for one in instances}))
    reasons = "; ".join(
        f"{one.name}: {one.trouble or ('draining' if one.draining else 'failed this request')}"
        for one in instances
    )
    return f"no {roles} instance can take the request ({reasons})"
