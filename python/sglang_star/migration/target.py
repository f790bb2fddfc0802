"""The target of a move: reserve, receive, insert.

What comes is a request of another home, which becomes a guest of this host, or one of ours that
comes home, whose request is its shadow's.
"""

from __future__ import annotations

import logging
from functools import partial

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import OrderRefused, PeerError, StarError
from sglang_star.faults import Faults
from sglang_star.migration import admission
from sglang_star.migration.home import Home
from sglang_star.migration.host import Guest, Host
from sglang_star.migration.incoming import Homecoming, Incoming, Newcomer
from sglang_star.migration.piece import Fetched
from sglang_star.migration.post import Post
from sglang_star.migration.states import ReceivingEvent
from sglang_star.migration.transport.base import Grant
from sglang_star.migration.transport.choice import Transports
from sglang_star.protocol import (
    Commit,
    Inserted,
    MoveMessage,
    PagesReady,
    PagesTaken,
    Parked,
    Peer,
    Refused,
    Release,
    Reserve,
    Reserved,
    Route,
)
from sglang_star.star_request import star_of

logger = logging.getLogger(__name__)

GUEST_PREFIX = "star-guest-"
"""Of the rids of guests; abort matches by prefix, so what follows is unique in itself."""


class Target:
    """Moves that come here, until their request decodes.

    Attributes:
        moves: by stream id.
        draining: take no more.
    """

    def __init__(
        self,
        engine: Engine,
        post: Post,
        home: Home,
        host: Host,
        config: StarConfig,
        fingerprint: str,
        transports: Transports,
    ) -> None:
        self.moves: dict[str, Incoming] = {}
        self.draining = False
        self._by_rid: dict[str, Incoming] = {}
        self._rebuilding: set[str] = set()
        self._giving_way = False
        self._engine = engine
        self._post = post
        self._home = home
        self._host = host
        self._config = config
        self._fingerprint = fingerprint
        self._transports = transports
        self._budget = 0

    # ------------------------------------------------------------------ reserve

    def on_reserve(self, message: Reserve) -> None:
        """Answer ``Reserved`` or ``Refused``."""
        try:
            move = self._admit(message)
        except StarError as error:
            self._answer_refused(message, error)
            return
        self.moves[move.stream_id] = self._by_rid[move.rid] = move
        try:
            match move:
                case Homecoming():
                    move.req = move.shadow.req
                    self._seat(move, move.req)
                case Newcomer():
                    self._rebuild(move)
        except StarError as error:
            self.refuse(move, error)

    def _admit(self, message: Reserve) -> Incoming:
        if message.stream_id in self.moves or message.stream_id in self._host.by_stream:
            raise OrderRefused("this stream is already here")
        self._giving_way &= self._engine.is_paused()
        if self._giving_way:
            raise OrderRefused("this instance is paused and computes all KV again")
        if self.draining:
            raise OrderRefused("this instance is draining")
        if len(self.moves) + len(self._host.by_stream) >= self._config.max_guests:
            raise OrderRefused("as many guests as --star-max-guests allows are here")
        admission.check_kind(self._engine, message, self._fingerprint)
        admission.check_room(self._engine, message, [m.reserve for m in self.moves.values()])
        choose = partial(self._transports.choose, message.offers, message.source)
        deadline = self._engine.now() + self._config.move_deadline_s
        if message.home != self._post.peer:
            rid = GUEST_PREFIX + self._engine.new_id()
            return Newcomer(reserve=message, rid=rid, way=choose(), deadline=deadline)
        shadow = self._home.shadows.get(message.stream_id)
        if shadow is None:
            raise OrderRefused("the stream has ended at home")
        return Homecoming(
            reserve=message,
            rid=shadow.req.rid,
            way=choose(),
            deadline=deadline,
            shadow=shadow,
        )

    def _rebuild(self, move: Newcomer) -> None:
        self._rebuilding.add(move.rid)
        try:
            self._engine.rebuild(move.reserve.request, move.reserve.prompt_ids, move.rid)
        finally:
            if not self._engine.compiles(move.rid):
                self._rebuilding.discard(move.rid)
        if move.req is None and move.rid not in self._rebuilding:
            raise OrderRefused("the target's SGLang does not accept the request")

    def rebuilt(self, req: Request) -> bool:
        """The engine is about to queue ``req``; keep it if we asked for it.

        Returns:
            False if we did not, so that it is queued as usual.
        """
        if req.rid not in self._rebuilding:
            return False
        self._rebuilding.discard(req.rid)
        star_of(req).guest = True
        move = self._by_rid.get(req.rid)
        if move is None:
            return True  # its move was cancelled while its grammar compiled: it is nobody's
        move.req = req
        if refusal := self._engine.refusal(req):
            self.refuse(move, OrderRefused(refusal))
            return True
        try:
            self._seat(move, req)
        except StarError as error:
            self.refuse(move, error)
        return True

    def _seat(self, move: Incoming, req: Request) -> None:
        # A guest has the limit that its home gave it; what comes home has had it from the start.
        own = isinstance(move, Homecoming)
        limit = self._engine.max_new_tokens(req) if own else move.reserve.max_new_tokens
        if not self._engine.seat(req, limit):
            raise OrderRefused("no request slot is free")
        move.machine.fire(ReceivingEvent.SEAT)
        source = move.reserve.source
        way = move.way
        self._post.send(
            source, Reserved(route=move.route(source), transport=way.name, reason=way.why)
        )

    # ------------------------------------------------------------------ receive

    def on_pages(self, message: PagesReady) -> None:
        """A slot can be read."""
        move = self._of(message.route)
        if move is None or not move.machine.allows(ReceivingEvent.PAGES) or move.req is None:
            return
        move.machine.fire(ReceivingEvent.PAGES)
        move.announced.append(message)
        self._receive(move)

    def _receive(self, move: Incoming) -> None:
        """Begin to copy what was announced, within this step's budget."""
        # One whose client waits waits for no budget.
        wanted = move.commit is not None or move.due > self._engine.now()
        while move.announced and (self._budget > 0 or wanted):
            message = move.announced.popleft()
            size = (message.end - message.start) * self._engine.token_bytes
            self._budget -= size
            try:
                self._begin(move, message, size)
            except StarError as error:
                self.refuse(move, error)
                return
        self._unload(move)

    def _begin(self, move: Incoming, message: PagesReady, size: int) -> None:
        """Begin to copy one slot into KV of our own.

        Raises:
            StarError: it cannot be.
        """
        req = move.req
        assert req is not None, "pages came for a request that is not there"
        if message.start != self._engine.held(req) or message.end <= message.start:
            raise OrderRefused("KV arrived out of order")
        if not self._engine.extend(req, message.end):
            raise OrderRefused("KV memory is full")
        grant = Grant(message.slot, message.stamp)
        fetch = move.way.reader.fetch(grant, size, message.checksum)
        try:
            ticket = self._engine.scatter(req, message.start, message.end, fetch)
        except Exception:
            fetch.cancel()
            fetch.close()
            raise
        move.unloading.append(Fetched(ticket, message.stamp, fetch))

    def _unload(self, move: Incoming) -> None:
        """Give the source back the slots that are emptied."""
        while move.unloading and self._engine.copied(move.unloading[0].ticket):
            piece = move.unloading.popleft()
            if why := self._engine.failure(piece.ticket):
                self._transports.failed(move.way, why)
                self.refuse(move, PeerError(f"{move.way.name}: {why}"))
                return
            source = move.reserve.source
            self._post.send(source, PagesTaken(route=move.route(source), stamp=piece.stamp))

    def on_parked(self, message: Parked) -> None:
        """The source finishes its last step of a request that comes here."""
        if (move := self._of(message.route)) is not None:
            move.due = self._engine.now() + 2 * message.step_ms / 1e3

    def expecting(self) -> bool:
        """Whether a commit should arrive within about a step."""
        now = self._engine.now()
        return any(move.due > now for move in self.moves.values())

    def poll(self) -> None:
        """A step begins: so much may be copied in it."""
        self._budget = self._config.copy_bytes_per_step
        self._transports.step()

    # ------------------------------------------------------------------ insert

    def on_commit(self, message: Commit) -> None:
        """Everything is here, or will be: insert the request as soon as it may."""
        move = self._of(message.route)
        if move is None or move.commit is not None:
            return
        if not move.machine.allows(ReceivingEvent.COMMIT):
            self.refuse(move, OrderRefused("commit before the pages"))
            return
        move.machine.fire(ReceivingEvent.COMMIT)
        move.commit = message
        self._join(move, message)

    def step(self, faults: Faults) -> None:
        """Insert what had to wait for copies or tokens; drop what has waited too long."""
        now = self._engine.now()
        for move in list(self.moves.values()):
            end = partial(self.refuse, move, OrderRefused("a defect at the target"))
            with faults.contained("an incoming move", end):
                self._receive(move)
                if move.commit is not None and move.stream_id in self.moves:
                    self._join(move, move.commit)
                if now > move.deadline and move.stream_id in self.moves:
                    self.refuse(move, OrderRefused("deadline passed at the target"))

    def _join(self, move: Incoming, commit: Commit) -> None:
        """Insert the request into the running batch: it decodes here from the next step on."""
        if move.announced or move.unloading:
            return  # its KV is not all here yet
        req = move.req
        assert req is not None, "pages came for a request that is not there"
        try:
            admission.check_weights(self._engine, commit.weights)
            match move:
                case Homecoming() if len(req.output_ids) < len(commit.output_ids):
                    return  # the last tokens of an earlier host may come after its successor's
                case Homecoming() if list(req.output_ids) != list(commit.output_ids):
                    raise OrderRefused("home has other tokens of this stream")
                case Newcomer():
                    self._engine.adopt(req, commit.output_ids)
            self._engine.join(req, commit.committed_tokens, commit.penalty_log, commit.predictor)
        except StarError as error:
            self.refuse(move, error)
            return
        move.machine.fire(ReceivingEvent.JOIN)
        self._forget(move)
        self._welcome(move, req, commit)

    def _welcome(self, move: Incoming, req: Request, commit: Commit) -> None:
        """The request decodes here: tell those who have to know."""
        reserve = move.reserve
        moves = reserve.moves + 1
        inserted = partial(
            Inserted,
            host=self._post.peer,
            home=reserve.home,
            facts=commit.facts,
            moves=moves,
        )
        answer = inserted(route=move.route(reserve.source))
        self._post.send(reserve.source, answer)
        star = star_of(req)
        star.arrived, star.moves = len(req.output_ids), moves
        match move:
            case Homecoming():
                self._home.returned(move.shadow, answer)
            case Newcomer():
                self._host.take(
                    Guest(
                        req=req,
                        client_rid=reserve.client_rid,
                        stream_id=move.stream_id,
                        migration_id=move.migration_id,
                        home=reserve.home,
                        base=len(req.output_ids),
                        sent=len(req.output_ids),
                        confirmed_at=self._engine.now(),  # home does not know of us before
                    )
                )
                if reserve.home != reserve.source:
                    self._post.send(reserve.home, inserted(route=move.route(reserve.home)))

    # ------------------------------------------------------------------ endings

    def on_release(self, message: Release) -> None:
        """The source gives the move up, or home the stream."""
        if (move := self._of(message.route)) is not None:
            self._drop(move, message.reason)

    def make_way(self) -> None:
        """The engine is about to give all KV back; it takes none until it goes on."""
        self._giving_way = True
        for move in list(self.moves.values()):
            self.refuse(move, OrderRefused("this instance is paused and computes all KV again"))

    def stay_away(self, stream_id: str, why: str) -> None:
        """A stream of ours is over, or goes on without the host that is sending it home."""
        move = self.moves.get(stream_id)
        if isinstance(move, Homecoming):
            self.refuse(move, OrderRefused(why))

    def aborted(self, rid: str) -> bool:
        """The engine ended a request that it was rebuilding; False if we asked for none."""
        if rid not in self._rebuilding:
            return False
        self._rebuilding.discard(rid)
        if (move := self._by_rid.get(rid)) is not None:
            self.refuse(move, OrderRefused("the target aborted the request"))
        return True

    def on_lost(self, peer: Peer, why: str) -> None:
        """The source of a move, or the home of its stream, is gone."""
        self._transports.forget(peer)
        for move in list(self.moves.values()):
            detail = f"{peer.instance_id}: {why}"
            if move.reserve.source == peer:
                self._drop(move, detail)
            elif move.reserve.home == peer:
                self.refuse(move, PeerError(detail))

    def abandon(self, message: MoveMessage, why: str) -> None:
        """A defect while handling ``message``: end what it is about, if that is a move of ours."""
        if (move := self._of(message.route)) is not None:
            self.refuse(move, OrderRefused(why))
        elif isinstance(message, Reserve):
            self._answer_refused(message, OrderRefused(why))

    def refuse(self, move: Incoming, error: StarError) -> None:
        """Drop a move and tell its source why."""
        self._drop(move, error.message)
        self._answer_refused(move.reserve, error)

    def _answer_refused(self, message: Reserve, error: StarError) -> None:
        route = Route(
            migration_id=message.migration_id,
            stream_id=message.stream_id,
            receiver=message.source.incarnation,
        )
        self._post.send(
            message.source,
            Refused(route=route, error_type=type(error).__name__, message=str(error)),
        )

    def _drop(self, move: Incoming, why: str) -> None:
        logger.info("STAR drops the arriving %s: %s", move.reserve.client_rid, why)
        move.machine.fire(ReceivingEvent.CANCEL)
        for piece in move.unloading:
            piece.fetch.cancel()
        self._forget(move)
        if move.req is not None:
            self._engine.release(move.req, keep_prefix=False, after=move.tickets)
        elif move.rid in self._rebuilding:
            self._engine.abort(move.rid)

    def _forget(self, move: Incoming) -> None:
        del self.moves[move.stream_id]
        del self._by_rid[move.rid]
        self._transports.leave(move.way)

    def _of(self, route: Route) -> Incoming | None:
        """The move that is meant: not an earlier one of the same stream."""
        move = self.moves.get(route.stream_id)
        return move if move is not None and move.migration_id == route.migration_id else None
