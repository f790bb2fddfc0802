"""How the protocol sends messages; :class:`sglang_star.migration.links.Links` uses sockets."""

from __future__ import annotations

from typing import Protocol

from sglang_star.protocol import Message, Peer


class Post(Protocol):
    """What carries messages to other instances.

    Attributes:
        peer: how others reach this instance.
    """

    peer: Peer

    def send(self, peer: Peer, message: Message) -> None:
        """Send a message on its way; it never waits, and the message may be lost."""
