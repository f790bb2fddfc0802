"""Whether our own scheduler still comes by.

Heartbeats are sent by a thread that knows nothing of the scheduler, so that a long prefill is not
taken for a death. A scheduler that never comes by again, hung in a kernel, would be waited for by
its peers for ever: then the thread falls silent, and peers do as when an instance is lost.
"""

from __future__ import annotations


class Pulse:
    """One thread reports, another looks; both do so with a single assignment or read.

    Args:
        limit_s: time between two step boundaries after which the scheduler counts as stuck. Paused
            and idle schedulers pass them, too.
        now: monotonic seconds.
    """

    def __init__(self, limit_s: float, now: float) -> None:
        self._limit_s = limit_s
        self._at = now

    def beat(self, now: float) -> None:
        """The scheduler is at a step boundary."""
        self._at = now

    def is_stuck(self, now: float) -> bool:
        """Whether it was at none for too long."""
        return now - self._at > self._limit_s
