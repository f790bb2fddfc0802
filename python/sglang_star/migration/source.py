"""The sending side of a move: reserve, pre-copy while decoding, park, commit, hand over.

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
from sglang_star.errors import NotMovable, OrderRefused, PeerError
from sglang_star.faults import Faults
from sglang_star.migration.cargo import Cargo
from sglang_star.migration.move import SLOTS, Move
from sglang_star.migration.post import Post
from sglang_star.migration.relay import MOVES, Relay, Shadow
from sglang_star.migration.report import MoveLog
from sglang_star.migration.states import Home, HomeEvent
from sglang_star.migration.transport import carrier as carrier_named
from sglang_star.protocol import (
    Inserted,
    MigrationMessage,
    PagesTaken,
    Peer,
    Refused,
    Release,
    Reserve,
    Reserved,
)

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

SLOT_BYTES = 16 << 20
MIN_OUTPUT_TOKENS = 2
"""A request moves only once it decodes steadily: SGLang's overlap treats the first steps apart."""


class Source:
    """All outgoing moves of this instance.

    Attributes:
        moves: by migration id.
    """

    def __init__(
        self,
        engine: Engine,
        post: Post,
        relay: Relay,
        log: MoveLog,
        config: StarConfig,
        fingerprint: str,
        handed_over: Callable[[str], None],
    ) -> None:
        self.moves: dict[str, Move] = {}
        self._engine = engine
        self._post = post
        self._relay = relay
        self._log = log
        self._config = config
        self._fingerprint = fingerprint
        self._handed_over = handed_over
        self._streams = 0
        self._cargo = Cargo(engine, post)

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
    ) -> Move:
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
        self._check(req, target)
        # Before anything is opened: a request that cannot be described leaves nothing behind.
        request, prompt = self._engine.describe(req)
        slot_tokens = self._slot_tokens()
        try:
            carrier = carrier_named(self._config.transport).send(
                SLOTS, slot_tokens * self._engine.token_bytes
            )
        except PeerError as error:
            raise OrderRefused(error.message, hint=error.hint) from error
        stream_id, home = guest_of or (self._new_stream(), self._post.peer)
        move = Move(
            migration_id=migration_id or self._engine.new_id(),
            stream_id=stream_id,
            req=req,
            client_rid=client_rid,
            source=self._post.peer,
            home=home,
            target=target,
            reason=reason,
            carrier=carrier,
            slot_tokens=slot_tokens,
            token_bytes=self._engine.token_bytes,
            step_ms=step_ms,
            deadline=self._engine.now() + self._config.move_deadline_s,
            started_at=self._engine.wall(),
            hold_at=None if hold_after is None else len(req.output_ids) + hold_after,
        )
        self.moves[move.migration_id] = move
        move.machine.fire(HomeEvent.ORDER)
        self._log.clock(req)
        self._send(
            Reserve(
                **move.address,
                source=self._post.peer,
                home=home,
                fingerprint=self._fingerprint,
                client_rid=client_rid,
                request=request,
                prompt_ids=prompt,
                context_tokens=self._engine.tokens(req),
                max_new_tokens=self._engine.max_new_tokens(req),
                moves=getattr(req, MOVES, 0),
                reason=reason,
                transport=self._config.transport,
                transport_setup=carrier.setup,
            ),
            move,
        )
        if move.held:
            self._park(move)
        return move

    def _check(self, req: Request, target: Peer) -> None:
        if target.instance_id == self._post.peer.instance_id:
            raise OrderRefused(
                f"{req.rid} already runs on {target.instance_id}", hint="name another instance"
            )
        if self._engine.unsupported:
            raise NotMovable(self._engine.unsupported)
        why = self._engine.pinned(req)
        if why:
            raise NotMovable(f"{req.rid} cannot move: it uses {why}")
        if any(move.req is req for move in self.moves.values()):
            raise OrderRefused(f"{req.rid} is already moving", hint="wait until that move ends")
        if self._engine.is_ending(req):
            raise OrderRefused(f"{req.rid} is about to end")
        if not self._engine.is_running(req) or len(req.output_ids) < MIN_OUTPUT_TOKENS:
            raise OrderRefused(
                f"{req.rid} is not decoding steadily yet", hint="retry in a few steps"
            )
        if len(self.moves) >= self._config.max_moves:
            raise OrderRefused(
                f"{len(self.moves)} moves are under way from here, the most allowed",
                hint="retry later, or raise --star-max-moves",
            )

    # ------------------------------------------------------------------ tick

    def step(self, faults: Faults) -> None:
        """Advance every move by at most the copy budget; called between decode steps."""
        budget = self._config.copy_tokens_per_step
        # Those whose clients wait come first.
        for move in sorted(self.moves.values(), key=lambda move: not move.off_batch):
            with faults.contained("a move", partial(self.abandon, move, "a defect at its source")):
                budget -= self._step(move, budget)

    def _step(self, move: Move, budget: int) -> int:
        """Take one move as far as it goes now; return how many tokens were copied."""
        state = move.machine.state
        if move.req.finished():
            self._finished(move)
        elif state is Home.RESUMING:
            self._resume(move)
        elif self._engine.now() > move.deadline:
            self.cancel(move, "failed", "deadline passed")
        elif not move.off_batch and not self._engine.is_running(move.req):
            self.cancel(move, "cancelled", "the request was retracted")
        elif not move.off_batch and self._engine.is_ending(move.req):
            self.cancel(move, "cancelled", "the request is about to end")
        else:
            return self._advance(move, budget)
        return 0

    def _advance(self, move: Move, budget: int) -> int:
        """Copy, park and commit as far as it goes now; return how many tokens were copied."""
        copied = 0
        if move.machine.state is Home.COPYING:
            copied = self._cargo.load(move, budget)
            move.precopied = move.sent
            if self._cargo.nearly_all(move) and len(move.free_slots) >= SLOTS - 1:
                self._park(move)
        if move.held and not move.off_batch:
            self._park(move)
        if move.machine.state is Home.PARKED:
            copied += self._cargo.load(move, budget - copied)
            self._cargo.seal(move)
        return copied

    def _park(self, move: Move) -> None:
        """Take the request out of the batch; its step in flight still counts."""
        move.machine.fire(HomeEvent.PARK)
        self._engine.park(move.req)

    # ------------------------------------------------------------------ answers

    def on_reserved(self, message: Reserved) -> None:
        """The target holds a slot and has the carrier open."""
        move = self.moves.get(message.migration_id)
        if move is not None and move.machine.allows(HomeEvent.RESERVED):
            move.machine.fire(HomeEvent.RESERVED)
            move.carrier.connected()

    def on_taken(self, message: PagesTaken) -> None:
        """The target has emptied a slot."""
        move = self.moves.get(message.migration_id)
        # A late copy of an earlier answer does not free a slot that was filled again since.
        if move is not None and move.filled.get(message.slot) == message.end:
            del move.filled[message.slot]
            move.free_slots.append(message.slot)

    def on_refused(self, message: Refused) -> None:
        """The target holds nothing: the request goes on here."""
        move = self.moves.get(message.migration_id)
        if move is not None and move.machine.allows(HomeEvent.CANCEL):
            detail = f"{message.error_type}: {message.message}"
            self.cancel(move, "refused", detail, tell=False)

    def on_inserted(self, message: Inserted) -> None:
        """The request decodes at the target: give its KV back, keep a shadow if it is ours."""
        move = self.moves.get(message.migration_id)
        if move is None or move.machine.state is not Home.COMMITTED:
            return
        del self.moves[move.migration_id]
        self._engine.release(move.req, keep_prefix=True)
        move.carrier.close()
        if move.home == self._post.peer:
            move.machine.fire(HomeEvent.INSERTED_OWN)
            self._relay.adopt(
                Shadow(
                    req=move.req,
                    stream_id=move.stream_id,
                    migration_id=move.migration_id,
                    host=move.target,
                    machine=move.machine,
                    confirmed_at=self._engine.now(),
                ),
                message,
            )
        else:
            move.machine.fire(HomeEvent.INSERTED_GUEST)
            self._handed_over(move.stream_id)

    def proven(self, message: MigrationMessage) -> None:
        """Take a later move's message for the ``Inserted`` of ours that is still on its way.

        A target that hands the request on at once, and the host after it, may be heard sooner
        than the target itself.
        """
        for move in list(self.moves.values()):
            if (
                message.stream_id == move.stream_id
                and message.migration_id != move.migration_id
                and move.home == self._post.peer
                and move.machine.state is Home.COMMITTED
            ):
                self.on_inserted(
                    Inserted(
                        **move.address,
                        host=move.target,
                        facts=move.facts(),
                        moves=getattr(move.req, MOVES, 0) + 1,
                    )
                )

    def on_lost(self, peer: Peer, why: str) -> None:
        """A target is gone: its moves end, the requests go on here."""
        for move in [m for m in self.moves.values() if m.target == peer]:
            if move.machine.allows(HomeEvent.CANCEL):
                # It may be slow and not dead: then it need not keep the place it has for us.
                self.cancel(move, "failed", f"target {peer.instance_id}: {why}")

    # ------------------------------------------------------------------ endings

    def cancel(self, move: Move, outcome: str, detail: str, *, tell: bool = True) -> None:
        """End a move; the request goes on decoding here, from the next step boundary at the latest.

        Raises:
            IllegalTransition: the move has ended already.
        """
        move.machine.fire(HomeEvent.CANCEL)
        resuming = move.machine.state is Home.RESUMING
        if not resuming:
            del self.moves[move.migration_id]
        self._close(move, outcome, detail, tell=tell)
        if resuming:
            self._resume(move)

    def abandon(self, move: Move, detail: str) -> None:
        """End a move after a defect, unless it is ending already; the request goes on here."""
        if move.migration_id in self.moves and move.machine.allows(HomeEvent.CANCEL):
            self.cancel(move, "failed", detail)

    def abort(self, move: Move, detail: str) -> None:
        """End a move whose request is off the batch and aborted; the caller ends the request."""
        closed = move.machine.state is Home.RESUMING
        move.machine.fire(HomeEvent.ABORT)
        del self.moves[move.migration_id]
        if not closed:
            self._close(move, "cancelled", detail)
        self._engine.release(move.req, keep_prefix=True)

    def _finished(self, move: Move) -> None:
        """The request ended here, with the step that was in flight or while it decoded."""
        closed = move.machine.state is Home.RESUMING
        move.machine.fire(HomeEvent.FINISH)
        del self.moves[move.migration_id]
        if not closed:
            self._close(move, "cancelled", "the request finished first")

    def _resume(self, move: Move) -> None:
        """Put the request back into the batch, unless its last step's result is still to come."""
        if self._engine.is_settled(move.req):
            move.machine.fire(HomeEvent.RESUME)
            del self.moves[move.migration_id]
            self._engine.unpark(move.req)

    def _close(self, move: Move, outcome: str, detail: str, *, tell: bool = True) -> None:
        """Tell target and log how the move ended."""
        move.carrier.close()
        if tell:
            self._send(Release(**move.address, reason=detail), move)
        context = self._engine.tokens(move.req)
        self._log.add(move.failed(outcome, detail, context, self._engine.wall()))
        logger.info("STAR: move of %s %s: %s", move.client_rid, outcome, detail)

    # ------------------------------------------------------------------ small things

    def _slot_tokens(self) -> int:
        page = self._engine.page_size
        fits = SLOT_BYTES // self._engine.token_bytes
        tokens = min(self._config.copy_tokens_per_step, max(fits, 1))
        return max(page, tokens // page * page)

    def _new_stream(self) -> str:
        self._streams += 1
        peer = self._post.peer
        return f"{peer.instance_id}/{peer.incarnation}/{self._streams}"

    def _send(self, message: MigrationMessage, move: Move) -> None:
        self._post.send(move.target, message)
