"""One incoming move, until its request decodes here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sglang_star.engine.verbs import Request
from sglang_star.migration.home import Shadow
from sglang_star.migration.piece import Fetched
from sglang_star.migration.states import Machine, Receiving, ReceivingEvent, receiving
from sglang_star.migration.transport.choice import Way
from sglang_star.protocol import Commit, PagesReady, Peer, Reserve, Route


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A move that comes here.

    Attributes:
        rid: what the request is called here.
        way: the source's staging memory.
        deadline: monotonic seconds.
        due: until when its commit is expected any moment, monotonic seconds.
        req: None until SGLang has rebuilt it (a grammar may still compile).
        announced: pieces that are still to be copied; unloading: those that are being copied;
            oldest first.
        commit: the one that has come.
    """

    reserve: Reserve
    rid: str
    way: Way
    deadline: float
    due: float = 0.0
    req: Request | None = None
    announced: deque[PagesReady] = field(default_factory=deque)
    unloading: deque[Fetched] = field(default_factory=deque)
    commit: Commit | None = None
    machine: Machine[Receiving, ReceivingEvent] = field(default_factory=receiving)

    @property
    def stream_id(self) -> str:
        """See :class:`Route`."""
        return self.reserve.stream_id

    @property
    def migration_id(self) -> str:
        """See :class:`Route`."""
        return self.reserve.migration_id

    @property
    def tickets(self) -> tuple[int, ...]:
        """Of the copies into its KV that may be under way."""
        return tuple(piece.ticket for piece in self.unloading)

    def route(self, to: Peer) -> Route:
        """Address of a message about this move."""
        return Route(
            migration_id=self.migration_id, stream_id=self.stream_id, receiver=to.incarnation
        )


@dataclass(slots=True, kw_only=True)
class Newcomer(Incoming):
    """A request of another home, which becomes a guest."""


@dataclass(slots=True, kw_only=True)
class Homecoming(Incoming):
    """A request of ours that comes back; its tokens are here already, but for the last ones."""

    shadow: Shadow
