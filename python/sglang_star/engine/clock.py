"""Where an engine has its time and its new names from."""

from __future__ import annotations

import secrets
import time
from typing import Final, Protocol

NAME_BYTES: Final = 16


class Clock(Protocol):
    """Time and names; see :class:`~sglang_star.engine.verbs.Engine`."""

    def now(self) -> float:
        """Seconds of a clock that never jumps."""

    def wall(self) -> float:
        """Seconds since the epoch."""

    def new_id(self) -> str:
        """A name that nobody else has or can guess."""


class RealClock:
    """This process's own clocks and dice."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def new_id(self) -> str:
        """128 random bits, in hexadecimal."""
        return secrets.token_hex(NAME_BYTES)
