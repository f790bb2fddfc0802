"""One engine's part in all moves: messages in, a step at every boundary, guests' tokens out.

Pure protocol: all it knows of the engine are the verbs of :mod:`sglang_star.engine.verbs`, and all
it knows of the network is that messages are posted and come in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import IllegalTransition, OrderRefused, StarError
from sglang_star.faults import Faults
from sglang_star.migration.armed import ArmedOrders
from sglang_star.migration.arrival import Arrivals
from sglang_star.migration.guests import Guests
from sglang_star.migration.outflow import Outflow
from sglang_star.migration.post import PeerLost, Post
from sglang_star.migration.relay import Relay
from sglang_star.migration.report import CLOCK, MoveLog
from sglang_star.migration.source import Source
from sglang_star.protocol import (
    Commit,
    Heartbeat,
    Inserted,
    MigrationMessage,
    PagesReady,
    PagesTaken,
    Parked,
    Peer,
    Refused,
    Release,
    Reserve,
    Reserved,
    TokenChunk,
)

logger = logging.getLogger(__name__)

AnyRequest = TypeVar("AnyRequest", bound=Request)


class Mover:
    """All moves from, to and for one engine.

    Attributes:
        source: those from here; guests: requests of other homes; relay: our own that decode
            elsewhere; armed: orders that wait for their request; log: how moves ended.
    """

    def __init__(
        self, engine: Engine, post: Post, config: StarConfig, fingerprint: str, faults: Faults
    ) -> None:
        self.log = MoveLog(engine)
        self.armed = ArmedOrders()
        self.guests = Guests(engine, post, config)
        self.relay = Relay(
            engine, post, self.log, self.guests.stay_away, timeout_s=config.peer_timeout_s
        )
        self.source = Source(
            engine, post, self.relay, self.log, config, fingerprint, self.guests.handed_over
        )
        self._arrivals = Arrivals(engine, post, self.relay, self.guests, config, fingerprint)
        self._outflow = Outflow(engine, post, self.guests)
        self._engine = engine
        self._post = post
        self._faults = faults

    # ------------------------------------------------------------------ the step boundary

    def handle(self, item: MigrationMessage | PeerLost) -> None:
        """Take in a message, or that a peer is gone; a defect costs what it is about."""
        with self._faults.contained(type(item).__name__, lambda: self._abandon(item)):
            try:
                self._dispatch(item)
            except IllegalTransition:
                raise  # a defect of ours, not an answer to anybody
            except StarError as error:
                logger.warning("STAR ignores %s: %s", type(item).__name__, error)

    def step(self) -> None:
        """Advance what is under way; the engine is between two steps."""
        if self.source.moves:
            self.source.step(self._faults)
        if self.guests.by_stream:
            self._arrivals.step(self._faults)
            self.guests.step(self._faults)

    def flush(self) -> None:
        """Send relayed tokens to the clients; may be called while a step runs."""
        # What does not get out now goes with the request's next tokens: the engine keeps count.
        with self._faults.contained("relayed tokens"):
            self.relay.flush()

    def watched(self) -> frozenset[tuple[Peer, str]]:
        """Peers to exchange heartbeats with, each with a stream that is the reason."""
        pairs = {(s.host, s.stream_id) for s in self.relay.shadows.values()}
        pairs |= {(m.target, m.stream_id) for m in self.source.moves.values()}
        for guest in self.guests.by_stream.values():
            if guest.reserve.home != self._post.peer:
                pairs.add((guest.reserve.home, guest.reserve.stream_id))
            if guest.arriving:
                pairs.add((guest.reserve.source, guest.reserve.stream_id))
        return frozenset(pairs)

    @property
    def under_way(self) -> bool:
        """Whether messages may come that need not wait for the end of a step."""
        return bool(self.relay.shadows or self.source.moves)

    @property
    def holds_kv_off_batch(self) -> bool:
        """Whether KV is held that the engine's accounting does not see."""
        return bool(self.guests.arriving()) or any(
            move.off_batch for move in self.source.moves.values()
        )

    # ------------------------------------------------------------------ what the engine tells

    def rebuilt(self, req: Request) -> bool:
        """The engine is about to queue ``req``; True if it is ours to keep."""
        return self._arrivals.rebuilt(req)

    def emit(self, reqs: Sequence[AnyRequest]) -> Sequence[AnyRequest]:
        """Divert guests' output; return the requests whose clients are ours."""
        # One that has ended may come again with the step that was in flight, when it is no guest
        # of ours any more.
        prefix = self.guests.prefix
        own = [req for req in reqs if not (req.rid.startswith(prefix) and self._diverted(req))]
        for req in own:
            if hasattr(req, CLOCK):
                with self._faults.contained("the report of a move"):
                    self.log.token(req)
        return own

    def aborted(self, rid: str, reason: dict[str, Any] | None) -> bool:
        """The engine ended a request outside the output stream; True if it was a guest."""
        return self._outflow.aborted_here(rid, reason)

    def abort(self, wanted: Callable[[Request], bool], reason: dict[str, Any]) -> None:
        """End requests that the engine does not find in its batch, with an error's ``reason``."""
        self.relay.abort(wanted, reason)
        for move in list(self.source.moves.values()):
            if move.off_batch and wanted(move.req):
                self.source.abort(move, "aborted")
                self._engine.end(move.req, reason)
                self._engine.emit([move.req])

    # ------------------------------------------------------------------ small things

    def _diverted(self, req: Request) -> bool:
        """Whether the request is a guest; if so its tokens are on their way home."""

        def end() -> None:
            if (guest := self.guests.by_rid.get(req.rid)) is not None:
                self.guests.abandon(guest, "a defect while sending its tokens")

        with self._faults.contained("a guest's tokens", end):
            return self._outflow.emit(req)
        return True

    def _abandon(self, item: object) -> None:
        """Handling ``item`` failed: end what it is about, on this side and the other."""
        if not isinstance(item, MigrationMessage):
            return
        why = f"a defect while handling {type(item).__name__}"
        if (move := self.source.moves.get(item.migration_id)) is not None:
            self.source.abandon(move, why)
        guest = self.guests.by_stream.get(item.stream_id)
        if guest is not None and guest.reserve.migration_id == item.migration_id:
            self.guests.abandon(guest, why)
        elif isinstance(item, Reserve):
            self.guests.refuse(item, OrderRefused(f"the target had {why}"))
        shadow = self.relay.shadows.get(item.stream_id)
        if shadow is not None and isinstance(item, TokenChunk):
            self.relay.reclaim(shadow, why)

    def _dispatch(self, item: MigrationMessage | PeerLost) -> None:
        """Give a message to whom it concerns.

        Raises:
            StarError: it asks for what cannot be done; anything else is a defect.
        """
        if self.source.moves and isinstance(item, MigrationMessage):
            self.source.proven(item)
        match item:
            case TokenChunk():
                self.relay.on_chunk(item)
            case PagesReady():
                self._arrivals.on_pages(item)
            case Parked():
                self._arrivals.on_parked(item)
            case PagesTaken():
                self.source.on_taken(item)
            case Heartbeat():
                live = frozenset(item.live)
                self.relay.on_live(item.sender, live)
                self.guests.on_live(item.sender, live)
            case Reserve():
                self._arrivals.on_reserve(item)
            case Reserved():
                self.source.on_reserved(item)
            case Refused():
                self.source.on_refused(item)
            case Commit():
                self._arrivals.on_commit(item)
            case Inserted():
                if item.migration_id in self.source.moves:
                    self.source.on_inserted(item)
                else:
                    self.relay.on_inserted(item)
            case Release():
                self.guests.on_release(item)
            case PeerLost():
                logger.warning("STAR lost %s: %s", item.peer.instance_id, item.why)
                self.source.on_lost(item.peer, item.why)
                self.guests.on_lost(item.peer, item.why)
                self.relay.on_lost(item.peer, item.why)
