"""Carriers of KV bytes between two instances."""

from __future__ import annotations

from sglang_star.errors import PeerError
from sglang_star.migration.transport.base import Carrier
from sglang_star.migration.transport.shm import SharedMemoryCarrier

CARRIERS: dict[str, type[Carrier]] = {SharedMemoryCarrier.name: SharedMemoryCarrier}


def sweep() -> list[str]:
    """Remove what senders that were killed have left on this machine; returns its names."""
    return [name for kind in CARRIERS.values() for name in kind.sweep()]


def carrier(name: str) -> type[Carrier]:
    """Look a carrier up by name.

    Raises:
        PeerError: this release has none of that name.
    """
    try:
        return CARRIERS[name]
    except KeyError:
        raise PeerError(
            f"no transport named {name!r}", hint=f"known: {', '.join(CARRIERS)}"
        ) from None
