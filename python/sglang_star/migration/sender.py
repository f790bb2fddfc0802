"""The sender of a move: reserve, pre-copy while decoding, park, commit, hand over.

A request that is held leaves the batch before its copy has caught up, or before the target has
even answered; what was not copied by then is copied while it does not decode. A move that fails at
any point before ``Inserted`` leaves the request where it was, with its KV untouched, and puts it
back into the batch; the target is told to drop what it holds.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import NoTransport, OrderRefused, PeerError
from sglang_star.faults import Faults
from sglang_star.migration.cargo import Cargo
from sglang_star.migration.home import Home
from sglang_star.migration.movable import check
from sglang_star.migration.outgoing import Outgoing, reservation
from sglang_star.migration.pace import Pace
from sglang_star.migration.post import Post
from sglang_star.migration.precopy import Precopy
from sglang_star.migration.report import MoveLog
from sglang_star.migration.states import Sending, SendingEvent
from sglang_star.migration.transport.choice import Transports
from sglang_star.protocol import (
    Inserted,
    MoveMessage,
    PagesTaken,
    Peer,
    Refused,
    Release,
    Reserved,
    TokenChunk,
)
from sglang_star.star_request import star_of

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class Sender:
    """All outgoing moves of this instance.

    Attributes:
        moves: by migration id.
    """

    def __init__(
        self,
        engine: Engine,
        post: Post,
        home: Home,
        log: MoveLog,
        config: StarConfig,
        fingerprint: str,
        moved_on: Callable[[str], None],
        transports: Transports,
    ) -> None:
        self.moves: dict[str, Outgoing] = {}
        self._engine = engine
        self._post = post
        self._home = home
        self._log = log
        self._config = config
        self._fingerprint = fingerprint
        self._moved_on = moved_on
        self._transports = transports
        self._cargo = Cargo(engine, post, config)
        self._precopy = Precopy(config)
        self._pace = Pace(config.copy_bytes_per_step, config.copy_bytes_per_s)

    # ------------------------------------------------------------------ orders

    def start(
        self,
        req: Request,
        client_rid: str,
        target: Peer,
        reason: str,
        *,
        step_ms: float,
        guest_of: tuple[str, Peer] | None = None,
        hold_after: int | None = None,
        migration_id: str = "",
    ) -> Outgoing:
        """Begin a move; it goes on by itself at every tick.

        Args:
            req: a running request, our own or a guest.
            client_rid: its name at home.
            target: where to.
            reason: for the report.
            step_ms: the present decode step time, against which the stall is measured.
            guest_of: (stream id, home) if the request is a guest here.
            hold_after: take the request out of the batch after so many further tokens, whether
                its copy has caught up or not; 0 at once, None never.
            migration_id: of the move; a new one if empty.

        Raises:
            OrderRefused: it cannot start; the request is untouched.
        """
        if target.instance_id == self._post.peer.instance_id:
            raise OrderRefused(
                f"{req.rid} already runs on {target.instance_id}", hint="name another instance"
            )
        if any(move.req is req for move in self.moves.values()):
            raise OrderRefused(f"{req.rid} is already moving", hint="wait until that move ends")
        check(self._engine, req)
        if len(self.moves) >= self._config.max_moves:
            raise OrderRefused(
                f"{len(self.moves)} moves are under way from here, the most allowed",
                hint="retry later, or raise --star-max-moves",
            )
        self._check_way(req, target, step_ms, hold_after)
        described = self._engine.describe(req)
        offers = self._transports.offers()
        stream_id, home = guest_of or (self._engine.new_id(), self._post.peer)
        move = Outgoing(
            migration_id=migration_id or self._engine.new_id(),
            stream_id=stream_id,
            req=req,
            client_rid=client_rid,
            source=self._post.peer,
            home=home,
            target=target,
            reason=reason,
            token_bytes=self._engine.token_bytes,
            step_ms=step_ms,
            deadline=self._engine.now() + self._config.move_deadline_s,
            started_at=self._engine.wall(),
            hold_at=None if hold_after is None else len(req.output_ids) + hold_after,
        )
        self.moves[move.migration_id] = move
        self._log.clock(req)
        self._send(
            reservation(self._engine, move, described, offers, self._fingerprint),
            move,
        )
        if move.held:
            self._park(move)
        return move

    # ------------------------------------------------------------------ tick

    def step(self, faults: Faults) -> None:
        """Advance every move by at most the copy budget; called between decode steps."""
        self._cargo.drain()
        now = self._engine.now()
        self._precopy.look(self.moves.values(), now)
        budget = self._pace.allowed(now)
        # Those whose clients wait come first.
        for move in sorted(self.moves.values(), key=lambda move: not move.off_batch):
            with faults.contained("a move", partial(self.abandon, move, "a defect at its source")):
                copied = self._step(move, budget)
                self._pace.took(copied)
                budget -= copied
        self._precopy.leave(self.moves.values())

    def _step(self, move: Outgoing, budget: int) -> int:
        """Take one move as far as it goes now; return how many bytes are copied."""
        state = move.machine.state
        if move.req.finished():
            self._finished(move)
        elif state is Sending.RESUMING:
            self._resume(move)
        elif self._engine.now() > move.deadline:
            self.cancel(move, "failed", "deadline passed")
        elif not move.off_batch and not self._engine.is_running(move.req):
            self.cancel(move, "cancelled", "the request was retracted")
        elif not move.off_batch and self._engine.is_ending(move.req):
            self.cancel(move, "cancelled", "the request is about to end")
        else:
            try:
                return self._advance(move, budget)
            except PeerError as error:
                self.cancel(move, "failed", error.message)
        return 0

    def _advance(self, move: Outgoing, budget: int) -> int:
        """Copy, park and commit as far as it goes now; return how many bytes are copied.

        Raises:
            PeerError: something could not be copied into its slot.
        """
        copied = 0
        self._cargo.announce(move)
        now, others = self._engine.now(), self.moves.values()
        if move.machine.state is Sending.COPYING:
            if not self._precopy.yields(move, others, now):
                copied = self._load(move, budget)
            move.precopied = move.sent
            if self._cargo.nearly_all(move) and self._precopy.may_park(move, others, now):
                self._park(move)
            elif why := self._hopeless(move):
                raise PeerError(why)
        if move.held and not move.off_batch:
            self._park(move)
        if move.machine.state is Sending.PARKED:
            copied += self._load(move, budget - copied)
            self._cargo.seal(move)
        return copied

    def _check_way(
        self, req: Request, target: Peer, step_ms: float, hold_after: int | None
    ) -> None:
        """Whether the copy can be there in time, by what is known of the way.

        Raises:
            OrderRefused: it cannot.
        """
        size = self._engine.token_bytes
        made = size / (step_ms / 1e3) if step_ms and hold_after is None else 0.0
        missing = self._engine.tokens(req) * size
        seconds = self._config.move_deadline_s
        if why := self._precopy.refusal(target, missing, made, seconds, self._engine.now()):
            raise OrderRefused(
                f"{req.rid} cannot move to {target.instance_id}: {why}",
                hint="move shorter requests over this link, or raise --star-move-deadline-s",
            )

    def _hopeless(self, move: Outgoing) -> str:
        """Why a move that is under way cannot come to its end in time; empty if it can."""
        now, written = self._engine.now(), self._engine.written(move.req)
        since, before = move.copied_from
        made = 0.0
        if move.hold_at is None and now > since:
            made = (written - before) * move.token_bytes / (now - since)
        missing = (written - move.sent) * move.token_bytes + move.ahead
        return self._precopy.refusal(move.target, missing, made, move.deadline - now, now)

    def _load(self, move: Outgoing, budget: int) -> int:
        sizes = self._precopy.sizes(move, self.moves.values())
        loaded = self._cargo.load(move, budget, sizes)
        self._cargo.announce(move)
        return loaded

    def _park(self, move: Outgoing) -> None:
        """Take the request out of the batch; its step in flight still counts."""
        move.machine.fire(SendingEvent.PARK)
        self._engine.park(move.req)

    # ------------------------------------------------------------------ answers

    def on_reserved(self, message: Reserved) -> None:
        """The target holds a place for the request and has chosen a transport."""
        move = self.moves.get(message.migration_id)
        if move is None or not move.machine.allows(SendingEvent.RESERVED):
            return
        try:
            move.region = self._transports.region(message.transport)
        except PeerError as error:
            self.cancel(move, "failed", error.message)
            return
        move.machine.fire(SendingEvent.RESERVED)
        move.copied_from = self._engine.now(), self._engine.written(move.req)
        move.transport, move.transport_reason = message.transport, message.reason
        logger.info("STAR: KV of %s goes by %s", move.client_rid, message.reason)

    def on_taken(self, message: PagesTaken) -> None:
        """The target has emptied a slot."""
        move = self.moves.get(message.migration_id)
        # A late copy of an earlier answer does not free a slot that was filled again since.
        if move is not None and (piece := move.filled.pop(message.stamp, None)) is not None:
            piece.region.give(piece.grant)
            self._precopy.took(move.target, (piece.end - piece.start) * move.token_bytes)

    def on_refused(self, message: Refused) -> None:
        """The target holds nothing: the request goes on here."""
        move = self.moves.get(message.migration_id)
        if message.error_type == NoTransport.__name__:
            self._transports.start()
        if move is not None and move.machine.allows(SendingEvent.CANCEL):
            detail = f"{message.error_type}: {message.message}"
            self.cancel(move, "refused", detail, tell=False)

    def on_inserted(self, message: Inserted) -> None:
        """The request decodes at the target: give its KV back, keep a shadow if it is ours."""
        move = self.moves.get(message.migration_id)
        if move is None or move.machine.state is not Sending.COMMITTED:
            return
        del self.moves[move.migration_id]
        self._engine.release(move.req, keep_prefix=True)
        self._cargo.unload(move)
        move.machine.fire(SendingEvent.INSERTED)
        if move.home == self._post.peer:
            self._home.lend(move.req, message)
        else:
            self._moved_on(move.stream_id)

    def proven(self, message: MoveMessage | TokenChunk) -> None:
        """Take a later move's message for the ``Inserted`` of ours that is still on its way.

        A target that hands the request on at once, and the host after it, may be heard sooner
        than the target itself.
        """
        for move in list(self.moves.values()):
            if (
                message.stream_id == move.stream_id
                and message.migration_id != move.migration_id
                and move.home == self._post.peer
                and move.machine.state is Sending.COMMITTED
            ):
                self.on_inserted(
                    Inserted(
                        route=move.route,
                        host=move.target,
                        home=move.home,
                        facts=move.facts(),
                        moves=star_of(move.req).moves + 1,
                    )
                )

    def on_lost(self, peer: Peer, why: str) -> None:
        """A target is gone: its moves end, the requests go on here."""
        self._precopy.forget(peer)
        for move in [m for m in self.moves.values() if m.target == peer]:
            if move.machine.allows(SendingEvent.CANCEL):
                # It may be slow and not dead: then it need not keep the place it has for us.
                self.cancel(move, "failed", f"target {peer.instance_id}: {why}")

    # ------------------------------------------------------------------ endings

    def cancel(self, move: Outgoing, outcome: str, detail: str, *, tell: bool = True) -> None:
        """End a move; the request goes on decoding here, from the next step boundary at the latest.

        Raises:
            IllegalTransition: the move has ended already.
        """
        move.machine.fire(SendingEvent.CANCEL)
        resuming = move.machine.state is Sending.RESUMING
        if not resuming:
            del self.moves[move.migration_id]
        self._close(move, outcome, detail, tell=tell)
        if resuming:
            self._resume(move)

    def make_way(self) -> None:
        """The engine is about to give all KV back and compute it again: so for those that move."""
        for move in list(self.moves.values()):
            if move.machine.allows(SendingEvent.CANCEL):
                self.cancel(move, "cancelled", "the engine is paused and computes all KV again")

    def recompute(self) -> None:
        """It has done so. What could not be put back in time has KV that it did not know of."""
        for move in list(self.moves.values()):
            if move.machine.state is Sending.RESUMING and not move.req.finished():
                move.machine.fire(SendingEvent.RESUME)
                del self.moves[move.migration_id]
                self._engine.release(move.req, keep_prefix=False)
                self._engine.requeue(move.req)

    def abandon(self, move: Outgoing, detail: str) -> None:
        """End a move after a defect, unless it is ending already; the request goes on here."""
        if move.migration_id in self.moves and move.machine.allows(SendingEvent.CANCEL):
            self.cancel(move, "failed", detail)

    @property
    def busy(self) -> bool:
        """Whether there is something to do at the next step boundary."""
        return bool(self.moves or self._cargo.draining)

    def abort(self, move: Outgoing, detail: str) -> None:
        """End a move whose request is off the batch and aborted; the caller ends the request."""
        self._end(move, SendingEvent.ABORT, detail)
        self._engine.release(move.req, keep_prefix=True)

    def _finished(self, move: Outgoing) -> None:
        """The request ended here, with the step that was in flight or while it decoded."""
        self._end(move, SendingEvent.FINISH, "the request finished first")

    def _end(self, move: Outgoing, event: SendingEvent, detail: str) -> None:
        """Its request is over; of a move that was cancelled before, that was told then."""
        told = move.machine.state is Sending.RESUMING
        move.machine.fire(event)
        del self.moves[move.migration_id]
        if not told:
            self._close(move, "cancelled", detail)

    def _resume(self, move: Outgoing) -> None:
        """Put the request back into the batch, unless its last step's result is still to come."""
        if self._engine.is_settled(move.req):
            move.machine.fire(SendingEvent.RESUME)
            del self.moves[move.migration_id]
            self._engine.unpark(move.req)

    def _close(self, move: Outgoing, outcome: str, detail: str, *, tell: bool = True) -> None:
        """Tell target and log how the move ended."""
        self._cargo.unload(move)
        if tell:
            self._send(Release(route=move.route, reason=detail), move)
        context = self._engine.tokens(move.req)
        self._log.add(move.failed(outcome, detail, context, self._engine.wall()))
        logger.info("STAR: move of %s %s: %s", move.client_rid, outcome, detail)

    # ------------------------------------------------------------------ small things

    def _send(self, message: MoveMessage, move: Outgoing) -> None:
        self._post.send(move.target, message)
