"""When a failed attempt is followed by another one: backoff, and a budget for the whole fleet."""

from __future__ import annotations

import random

from sglang_star_router.faults import FaultLimits


def backoff_s(limits: FaultLimits, retry: int) -> float:
    """Seconds to wait before a retry, the first being 0."""
    grown = limits.retry_initial_backoff_ms * limits.retry_backoff_multiplier**retry
    jitter = 1.0 + limits.retry_jitter_factor * random.uniform(-1.0, 1.0)
    return min(grown, limits.retry_max_backoff_ms) * jitter / 1e3


class RetryBudget:
    """Keeps a fleet that fails as a whole from being asked many times over.

    A debt grows by one with each retry and shrinks by ``retry_budget`` with each request that
    arrives. It may reach the number of requests in progress, so that those of one instance can all
    go elsewhere at once.

    Attributes:
        floor: debt that is allowed in any case; denied: retries not made.
    """

    def __init__(self, limits: FaultLimits) -> None:
        self.floor = 100.0
        self.denied = 0
        self.active = 0
        self._ratio = limits.retry_budget
        self._debt = 0.0

    def arrived(self) -> None:
        """Note a request."""
        self.active += 1
        self._debt = max(0.0, self._debt - self._ratio)

    def ended(self) -> None:
        """Note the end of one."""
        self.active -= 1

    def grant(self) -> bool:
        """Take one retry out of the budget, unless it is used up."""
        if self._debt + 1.0 > max(self.floor, self._ratio * self.active):
            self.denied += 1
            return False
        self._debt += 1.0
        return True
