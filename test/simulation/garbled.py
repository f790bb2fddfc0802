"""Histories in which members say what no member would; see :mod:`simulation.garble`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_star.protocol import Heartbeat, PeerMessage
from simulation import garble
from simulation.history import History
from simulation.node import Node
from simulation.plan import Plan
from simulation.request import Request


class Garbled(History):
    """A history with changed copies of messages among the real ones.

    Attributes:
        victims: requests that such a copy is about; what their clients get is not judged, for a
            member may say what it likes about a stream that it has to do with.
        said: copies that a receiver understood; unheard: those it dropped.
    """

    def __init__(self, plan: Plan, share: float) -> None:
        super().__init__(plan)
        self.weather.garble = share
        self.gentle = False  # a stream may be lost by what is said of it
        self.victims: set[str] = set()
        self.said = 0
        self.unheard = 0

    def garble(self, address: str, message: Any) -> None:
        """Send a changed copy of a message after it."""
        data = garble.changed(message, self.random)
        copy = garble.understood(data)
        if not isinstance(copy, PeerMessage):
            self.unheard += 1
            return
        self.said += 1
        self.victims |= self._concerned(address, message) | self._concerned(address, copy)
        self.note("network", "garbles", copy, sorted(self.victims))
        self.clock.after(self.random.uniform(0.0, 0.01), self._say, address, copy)

    def _say(self, address: str, copy: Any) -> None:
        if (node := self.at(address)) is not None:
            node.link.deliver(copy)

    def _concerned(self, address: str, message: Any) -> set[str]:
        """Requests whose streams the message names, or that are between its two ends."""
        named = garble.streams_of(message)
        about_peer = isinstance(message, Heartbeat)
        return {
            rid
            for node in self.nodes.values()
            for stream, rid, peers in _streams(node)
            if stream in named or rid in named or (about_peer and address in peers)
        }

    # ------------------------------------------------------------------ what is not judged

    def told(self, node: Node, req: Request, new: list[int], end: dict[str, Any] | None) -> None:
        if req.rid not in self.victims:
            super().told(node, req, new, end)
        elif end is not None:
            self.clients[req.rid].end = end

    def judges(self, rid: str) -> bool:
        return rid not in self.victims

    def _calm(self) -> None:
        super()._calm()
        self.weather.garble = 0.0


def _streams(node: Node) -> Iterator[tuple[str, str, set[str]]]:
    """(stream id, its client's name, addresses of whom it concerns) of all that a node knows."""
    mover, here = node.mover, node.peer.address
    for shadow in mover.home.shadows.values():
        yield shadow.stream_id, shadow.req.rid, {here, shadow.host.address}
    for sent in mover.sender.moves.values():
        yield sent.stream_id, sent.client_rid, {here, sent.target.address, sent.home.address}
    for move in mover.target.moves.values():
        reserve = move.reserve
        yield (
            move.stream_id,
            reserve.client_rid,
            {here, reserve.source.address, reserve.home.address},
        )
    for guest in mover.host.by_stream.values():
        yield guest.stream_id, guest.client_rid, {here, guest.home.address}
