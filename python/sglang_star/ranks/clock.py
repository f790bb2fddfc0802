"""The time and the new names that all ranks of an engine have in common."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from sglang_star.ranks.step import StepInput

NAME_BYTES: Final = 16


class StepClock:
    """What all ranks agree on: rank 0's clocks at the latest step input, names from its seed.

    Attributes:
        step_ms: mean decode step time, as agreed.
    """

    def __init__(self) -> None:
        self.step_ms = 0.0
        self._now = 0.0
        self._wall = 0.0
        self._seed = b""
        self._names = 0

    def advance(self, step: StepInput) -> None:
        """The next step boundary is this one."""
        self._now, self._wall, self._seed = step.now, step.wall, step.seed
        self.step_ms = step.step_ms
        self._names = 0

    def now(self) -> float:
        """Monotonic seconds of rank 0."""
        return self._now

    def wall(self) -> float:
        """Seconds since the epoch, by rank 0."""
        return self._wall

    def new_id(self) -> str:
        """128 bits, in hexadecimal; whoever does not know the seed cannot guess them."""
        self._names += 1
        counted = self._names.to_bytes(8, "little")
        return blake2b(counted, digest_size=NAME_BYTES, key=self._seed).hexdigest()
