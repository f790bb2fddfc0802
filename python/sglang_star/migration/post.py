"""How the protocol sends messages; :class:`sglang_star.migration.links.Links` uses sockets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sglang_star.protocol import Message, Peer


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Put into the inbox once when a watched peer is gone, has restarted or is silent too long."""

    peer: Peer
    why: str


class Post(Protocol):
    """What carries messages to other instances.

    Attributes:
        peer: how others reach this instance.
    """

    peer: Peer

    def send(self, peer: Peer, message: Message) -> None:
        """Send a message on its way; it never waits, and the message may be lost."""
