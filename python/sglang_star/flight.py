"""The step in flight: since when the device works on it, and until when the next one can wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HOLD_SHARE: Final = 0.9
"""Of a decode step that queueing the next one may be put off; the rest prepares its launch."""


@dataclass(slots=True)
class Flight:
    """What the scheduler's thread can tell of the step that the device works on.

    A step is launched after the boundary that precedes it, while the device may still work on the
    step before; its own begins when both are over. Both times are early rather than late.

    Attributes:
        boundary_s: when the latest step boundary was over; previous_s: when the latest step's
            result was in. Of the same monotonic clock.
    """

    boundary_s: float = 0.0
    previous_s: float = 0.0

    def hold_until(self, step_s: float) -> float:
        """Until when the next step can be queued without the device going idle.

        Args:
            step_s: how long a step takes; 0 if that is not known, and then nothing is held.
        """
        return max(self.boundary_s, self.previous_s) + HOLD_SHARE * step_s
