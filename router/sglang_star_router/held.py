"""Requests that a policy holds, in the order of their arrival.

They are tried again whenever the fleet has changed, those that can still meet their TTFT limit
first, the oldest first among them (``policy.holding``). One that waits too long, or finds the
queue full, gets an honest refusal with ``Retry-After``.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from sglang_star_router.calls import Call
from sglang_star_router.policy.holding import retry_order
from sglang_star_router.policy.snapshot import Arrival
from sglang_star_router.replies import Rejected
from sglang_star_router.seat import Seat

RETRY_AFTER_CHANGE_S = 0.005
"""Changes of the fleet are gathered for so long before held requests are tried again."""
RETRY_ANYHOW_S = 0.1
"""They are tried again at least this often: a policy may also wait for time to pass."""
RATE_SEATS = 32
"""Held requests seated last, from which the queue's speed is told."""
LONGEST_RETRY_AFTER_S = 60
FAILURES = 4
"""Held requests in a row that find no room before the rest is left for the next change."""


@dataclass(slots=True, eq=False)
class Held:
    """One of them; ``seated`` resolves when it leaves."""

    call: Call
    arrival: Arrival
    excluded: Collection[str]
    seated: asyncio.Future[Seat]


class HeldRequests:
    """The queue.

    Attributes:
        refused: requests sent away, by HTTP status.

    Args:
        size: how many may wait; timeout_s: how long one may.
        deadline_s: how long one may wait and still be in time; later it yields to fresher ones.
        attempt: seats a request if it has room, else returns None.
        leave: gives a seat back.
    """

    def __init__(
        self,
        *,
        size: int,
        timeout_s: float,
        deadline_s: float,
        attempt: Callable[[Call, Arrival, Collection[str]], Seat | None],
        leave: Callable[[Seat], None],
    ) -> None:
        self.refused: dict[int, int] = {429: 0, 503: 0}
        self._size = size
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._attempt = attempt
        self._leave = leave
        self._waiting: list[Held] = []
        self._timer: asyncio.TimerHandle | None = None
        self._left_at: deque[float] = deque(maxlen=RATE_SEATS)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Held]:
        return iter(self._waiting)

    @property
    def full(self) -> bool:
        """No other one may wait."""
        return len(self._waiting) >= self._size

    def comes_first(self, now: float) -> bool:
        """Whether somebody waits who comes before a newcomer."""
        return any(self._in_time(one, now) for one in self._waiting)

    def refusal(self, status: int, message: str, *, close: bool = False) -> Rejected:
        """Count and return the answer to a request that is sent away."""
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
        if not self._waiting:
            return 1
        now = time.monotonic()
        oldest = now - self._waiting[0].arrival.arrived_s
        seats = [at for at in self._left_at if now - at < LONGEST_RETRY_AFTER_S]
        if len(seats) >= 2:
            each = (now - seats[0]) / len(seats)
            wait = (len(self._waiting) + 1) * each
        else:
            wait = oldest
        return max(1, min(LONGEST_RETRY_AFTER_S, math.ceil(wait)))

    async def wait(
        self, call: Call, arrival: Arrival, excluded: Collection[str], deadline: float
    ) -> Seat:
        """Wait for a seat.

        Args:
            deadline: loop time until which it may wait, at the longest.

        Raises:
            Rejected: nobody can take it, or the wait was too long.
            TimeoutError: the deadline has passed.
        """
        loop = asyncio.get_running_loop()
        seated: asyncio.Future[Seat] = loop.create_future()
        held = Held(call, arrival, excluded, seated)
        # Oldest first, as the retries expect: one that comes back takes its old place.
        insort(self._waiting, held, key=lambda one: one.arrival.arrived_s)
        self._retry_in(RETRY_ANYHOW_S)
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + self._timeout_s)):
                return await asyncio.shield(seated)
        except BaseException as error:
            # It may have been seated in the very moment the client left or time ran out.
            if seated.done() and not seated.cancelled() and seated.exception() is None:
                self._leave(seated.result())
            if isinstance(error, TimeoutError) and loop.time() < deadline:
                raise self.refusal(503, "no instance had room in time") from None
            raise
        finally:
            if held in self._waiting:
                self._waiting.remove(held)

    def _in_time(self, held: Held, now: float) -> bool:
        return now - held.arrival.arrived_s <= self._deadline_s

    def changed(self) -> None:
        """Note that an instance may have got room."""
        if self._waiting:
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
        order, in_time = retry_order([one.arrival for one in self._waiting], now, self._deadline_s)
        queue = list(self._waiting)
        for group in (order[:in_time], order[in_time:]):
            failures = 0
            for position in group:
                failures = 0 if self._settle(queue[position]) else failures + 1
                if failures >= FAILURES:
                    break
        if self._waiting:
            self._retry_in(RETRY_ANYHOW_S)

    def _settle(self, held: Held) -> bool:
        """Whether a held request left the queue, seated or refused."""
        if held.seated.done():
            return True
        try:
            seat = self._attempt(held.call, held.arrival, held.excluded)
        except Exception as error:
            held.seated.set_exception(error)
        else:
            if seat is None:
                return False
            held.seated.set_result(seat)
            self._left_at.append(time.monotonic())
        self._waiting.remove(held)
        return True
