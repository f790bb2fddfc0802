"""A clock that only events move."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """Virtual seconds since the history began; events at the same time keep their order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when: float, act: Callable[..., Any], *args: Any) -> None:
        self._count += 1
        heappush(self._heap, (when if when > self.now else self.now, self._count, act, args))

    def after(self, seconds: float, act: Callable[..., Any], *args: Any) -> None:
        self.at(self.now + seconds, act, *args)

    def run(self, until: float) -> bool:
        """Run to the end of all events; False if some are left at ``until``."""
        heap = self._heap
        while heap:
            if heap[0][0] > until:
                return False
            self.now, _, act, args = heappop(heap)
            act(*args)
        return True
