"""How long a demo will take, and how long each of its phases took."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

START_CORE_S: Final = 40.0
"""Processor time that starting a cluster takes; with more cores it is spread over them."""

LEAST_START_S: Final = 10.0


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def expected_s(starts: int, playing_s: float, count: int) -> float:
    """Return about how long a demo takes that starts so many clusters, on ``count`` cores."""
    return starts * max(START_CORE_S / count, LEAST_START_S) + playing_s


@dataclass
class Phases:
    """Says what begins, and afterwards how long it took.

    Attributes:
        took: (name, seconds) of what is over.
    """

    total: int
    say: Callable[[str], None] = print
    took: list[tuple[str, float]] = field(default_factory=list)
    _begun: int = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and time it."""
        self._begun += 1
        self.say(f"[{self._begun}/{self.total}] {name}")
        began = time.monotonic()
        yield
        self.took.append((name, time.monotonic() - began))
        self.say(f"      took {self.took[-1][1]:.0f} s")
