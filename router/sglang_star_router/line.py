"""What is under way between the router and one instance, and whether the instance still speaks."""

from __future__ import annotations

import time
from typing import Protocol

PREFILL_FLOOR_TOKENS_S = 2000.0
"""The slowest prefill that is waited for in silence, tokens per second."""


class Waiting(Protocol):
    """An exchange whose answer has not begun."""

    def fail(self, message: str) -> None:
        """End it badly."""


class Line:
    """One instance's.

    Attributes:
        heard_at: when an answer last began, monotonic seconds. Tokens of older ones do not count:
            they may flow on while nothing new is taken up.
    """

    __slots__ = ("_waiting", "heard_at")

    def __init__(self) -> None:
        self.heard_at = 0.0
        self._waiting: dict[Waiting, tuple[float, float]] = {}

    def wait(self, exchange: Waiting, prompt_tokens: int) -> None:
        """Note that an answer is waited for."""
        patience = prompt_tokens / PREFILL_FLOOR_TOKENS_S
        self._waiting[exchange] = (time.monotonic(), patience)

    def begun(self, exchange: Waiting) -> None:
        """Note that it has begun, or will never."""
        self._waiting.pop(exchange, None)

    def silence_s(self) -> float:
        """For how long answers have been waited for in silence, less what a prefill may take.

        The longest prompt that waits grants its time to the instance as a whole. 0 if nothing
        waits.
        """
        if not self._waiting:
            return 0.0
        since = min(since for since, _ in self._waiting.values())
        patience = max(patience for _, patience in self._waiting.values())
        return max(0.0, time.monotonic() - max(since, self.heard_at) - patience)

    def give_up(self, reason: str, waited_s: float = 0.0) -> int:
        """End what has waited so long, so that it is tried elsewhere; return how much it was."""
        now = time.monotonic()
        given_up = [
            exchange
            for exchange, (since, patience) in self._waiting.items()
            if now - since - patience >= waited_s
        ]
        for exchange in given_up:
            del self._waiting[exchange]
            exchange.fail(reason)
        return len(given_up)
