"""A piece of a request's KV that is being copied."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions ``[start, end)`` on their way into, or out of, a slot.

    Attributes:
        ticket: of the copy.
    """

    ticket: int
    start: int
    end: int
    slot: int
