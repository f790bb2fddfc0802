"""A clock that only events move."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Clock:
    """Virtual seconds since the history began; events at the same time keep their order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._ids = itertools.count()

    def at(self, when: float, act: Callable[..., Any], *args: Any) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._ids), act, args))

    def after(self, seconds: float, act: Callable[..., Any], *args: Any) -> None:
        self.at(self.now + seconds, act, *args)

    def run(self, until: float) -> bool:
        """Run to the end of all events; False if some are left at ``until``."""
        heap = self._heap
        while heap:
            if heap[0][0] > until:
                return False
            self.now, _, act, args = heapq.heappop(heap)
            act(*args)
        return True
