"""How many bytes may be copied now: a budget per step, and a rate over time."""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.1
"""What was not used of the rate is kept for so long."""


class Pace:
    """The allowance of one engine.

    Args:
        per_step: bytes in one step at most.
        per_s: bytes per second at most; 0 for no limit.
    """

    def __init__(self, per_step: int, per_s: int) -> None:
        self._per_step = per_step
        self._per_s = per_s
        self._left = 0.0
        self._at: float | None = None

    def allowed(self, now: float) -> int:
        """Bytes that may be copied in the step that begins now; 0 or less if none."""
        if not self._per_s:
            return self._per_step
        if self._at is None:
            self._at = now
            self._left = self._per_s * BURST_S
        self._left = min(self._left + (now - self._at) * self._per_s, self._per_s * BURST_S)
        self._at = now
        return min(self._per_step, int(self._left))

    def took(self, copied: int) -> None:
        """So many were; what was too many is missing later."""
        self._left -= copied
