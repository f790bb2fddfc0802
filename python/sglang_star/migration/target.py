"""The receiving side of a move: reserve, receive, insert, and send the tokens home.

A guest is an ordinary SGLang request under a rid of its own; only its output takes another path.
"""

from __future__ import annotations

import logging
import time
import uuid
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from sglang.srt.managers.io_struct import AbortReq

from sglang_star.config import StarConfig
from sglang_star.errors import OrderRefused, StarError
from sglang_star.migration import batch, codec
from sglang_star.migration.links import Links
from sglang_star.migration.pages import KvPages
from sglang_star.migration.relay import ESTIMATE, MOVES, Relay
from sglang_star.migration.states import Machine, Target, TargetEvent, target_machine
from sglang_star.migration.transport import carrier as carrier_named
from sglang_star.migration.transport.base import Carrier
from sglang_star.predictor.state import import_state
from sglang_star.protocol import (
    Commit,
    Inserted,
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

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

GUEST_PREFIX = "star-guest-"
"""Of rids; abort matches by prefix, so what follows is unique in itself."""

HEADROOM_TOKENS = 64
"""Free KV a target keeps beyond a guest's context, so that it can decode at all."""


@dataclass(slots=True)
class Guest:
    """A request of another home.

    Attributes:
        req: None until SGLang has rebuilt it (a grammar may still compile).
        base: output tokens it came with; sent: output tokens its home has or was sent.
        comes_home: the home is this instance: ``req`` is its shadow's request.
        confirmed_at: when home last said that it wants the stream.
        due: until when its commit is expected any moment, monotonic seconds.
    """

    reserve: Reserve
    rid: str
    carrier: Carrier
    deadline: float
    confirmed_at: float
    comes_home: bool = False
    machine: Machine[Target, TargetEvent] | None = None
    req: Req | None = None
    base: int = 0
    sent: int = 0
    muted: bool = False
    due: float = 0.0

    @property
    def arriving(self) -> bool:
        """Whether it is not decoding here yet."""
        return self.machine is None or self.machine.state in (Target.RESERVED, Target.RECEIVING)


class Guests:
    """All requests this instance receives or runs for other homes.

    Attributes:
        by_stream: guests by stream id; by_rid: the same by their rid here.
        draining: take no more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pages: KvPages,
        links: Links,
        relay: Relay,
        config: StarConfig,
        fingerprint: str,
    ) -> None:
        self.by_stream: dict[str, Guest] = {}
        self.by_rid: dict[str, Guest] = {}
        self.draining = False
        self._scheduler = scheduler
        self._pages = pages
        self._links = links
        self._relay = relay
        self._config = config
        self._fingerprint = fingerprint

    # ------------------------------------------------------------------ arrival

    def on_reserve(self, message: Reserve) -> None:
        """Answer ``Reserved`` or ``Refused``."""
        if message.stream_id in self.by_stream:
            self._refuse(message, OrderRefused("this stream is already here"))
            return
        try:
            guest = self._admit(message)
            self.by_stream[message.stream_id] = guest
            self.by_rid[guest.rid] = guest
            if guest.comes_home:
                self._seat(guest)
            else:
                self._rebuild(guest)
        except StarError as error:
            self._refuse(message, error)

    def _admit(self, message: Reserve) -> Guest:
        self._check(message)
        comes_home = message.home == self._links.peer
        shadow = self._relay.shadows.get(message.stream_id)
        if comes_home and shadow is None:
            raise OrderRefused("the stream has ended at home")
        now = time.monotonic()
        return Guest(
            reserve=message,
            rid=shadow.req.rid if comes_home and shadow else GUEST_PREFIX + uuid.uuid4().hex,
            carrier=carrier_named(message.transport).receive(message.transport_setup),
            deadline=now + self._config.move_deadline_s,
            confirmed_at=now,
            comes_home=comes_home,
            req=shadow.req if comes_home and shadow else None,
        )

    def _check(self, message: Reserve) -> None:
        scheduler = self._scheduler
        if message.fingerprint != self._fingerprint:
            raise OrderRefused(
                "another model, dtype, page size, parallelism or release runs here",
                hint="compare star.fingerprint in both instances' /server_info",
            )
        if self.draining:
            raise OrderRefused("this instance is draining")
        if len(self.by_stream) >= self._config.max_guests:
            raise OrderRefused("as many guests as --star-max-guests allows are here")
        busy = len(scheduler.running_batch.reqs) + sum(g.arriving for g in self.by_stream.values())
        if busy >= scheduler.max_running_requests or not scheduler.req_to_token_pool.free_slots:
            raise OrderRefused("no request slot is free")
        arriving = sum(g.reserve.context_tokens for g in self.by_stream.values() if g.arriving)
        if self._pages.free - arriving < message.context_tokens + HEADROOM_TOKENS:
            raise OrderRefused(
                f"KV memory is full: {self._pages.free} tokens free, {arriving} of them promised"
            )

    def _rebuild(self, guest: Guest) -> None:
        """Let SGLang make a request of the message, as if its own client had sent it."""
        message = guest.reserve
        request = codec.decode_request(message.request, message.prompt_ids, guest.rid)
        self._scheduler.handle_generate_request(request)
        if guest.req is None and not any(
            req.rid == guest.rid for req in self._scheduler.grammar_manager.grammar_queue
        ):
            raise OrderRefused("the target's SGLang does not accept the request")

    def rebuilt(self, req: Req) -> bool:
        """SGLang is about to queue ``req``; keep it if it is an arriving guest.

        Returns:
            False if it is not, so that it is queued as usual.
        """
        guest = self.by_rid.get(req.rid)
        if guest is None:
            # A guest whose move was cancelled while its grammar compiled.
            return req.rid.startswith(GUEST_PREFIX)
        if guest.req is not None:
            return False
        guest.req = req
        if req.to_finish is not None or req.finished():
            reason = req.to_finish or req.finished_reason
            self._refuse(guest.reserve, OrderRefused(str(reason.to_json().get("message"))))
            return True
        try:
            self._seat(guest)
        except StarError as error:
            self._refuse(guest.reserve, error)
        return True

    def _seat(self, guest: Guest) -> None:
        req, message = guest.req, guest.reserve
        assert req is not None
        if not self._pages.reserve_row(req):
            raise OrderRefused("no request slot is free")
        self._pages.bind_to_root(req)
        req.sampling_params.max_new_tokens = message.max_new_tokens
        setattr(req, MOVES, message.moves + (not guest.comes_home))
        guest.machine = target_machine()
        self._answer(guest, Reserved(**self._address(message)))

    def on_pages(self, message: PagesReady) -> None:
        """Copy one slot into KV of our own."""
        guest = self.by_stream.get(message.stream_id)
        if guest is None or guest.machine is None or guest.req is None or not guest.arriving:
            return
        try:
            if message.start != guest.req.kv.kv_allocated_len or message.end <= message.start:
                raise OrderRefused("KV arrived out of order")
            nbytes = (message.end - message.start) * self._pages.token_bytes
            source = guest.carrier.slot(message.slot)
            if nbytes > source.numel():
                raise OrderRefused("a slot cannot hold that many tokens")
            if not self._pages.extend(guest.req, message.end):
                raise OrderRefused("KV memory is full")
            if self._scheduler.enable_overlap:
                # A finished request's redundant last step may still write slots we just got.
                self._scheduler.schedule_stream.wait_stream(self._scheduler.forward_stream)
            self._pages.scatter(guest.req, message.start, message.end, source)
        except StarError as error:
            self._refuse(guest.reserve, error)
            return
        guest.machine.fire(TargetEvent.PAGES)
        self._answer(
            guest, PagesTaken(**self._address(message), end=message.end, slot=message.slot)
        )

    def on_parked(self, message: Parked) -> None:
        """The source finishes its last step of a request that comes here."""
        guest = self.by_stream.get(message.stream_id)
        if guest is not None:
            guest.due = time.monotonic() + 2 * message.step_ms / 1e3

    def expecting(self) -> bool:
        """Whether a commit should arrive within about a step."""
        now = time.monotonic()
        return any(g.due > now and g.arriving for g in self.by_stream.values())

    def on_commit(self, message: Commit) -> None:
        """Insert the request into the running batch: it decodes here from the next step on."""
        guest = self.by_stream.get(message.stream_id)
        if guest is None or guest.reserve.migration_id != message.migration_id:
            return
        try:
            self._insert(guest, message)
        except StarError as error:
            self._refuse(guest.reserve, error)
            return
        host = self._links.peer
        inserted: dict[str, Any] = {"host": host, "facts": message.facts}
        self._answer(guest, Inserted(**self._address(message), **inserted))
        if guest.comes_home:
            shadow = self._relay.shadows[message.stream_id]
            self._relay.returned(shadow, message.migration_id, message.facts)
            self._forget(guest)
        elif guest.reserve.home != guest.reserve.source:
            address = self._address(message, to=guest.reserve.home)
            self._links.send(guest.reserve.home, Inserted(**address, **inserted))

    def _insert(self, guest: Guest, message: Commit) -> None:
        req = guest.req
        if req is None or guest.machine is None or not guest.machine.allows(TargetEvent.COMMIT):
            raise OrderRefused("commit before the pages")
        if guest.comes_home:
            if list(req.output_ids) != list(message.output_ids):
                raise OrderRefused("home still misses tokens of an earlier host")
        else:
            req.output_ids = array("q", message.output_ids)
            if req.grammar is not None:
                for token in message.output_ids:
                    req.grammar.accept_token(token)
        length = batch.completed_tokens(req)
        if not length == message.committed_tokens == req.kv.kv_allocated_len:
            raise OrderRefused("the committed length does not match the KV received")
        req.kv.kv_committed_len = length
        guest.base = guest.sent = len(req.output_ids)
        import_state(req, message.predictor)
        guest.machine.fire(TargetEvent.COMMIT)
        guest.carrier.close()
        batch.unpark(self._scheduler, req, message.penalty_log)

    # ------------------------------------------------------------------ tokens

    def emit(self, req: Req) -> bool:
        """Send a guest's new tokens home; False if ``req`` is not a guest."""
        guest = self.by_rid.get(req.rid)
        if guest is None or guest.comes_home:
            # What SGLang says of a guest it just refused goes nowhere: its source is told.
            return req.rid.startswith(GUEST_PREFIX)
        have = len(req.output_ids)
        if guest.arriving or guest.muted or (have == guest.sent and not req.finished()):
            if req.finished():
                self._forget(guest)
            return True
        chunk = TokenChunk(
            **self._address(guest.reserve, to=guest.reserve.home),
            index=guest.sent,
            token_ids=tuple(req.output_ids[guest.sent :]),
            details=codec.encode_details(req, guest.sent - guest.base, have - guest.base),
            remaining=getattr(req, ESTIMATE, ()),
            finished=codec.encode_finish(req),
        )
        self._links.send(guest.reserve.home, chunk)
        guest.sent = have
        assert guest.machine is not None
        if req.finished():
            guest.machine.fire(TargetEvent.FINISH)
            self._forget(guest)
        else:
            guest.machine.fire(TargetEvent.DECODED)
        return True

    def aborted_here(self, rid: str, reason: dict[str, Any] | None) -> bool:
        """SGLang ended a guest outside its output stream; tell home. False if not a guest."""
        guest = self.by_rid.get(rid)
        if guest is None or guest.comes_home:
            return rid.startswith(GUEST_PREFIX)
        if guest.arriving:
            self._refuse(guest.reserve, OrderRefused("the target aborted the request"))
            return True
        if not guest.muted and guest.req is not None:
            reason = reason or {"type": "abort", "message": "Aborted at its migration target"}
            self._links.send(
                guest.reserve.home,
                TokenChunk(
                    **self._address(guest.reserve, to=guest.reserve.home),
                    index=guest.sent,
                    token_ids=(),
                    finished=orjson.dumps(reason),
                ),
            )
        self._forget(guest)
        return True

    # ------------------------------------------------------------------ endings

    def step(self) -> None:
        """Drop arrivals whose deadline has passed."""
        now = time.monotonic()
        for guest in [g for g in self.by_stream.values() if g.arriving and now > g.deadline]:
            self._refuse(guest.reserve, OrderRefused("deadline passed at the target"))

    def on_release(self, message: Release) -> None:
        """Home or source no longer wants it."""
        guest = self.by_stream.get(message.stream_id)
        if guest is None:
            return
        if guest.arriving and guest.reserve.migration_id != message.migration_id:
            return
        self.drop(guest, message.reason)

    def drop(self, guest: Guest, why: str) -> None:
        """Free everything of a guest and tell nobody."""
        logger.info("STAR drops guest %s: %s", guest.reserve.client_rid, why)
        if guest.arriving:
            if guest.machine is not None:
                guest.machine.fire(TargetEvent.CANCEL)
            if guest.req is not None:
                self._pages.release(guest.req, keep_prefix=False)
            self._forget(guest)
        elif not guest.muted:
            guest.muted = True
            assert guest.machine is not None
            guest.machine.fire(TargetEvent.ABORT)
            self._scheduler.abort_request(AbortReq(rid=guest.rid))

    def handed_over(self, stream_id: str) -> None:
        """A guest has moved on to another host."""
        guest = self.by_stream.get(stream_id)
        if guest is not None and guest.machine is not None:
            guest.machine.fire(TargetEvent.MOVE_ON)
            self._forget(guest)

    def on_live(self, peer: Peer, live: frozenset[str]) -> None:
        """A home told which streams it wants; drop what it has not wanted for too long."""
        now = time.monotonic()
        for guest in list(self.by_stream.values()):
            if guest.reserve.home != peer or guest.arriving:
                continue
            if guest.reserve.stream_id in live:
                guest.confirmed_at = now
            elif now - guest.confirmed_at > self._config.peer_timeout_s:
                self.drop(guest, "its home no longer wants it")

    def on_lost(self, peer: Peer, why: str) -> None:
        """A home, or the source of an arrival, is gone."""
        for guest in list(self.by_stream.values()):
            if guest.reserve.home == peer or (guest.arriving and guest.reserve.source == peer):
                self.drop(guest, f"{peer.instance_id}: {why}")

    def _refuse(self, message: Reserve, error: StarError) -> None:
        guest = self.by_stream.get(message.stream_id)
        if guest is not None and guest.reserve.migration_id == message.migration_id:
            self.drop(guest, error.message)
        self._links.send(
            message.source,
            Refused(
                **self._address(message),
                error_type=type(error).__name__,
                message=str(error),
            ),
        )

    def _forget(self, guest: Guest) -> None:
        guest.carrier.close()
        self.by_stream.pop(guest.reserve.stream_id, None)
        self.by_rid.pop(guest.rid, None)

    def _answer(self, guest: Guest, message: Any) -> None:
        self._links.send(guest.reserve.source, message)

    def _address(
        self, message: Reserve | PagesReady | Commit, *, to: Peer | None = None
    ) -> dict[str, Any]:
        return {
            "migration_id": message.migration_id,
            "stream_id": message.stream_id,
            "sender_incarnation": self._links.peer.incarnation,
            "receiver_incarnation": to.incarnation if to else message.sender_incarnation,
        }
