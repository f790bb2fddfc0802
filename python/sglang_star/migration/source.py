"""The sending side of a move: reserve, pre-copy while decoding, park, commit, hand over.

A move that fails at any point before ``Inserted`` leaves the request where it was, with its KV
untouched; the target is told to drop what it holds.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import TYPE_CHECKING

from sglang_star.config import StarConfig
from sglang_star.errors import NotMovable, OrderRefused, PeerError
from sglang_star.migration import batch, codec
from sglang_star.migration.links import Links
from sglang_star.migration.move import SLOTS, Move
from sglang_star.migration.pages import KvPages
from sglang_star.migration.penalties import PENALTY_LOG
from sglang_star.migration.relay import MOVES, Relay, Shadow
from sglang_star.migration.report import MoveLog, clock
from sglang_star.migration.states import Home, HomeEvent
from sglang_star.migration.transport import carrier as carrier_named
from sglang_star.predictor.state import export_state
from sglang_star.protocol import (
    Commit,
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
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

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
        scheduler: Scheduler,
        pages: KvPages,
        links: Links,
        relay: Relay,
        log: MoveLog,
        config: StarConfig,
        fingerprint: str,
        handed_over: Callable[[str], None],
    ) -> None:
        self.moves: dict[str, Move] = {}
        self._scheduler = scheduler
        self._pages = pages
        self._links = links
        self._relay = relay
        self._log = log
        self._config = config
        self._fingerprint = fingerprint
        self._handed_over = handed_over
        self._streams = 0

    # ------------------------------------------------------------------ orders

    def start(
        self,
        req: Req,
        client_rid: str,
        target: Peer,
        reason: str,
        *,
        step_ms: float,
        guest_of: tuple[str, Peer] | None = None,
    ) -> Move:
        """Begin a move; it goes on by itself at every tick.

        Args:
            req: a running request, our own or a guest.
            client_rid: its name at home.
            target: where to.
            reason: for the report.
            step_ms: the present decode step time, against which the stall is measured.
            guest_of: (stream id, home) if the request is a guest here.

        Raises:
            OrderRefused: it cannot start; the request is untouched.
        """
        self._check(req, target)
        slot_tokens = self._slot_tokens()
        try:
            carrier = carrier_named(self._config.transport).send(
                SLOTS, slot_tokens * self._pages.token_bytes
            )
        except PeerError as error:
            raise OrderRefused(error.message, hint=error.hint) from error
        stream_id, home = guest_of or (self._new_stream(), self._links.peer)
        move = Move(
            migration_id=uuid.uuid4().hex,
            stream_id=stream_id,
            req=req,
            client_rid=client_rid,
            source=self._links.peer,
            home=home,
            target=target,
            reason=reason,
            carrier=carrier,
            slot_tokens=slot_tokens,
            token_bytes=self._pages.token_bytes,
            step_ms=step_ms,
            deadline=time.monotonic() + self._config.move_deadline_s,
        )
        request, prompt = codec.encode_request(req)
        self.moves[move.migration_id] = move
        move.machine.fire(HomeEvent.ORDER)
        clock(req)
        self._send(
            Reserve(
                **move.address,
                source=self._links.peer,
                home=home,
                fingerprint=self._fingerprint,
                client_rid=client_rid,
                request=request,
                prompt_ids=prompt,
                context_tokens=req.seqlen,
                max_new_tokens=req.sampling_params.max_new_tokens,
                moves=getattr(req, MOVES, 0),
                reason=reason,
                transport=self._config.transport,
                transport_setup=carrier.setup,
            ),
            move,
        )
        return move

    def _check(self, req: Req, target: Peer) -> None:
        if target.instance_id == self._links.peer.instance_id:
            raise OrderRefused(
                f"{req.rid} already runs on {target.instance_id}", hint="name another instance"
            )
        if self._pages.unsupported:
            raise NotMovable(self._pages.unsupported)
        why = codec.pinned(req)
        if why:
            raise NotMovable(f"{req.rid} cannot move: it uses {why}")
        if any(move.req is req for move in self.moves.values()):
            raise OrderRefused(f"{req.rid} is already moving", hint="wait until that move ends")
        if not batch.is_running(self._scheduler, req) or len(req.output_ids) < MIN_OUTPUT_TOKENS:
            raise OrderRefused(
                f"{req.rid} is not decoding steadily yet", hint="retry in a few steps"
            )
        if len(self.moves) >= self._config.max_moves:
            raise OrderRefused(
                f"{len(self.moves)} moves are under way from here, the most allowed",
                hint="retry later, or raise --star-max-moves",
            )

    # ------------------------------------------------------------------ tick

    def step(self) -> None:
        """Advance every move by at most the copy budget; called between decode steps."""
        budget = self._config.copy_tokens_per_step
        for move in list(self.moves.values()):
            if move.req.finished():
                self._end(move, HomeEvent.FINISH, "cancelled", "the request finished first")
            elif time.monotonic() > move.deadline:
                self.cancel(move, "failed", "deadline passed")
            elif move.machine.state in (Home.RESERVING, Home.COPYING) and not batch.is_running(
                self._scheduler, move.req
            ):
                self.cancel(move, "cancelled", "the request was retracted")
            elif move.machine.state is Home.COPYING:
                budget -= self._copy(move, budget)
            if move.machine.state is Home.PARKED and batch.is_settled(move.req):
                self._commit(move)

    def _copy(self, move: Move, budget: int) -> int:
        """Gather whole pages into free slots; park once what is left is small."""
        page = self._pages.page_size
        ready = batch.completed_tokens(move.req) // page * page
        copied = 0
        while move.free_slots and move.sent < ready and copied < budget:
            end = min(ready, move.sent + move.slot_tokens)
            copied += end - move.sent
            self._ship(move, end)
        move.precopied = move.sent
        if ready - move.sent < max(page, 2) and len(move.free_slots) >= SLOTS - 1:
            move.machine.fire(HomeEvent.PARK)
            batch.park(self._scheduler, move.req)
            self._send(Parked(**move.address, step_ms=move.step_ms), move)
        return copied

    def _ship(self, move: Move, end: int) -> None:
        slot = move.free_slots.pop()
        self._pages.gather(move.req, move.sent, end, move.carrier.slot(slot))
        self._send(PagesReady(**move.address, start=move.sent, end=end, slot=slot), move)
        move.sent = end

    def _commit(self, move: Move) -> None:
        """Send the tail and the state; from here the target decides."""
        req = move.req
        length = batch.completed_tokens(req)
        if move.sent < length:
            if not move.free_slots:
                return
            self._ship(move, length)
        move.machine.fire(HomeEvent.COMMIT)
        self._send(
            Commit(
                **move.address,
                committed_tokens=length,
                output_ids=tuple(req.output_ids),
                penalty_log=tuple(getattr(req, PENALTY_LOG, ())),
                predictor=export_state(req),
                facts=move.facts(),
            ),
            move,
        )

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
        if move is not None and message.slot not in move.free_slots and 0 <= message.slot < SLOTS:
            move.free_slots.append(message.slot)

    def on_refused(self, message: Refused) -> None:
        """The target holds nothing: the request goes on here."""
        move = self.moves.get(message.migration_id)
        if move is not None:
            detail = f"{message.error_type}: {message.message}"
            self.cancel(move, "refused", detail, tell=False)

    def on_inserted(self, message: Inserted) -> None:
        """The request decodes at the target: give its KV back, keep a shadow if it is ours."""
        move = self.moves.get(message.migration_id)
        if move is None or move.machine.state is not Home.COMMITTED:
            return
        del self.moves[move.migration_id]
        self._pages.release(move.req, keep_prefix=True)
        move.carrier.close()
        if move.home == self._links.peer:
            move.machine.fire(HomeEvent.INSERTED_OWN)
            self._relay.adopt(
                Shadow(
                    req=move.req,
                    stream_id=move.stream_id,
                    migration_id=move.migration_id,
                    host=move.target,
                    machine=move.machine,
                    confirmed_at=time.monotonic(),
                ),
                message.facts,
            )
        else:
            move.machine.fire(HomeEvent.INSERTED_GUEST)
            self._handed_over(move.stream_id)

    def on_lost(self, peer: Peer, why: str) -> None:
        """A target is gone: its moves end, the requests go on here."""
        for move in [m for m in self.moves.values() if m.target == peer]:
            self.cancel(move, "failed", f"target {peer.instance_id}: {why}", tell=False)

    # ------------------------------------------------------------------ endings

    def cancel(self, move: Move, outcome: str, detail: str, *, tell: bool = True) -> None:
        """End a move; the request goes on decoding here."""
        off_batch = move.off_batch
        self._end(move, HomeEvent.CANCEL, outcome, detail, tell=tell)
        if off_batch:
            batch.unpark(self._scheduler, move.req, getattr(move.req, PENALTY_LOG, ()))

    def abort(self, move: Move, detail: str) -> None:
        """End a move whose request is off the batch and aborted; the caller ends the request."""
        self._end(move, HomeEvent.ABORT, "cancelled", detail)
        self._pages.release(move.req, keep_prefix=True)

    def _end(
        self, move: Move, event: HomeEvent, outcome: str, detail: str, *, tell: bool = True
    ) -> None:
        move.machine.fire(event)
        del self.moves[move.migration_id]
        move.carrier.close()
        if tell:
            self._send(Release(**move.address, reason=detail), move)
        self._log.add(move.failed(outcome, detail))
        logger.info("STAR: move of %s %s: %s", move.client_rid, outcome, detail)

    # ------------------------------------------------------------------ small things

    def _slot_tokens(self) -> int:
        page = self._pages.page_size
        fits = SLOT_BYTES // self._pages.token_bytes
        tokens = min(self._config.copy_tokens_per_step, max(fits, 1))
        return max(page, tokens // page * page)

    def _new_stream(self) -> str:
        self._streams += 1
        peer = self._links.peer
        return f"{peer.instance_id}/{peer.incarnation}/{self._streams}"

    def _send(self, message: MigrationMessage, move: Move) -> None:
        self._links.send(move.target, message)
