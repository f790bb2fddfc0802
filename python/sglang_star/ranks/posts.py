"""How ranks send: rank 0 when all are ready, the others nothing."""

from __future__ import annotations

from sglang_star.migration.post import Post
from sglang_star.protocol import Message, Peer
from sglang_star.ranks.ledger import Ledger


class HeldPost:
    """Rank 0's: what is said within a tick leaves when that is over on all ranks.

    A peer's ranks act on a message at once, each on what the rank of its own number did: slots it
    filled, or emptied.

    Args:
        through: sends for real; None on the other ranks, which send nothing.
    """

    def __init__(self, peer: Peer, ledger: Ledger, through: Post | None) -> None:
        self.peer = peer
        self._ledger = ledger
        self._through = through
        self._holding = False
        self._held: list[tuple[Peer, Message]] = []

    def send(self, peer: Peer, message: Message) -> None:
        """See :class:`Post`."""
        self._ledger.note(message)
        if self._through is None:
            return
        if self._holding:
            self._held.append((peer, message))
        else:
            self._through.send(peer, message)

    def hold(self) -> None:
        """A tick begins."""
        self._holding = True

    def release(self) -> None:
        """It is over on all ranks."""
        self._holding = False
        held, self._held = self._held, []
        for peer, message in held:
            assert self._through is not None, "only rank 0 holds messages"
            self._through.send(peer, message)
