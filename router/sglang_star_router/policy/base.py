"""What every policy offers, and nothing else: two pure decisions."""

from __future__ import annotations

from typing import Protocol

from sglang_star_router.policy.snapshot import Arrival, FleetSnapshot, MoveOrder, Placement


class DispatchPolicy(Protocol):
    """Chooses the decode instance for an arrival.

    ``sequence`` counts the arrivals so far: with it round-robin needs no state of its own.
    """

    name: str

    def place(self, snapshot: FleetSnapshot, arrival: Arrival, sequence: int) -> Placement:
        """Return where ``arrival`` goes; must hold (``instance=None``) if nobody accepts."""
        ...


class ReschedulePolicy(Protocol):
    """Chooses which running requests move."""

    name: str

    def orders(self, snapshot: FleetSnapshot) -> list[MoveOrder]:
        """Return the moves to start now, most valuable first; empty is the common answer."""
        ...
