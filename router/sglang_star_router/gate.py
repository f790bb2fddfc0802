"""How many requests are served at a time and begun per second, if an operator has set limits."""

from __future__ import annotations

import asyncio

from sglang_star_router.replies import Rejected


class Gate:
    """Lets requests in one by one.

    Args:
        limit: requests inside at a time; -1 for any number.
        rate: requests let in per second, and as many at once after a pause; 0 for any number.
        queue_size, queue_timeout_s: how many may wait outside, and how long.

    Attributes:
        active: requests inside; waiting: requests outside.
    """

    def __init__(self, limit: int, rate: float, *, queue_size: int, queue_timeout_s: float) -> None:
        self.active = 0
        self.waiting = 0
        self._places = asyncio.Semaphore(limit) if limit > 0 else None
        self._rate = rate
        self._due = 0.0
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s

    async def enter(self) -> None:
        """Wait for a place and keep it until :meth:`leave`.

        Raises:
            Rejected: too many wait, or the wait was too long.
        """
        if self._places is not None or self._rate:
            await self._wait()
        self.active += 1

    def leave(self) -> None:
        """Give the place back."""
        self.active -= 1
        if self._places is not None:
            self._places.release()

    async def _wait(self) -> None:
        delay = self._delay()
        if (delay or self._full) and self.waiting >= self._queue_size:
            raise _refusal(f"{self.waiting} requests are waiting already", delay)
        if delay > self._queue_timeout_s:
            raise _refusal("too many requests per second", delay)
        if self._rate:
            self._due += 1.0 / self._rate
        self.waiting += 1
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                if delay:
                    await asyncio.sleep(delay)
                if self._places is not None:
                    await self._places.acquire()
        except TimeoutError:
            raise _refusal("no place among the requests served at a time", 1.0) from None
        finally:
            self.waiting -= 1

    @property
    def _full(self) -> bool:
        return self._places is not None and self._places.locked()

    def _delay(self) -> float:
        """Seconds until the rate allows one more, a second's worth being let in at once."""
        if not self._rate:
            return 0.0
        now = asyncio.get_running_loop().time()
        burst = max(self._rate, 1.0) / self._rate
        self._due = max(self._due, now - burst + 1.0 / self._rate)
        return max(0.0, self._due - now)


def _refusal(message: str, delay: float) -> Rejected:
    return Rejected(
        message, status=429, kind="rate_limit_exceeded", retry_after_s=max(1, round(delay))
    )
