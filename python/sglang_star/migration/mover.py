"""One engine's part in all moves: messages in, a step at every boundary, guests' tokens out.

Pure protocol: all it knows of the engine are the verbs of :mod:`sglang_star.engine.verbs`, and all
it knows of the network is that messages are posted and come in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import IllegalTransition, StarError
from sglang_star.faults import Faults
from sglang_star.migration.armed import ArmedOrders
from sglang_star.migration.home import Home
from sglang_star.migration.host import Host
from sglang_star.migration.post import PeerLost, Post
from sglang_star.migration.report import MoveLog, Stopwatch
from sglang_star.migration.sender import Sender
from sglang_star.migration.target import Target
from sglang_star.migration.transport.choice import Transports
from sglang_star.protocol import (
    Commit,
    Heartbeat,
    Inserted,
    MoveMessage,
    PagesReady,
    PagesTaken,
    Parked,
    Peer,
    PeerMessage,
    Refused,
    Release,
    Reserve,
    Reserved,
    TokenChunk,
    Tokens,
)
from sglang_star.star_request import star_of

logger = logging.getLogger(__name__)

AnyRequest = TypeVar("AnyRequest", bound=Request)


class Mover:
    """All moves from, to and for one engine.

    Args:
        stopwatch: measures what clients notice, between two steps as well; the engine, if none.

    Attributes:
        sender: moves from here; target: moves that come here; host: guests that decode here;
            home: our own streams that decode elsewhere; armed: orders that wait for their
            request; log: how moves ended.
    """

    def __init__(
        self,
        engine: Engine,
        post: Post,
        config: StarConfig,
        fingerprint: str,
        faults: Faults,
        transports: Transports,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        timeout_s = config.peer_timeout_s
        self.log = MoveLog(stopwatch or engine)
        self.armed = ArmedOrders()
        self.home = Home(engine, post, self.log, self._over, timeout_s=timeout_s)
        self.host = Host(engine, post, timeout_s=timeout_s)
        self.target = Target(engine, post, self.home, self.host, config, fingerprint, transports)
        self.sender = Sender(
            engine, post, self.home, self.log, config, fingerprint, self.host.moved_on, transports
        )
        self._engine = engine
        self._post = post
        self._faults = faults

    def _over(self, stream_id: str, why: str) -> None:
        self.target.stay_away(stream_id, why)

    # ------------------------------------------------------------------ the step boundary

    def handle(self, item: PeerMessage | PeerLost) -> None:
        """Take in a message, or that a peer is gone; a defect costs what it is about."""
        if isinstance(item, PeerMessage) and item.receiver != self._post.peer.incarnation:
            return  # for the process that was here before
        if isinstance(item, Tokens):
            for chunk in item.chunks:
                self._take(chunk, partial(self._abandon_chunk, chunk))
        elif isinstance(item, MoveMessage):
            self._take(item, partial(self._abandon, item))
        else:
            self._take(item)  # about no move in particular

    def poll(self) -> None:
        """The engine has come to a step boundary; to be called first of all there."""
        self._engine.poll()
        self.target.poll()

    def arrive(self) -> None:
        """Still at that boundary, but later: insert what has come completely by now."""
        self._engine.poll()
        if self.target.moves:
            self.target.step(self._faults)

    def step(self) -> None:
        """Advance what is under way; the engine is between two steps."""
        if self.sender.busy:
            self.sender.step(self._faults)
        if self.target.moves:
            self.target.step(self._faults)

    def flush(self) -> None:
        """Send tokens that came home to their clients; may be called while a step runs."""
        if not self.home.fresh:
            return
        # What does not get out now goes with the request's next tokens: the engine keeps count.
        with self._faults.contained("relayed tokens"):
            self.home.flush()

    def watched(self) -> frozenset[tuple[Peer, str]]:
        """Peers to exchange heartbeats with, each with a stream that is the reason."""
        pairs = {(shadow.host, shadow.stream_id) for shadow in self.home.shadows.values()}
        pairs |= {(move.target, move.stream_id) for move in self.sender.moves.values()}
        pairs |= {(guest.home, guest.stream_id) for guest in self.host.by_stream.values()}
        for move in self.target.moves.values():
            pairs |= {(peer, move.stream_id) for peer in (move.reserve.home, move.reserve.source)}
        return frozenset(pair for pair in pairs if pair[0] != self._post.peer)

    @property
    def busy(self) -> bool:
        """Whether the next step boundary has work though no message came."""
        return bool(self.sender.busy or self.target.moves or self._engine.draining())

    @property
    def under_way(self) -> bool:
        """Whether messages may come that need not wait for the end of a step."""
        return bool(self.home.shadows or self.sender.moves)

    @property
    def holds_kv_off_batch(self) -> bool:
        """Whether KV is held that the engine's accounting does not see."""
        return (
            bool(self.target.moves)
            or self._engine.draining()
            or any(move.off_batch for move in self.sender.moves.values())
        )

    # ------------------------------------------------------------------ what the engine tells

    def rebuilt(self, req: Request) -> bool:
        """The engine is about to queue ``req``; True if it is ours to keep."""
        return self.target.rebuilt(req)

    def emit(self, reqs: Sequence[AnyRequest]) -> Sequence[AnyRequest]:
        """Divert guests' output; return the requests whose clients are ours."""
        own: list[AnyRequest] = []
        for req in reqs:
            star = star_of(req)
            if star.guest:
                self._divert(req)
                continue
            own.append(req)
            if star.clock is not None:
                with self._faults.contained("the report of a move"):
                    self.log.token(req, star.clock)
        self.host.flush()
        return own

    def aborted(self, rid: str, reason: dict[str, Any] | None) -> bool:
        """The engine ended a request outside the output stream; True if it was a guest."""
        guest = self.host.by_rid.get(rid)
        if guest is None:
            return self.target.aborted(rid)
        self.host.aborted(guest, reason)
        self.host.flush()
        return True

    def abort(self, wanted: Callable[[Request], bool], reason: dict[str, Any]) -> None:
        """End requests that the engine does not find in its batch, with an error's ``reason``."""
        self.home.abort(wanted, reason)
        for move in list(self.sender.moves.values()):
            if move.off_batch and wanted(move.req):
                self.sender.abort(move, "aborted")
                self._engine.end(move.req, reason)
                self._engine.emit([move.req])

    def recomputing(self, recompute: Callable[[], None]) -> None:
        """The engine gives all KV back, to compute it again, when ``recompute`` is called."""
        with self._faults.contained("moves before a pause"):
            self.sender.make_way()
            self.target.make_way()
        recompute()
        with self._faults.contained("moves after a pause"):
            self.sender.recompute()

    # ------------------------------------------------------------------ small things

    def _divert(self, req: Request) -> None:
        """Send a guest's tokens home.

        One that has ended may come again with the step that was in flight, when it is no guest of
        ours any more.
        """
        if (guest := self.host.by_rid.get(req.rid)) is not None:
            end = partial(self.host.drop, guest, "a defect while sending its tokens")
            with self._faults.contained("a guest's tokens", end):
                self.host.emit(guest)

    def _abandon(self, item: MoveMessage) -> None:
        """Handling ``item`` failed: end what it is about, on this side and the other."""
        why = f"a defect while handling {type(item).__name__}"
        if (sent := self.sender.moves.get(item.migration_id)) is not None:
            self.sender.abandon(sent, why)
        self.target.abandon(item, why)
        guest = self.host.by_stream.get(item.stream_id)
        if guest is not None and guest.migration_id == item.migration_id:
            self.host.drop(guest, why)

    def _abandon_chunk(self, chunk: TokenChunk) -> None:
        if (shadow := self.home.shadows.get(chunk.stream_id)) is not None:
            self.home.reclaim(shadow, "a defect while handling its tokens")

    def _take(
        self,
        item: PeerMessage | TokenChunk | PeerLost,
        end: Callable[[], None] | None = None,
    ) -> None:
        name = type(item).__name__
        with self._faults.contained(name, end):
            try:
                self._dispatch(item)
            except IllegalTransition:
                raise  # a defect of ours, not an answer to anybody
            except StarError as error:
                logger.warning("STAR ignores %s: %s", name, error)

    def _dispatch(self, item: PeerMessage | TokenChunk | PeerLost) -> None:
        """Give a message to whom it concerns.

        Raises:
            StarError: it asks for what cannot be done; anything else is a defect.
        """
        if self.sender.moves and isinstance(item, MoveMessage | TokenChunk):
            self.sender.proven(item)
        match item:
            case TokenChunk():
                self.home.on_chunk(item)
            case PagesReady():
                self.target.on_pages(item)
            case Parked():
                self.target.on_parked(item)
            case PagesTaken():
                self.sender.on_taken(item)
            case Heartbeat():
                live = frozenset(item.live)
                self.home.on_live(item.sender, live)
                self.host.on_live(item.sender, live)
            case Reserve():
                self.target.on_reserve(item)
            case Reserved():
                self.sender.on_reserved(item)
            case Refused():
                self.sender.on_refused(item)
            case Commit():
                self.target.on_commit(item)
            case Inserted():
                if item.migration_id in self.sender.moves:
                    self.sender.on_inserted(item)
                else:
                    self.home.on_inserted(item)
            case Release():
                self.target.on_release(item)
                self.host.on_release(item)
            case PeerLost():
                logger.warning("STAR lost %s: %s", item.peer.instance_id, item.why)
                for party in (self.sender, self.target, self.host, self.home):
                    party.on_lost(item.peer, item.why)
