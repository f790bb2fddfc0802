"""The receiving side of a move: reserve, receive, insert."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import OrderRefused, StarError
from sglang_star.faults import Faults
from sglang_star.migration.guests import Guest, Guests
from sglang_star.migration.post import Post
from sglang_star.migration.relay import ARRIVED, MOVES, Relay
from sglang_star.migration.states import TargetEvent, target_machine
from sglang_star.migration.transport import carrier as carrier_named
from sglang_star.protocol import (
    DRAIN,
    Commit,
    Inserted,
    PagesReady,
    PagesTaken,
    Parked,
    Reserve,
    Reserved,
)

HEADROOM_TOKENS = 64
"""Free KV a target keeps beyond a guest's context, so that it can decode at all."""


class Arrivals:
    """Moves that come here, until their request decodes."""

    def __init__(
        self,
        engine: Engine,
        post: Post,
        relay: Relay,
        guests: Guests,
        config: StarConfig,
        fingerprint: str,
    ) -> None:
        self._engine = engine
        self._post = post
        self._relay = relay
        self._guests = guests
        self._config = config
        self._fingerprint = fingerprint

    def on_reserve(self, message: Reserve) -> None:
        """Answer ``Reserved`` or ``Refused``."""
        if message.stream_id in self._guests.by_stream:
            self._guests.refuse(message, OrderRefused("this stream is already here"))
            return
        try:
            guest = self._admit(message)
            self._guests.add(guest)
            if guest.comes_home:
                self._seat(guest)
            else:
                self._rebuild(guest)
        except StarError as error:
            self._guests.refuse(message, error)

    def _admit(self, message: Reserve) -> Guest:
        self._check(message)
        comes_home = message.home == self._post.peer
        shadow = self._relay.shadows.get(message.stream_id)
        if comes_home and shadow is None:
            raise OrderRefused("the stream has ended at home")
        now = self._engine.now()
        return Guest(
            reserve=message,
            rid=shadow.req.rid if comes_home and shadow else self._guests.new_rid(),
            carrier=carrier_named(message.transport).receive(message.transport_setup),
            deadline=now + self._config.move_deadline_s,
            confirmed_at=now,
            comes_home=comes_home,
            req=shadow.req if comes_home and shadow else None,
        )

    def _check(self, message: Reserve) -> None:
        engine = self._engine
        if message.fingerprint != self._fingerprint:
            raise OrderRefused(
                "another model, dtype, page size, parallelism or release runs here",
                hint="compare star.fingerprint in both instances' /server_info",
            )
        if self._guests.draining:
            raise OrderRefused("this instance is draining")
        if len(self._guests.by_stream) >= self._config.max_guests:
            raise OrderRefused("as many guests as --star-max-guests allows are here")
        arriving = self._guests.arriving()
        if not engine.has_slot(len(arriving)):
            raise OrderRefused("no request slot is free")
        if waiting := engine.retracted():
            raise OrderRefused(f"KV memory is full: {waiting} requests wait for it here")
        promised = sum(guest.reserve.context_tokens for guest in arriving)
        kept = HEADROOM_TOKENS
        # Off an instance that is to go: better here and retracted than lost with it.
        if message.reason != DRAIN:
            kept = max(kept, engine.kept_free(len(arriving) + 1))
        free = engine.free_tokens()
        if free - promised < message.context_tokens + kept:
            raise OrderRefused(
                f"KV memory is full: {free} tokens free, {promised} of them promised, "
                f"{kept} kept for requests to grow"
            )

    def _rebuild(self, guest: Guest) -> None:
        """Let the engine make a request of the message, as if its own client had sent it."""
        message = guest.reserve
        self._engine.rebuild(message.request, message.prompt_ids, guest.rid)
        if guest.req is None and not self._engine.compiles(guest.rid):
            raise OrderRefused("the target's SGLang does not accept the request")

    def rebuilt(self, req: Request) -> bool:
        """The engine is about to queue ``req``; keep it if it is an arriving guest.

        Returns:
            False if it is not, so that it is queued as usual.
        """
        guest = self._guests.by_rid.get(req.rid)
        if guest is None:
            # A guest whose move was cancelled while its grammar compiled.
            return req.rid.startswith(self._guests.prefix)
        if guest.req is not None:
            return False
        guest.req = req
        if refusal := self._engine.refusal(req):
            self._guests.refuse(guest.reserve, OrderRefused(refusal))
            return True
        try:
            self._seat(guest)
        except StarError as error:
            self._guests.refuse(guest.reserve, error)
        return True

    def _seat(self, guest: Guest) -> None:
        req, message = guest.req, guest.reserve
        assert req is not None
        if not self._engine.seat(req, message.max_new_tokens):
            raise OrderRefused("no request slot is free")
        if not guest.comes_home:
            setattr(req, MOVES, message.moves + 1)
        guest.machine = target_machine()
        self._answer(guest, Reserved(**self._guests.address(message)))

    def on_pages(self, message: PagesReady) -> None:
        """Copy one slot into KV of our own."""
        guest = self._guests.by_stream.get(message.stream_id)
        if guest is None or guest.machine is None or guest.req is None or not guest.arriving:
            return
        if guest.reserve.migration_id != message.migration_id:
            return  # of an earlier move of the same stream
        try:
            if message.start != self._engine.held(guest.req) or message.end <= message.start:
                raise OrderRefused("KV arrived out of order")
            slot = guest.carrier.slot(message.slot)
            if not self._engine.extend(guest.req, message.end):
                raise OrderRefused("KV memory is full")
            self._engine.scatter(guest.req, message.start, message.end, slot)
        except StarError as error:
            self._guests.refuse(guest.reserve, error)
            return
        guest.machine.fire(TargetEvent.PAGES)
        self._answer(
            guest, PagesTaken(**self._guests.address(message), end=message.end, slot=message.slot)
        )

    def on_parked(self, message: Parked) -> None:
        """The source finishes its last step of a request that comes here."""
        guest = self._guests.by_stream.get(message.stream_id)
        if guest is not None and guest.reserve.migration_id == message.migration_id:
            guest.due = self._engine.now() + 2 * message.step_ms / 1e3

    def on_commit(self, message: Commit) -> None:
        """Insert the request into the running batch: it decodes here from the next step on."""
        guest = self._guests.by_stream.get(message.stream_id)
        if guest is None or guest.reserve.migration_id != message.migration_id:
            return
        if not guest.arriving:
            return  # a repeated one: the request decodes here
        # The last tokens of an earlier host may come after those of the one that sends this.
        guest.commit = message if self._misses_tokens(guest, message) else None
        if guest.commit is not None:
            return
        try:
            self._insert(guest, message)
        except StarError as error:
            self._guests.refuse(guest.reserve, error)
            return
        inserted: dict[str, Any] = {
            "host": self._post.peer,
            "facts": message.facts,
            "moves": guest.reserve.moves + 1,
        }
        answer = Inserted(**self._guests.address(message), **inserted)
        self._answer(guest, answer)
        if guest.comes_home:
            self._relay.returned(self._relay.shadows[message.stream_id], answer)
            self._guests.forget(guest)
        elif guest.reserve.home != guest.reserve.source:
            address = self._guests.address(message, to=guest.reserve.home)
            self._post.send(guest.reserve.home, Inserted(**address, **inserted))

    def step(self, faults: Faults) -> None:
        """Look again at commits that came before the tokens of an earlier host."""
        for guest in self._guests.arriving():
            if guest.commit is not None:
                end = partial(self._guests.abandon, guest, "a defect at the target")
                with faults.contained("a late commit", end):
                    self.on_commit(guest.commit)

    def _misses_tokens(self, guest: Guest, message: Commit) -> bool:
        return (
            guest.comes_home
            and message.stream_id in self._relay.shadows
            and guest.req is not None
            and len(guest.req.output_ids) < len(message.output_ids)
        )

    def _insert(self, guest: Guest, message: Commit) -> None:
        req = guest.req
        if req is None or guest.machine is None or not guest.machine.allows(TargetEvent.COMMIT):
            raise OrderRefused("commit before the pages")
        if guest.comes_home:
            if message.stream_id not in self._relay.shadows:
                raise OrderRefused("the stream has ended at home")
            if list(req.output_ids) != list(message.output_ids):
                raise OrderRefused("home has other tokens of this stream")
        else:
            self._engine.adopt(req, message.output_ids)
        guest.base = guest.sent = len(req.output_ids)
        setattr(req, ARRIVED, guest.base)
        self._engine.join(req, message.committed_tokens, message.penalty_log, message.predictor)
        guest.machine.fire(TargetEvent.COMMIT)
        guest.confirmed_at = self._engine.now()  # home does not know of us before
        guest.carrier.close()

    def _answer(self, guest: Guest, message: Any) -> None:
        self._post.send(guest.reserve.source, message)
