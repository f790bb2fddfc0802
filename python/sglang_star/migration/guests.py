"""The requests of other homes that an instance receives or runs, and how they end.

A guest is an ordinary SGLang request under a rid of its own; only its output takes another path.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang_star.config import StarConfig
from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import OrderRefused, StarError
from sglang_star.faults import Faults
from sglang_star.migration.post import Post
from sglang_star.migration.states import Machine, Target, TargetEvent
from sglang_star.migration.transport.base import Carrier
from sglang_star.protocol import Commit, MigrationMessage, Peer, Refused, Release, Reserve

logger = logging.getLogger(__name__)

GUEST_PREFIX = "star-guest-"
"""Of rids; what follows no client can guess, and abort, which matches by prefix, finds one."""


@dataclass(slots=True)
class Guest:
    """A request of another home.

    Attributes:
        req: None until SGLang has rebuilt it (a grammar may still compile).
        base: output tokens it came with; sent: output tokens its home has or was sent.
        comes_home: the home is this instance: ``req`` is its shadow's request.
        confirmed_at: when home last said that it wants the stream.
        due: until when its commit is expected any moment, monotonic seconds.
        commit: one that waits for tokens which home still misses.
    """

    reserve: Reserve
    rid: str
    carrier: Carrier
    deadline: float
    confirmed_at: float
    comes_home: bool = False
    machine: Machine[Target, TargetEvent] | None = None
    req: Request | None = None
    base: int = 0
    sent: int = 0
    muted: bool = False
    due: float = 0.0
    commit: Commit | None = None

    @property
    def arriving(self) -> bool:
        """Whether it is not decoding here yet."""
        return self.machine is None or self.machine.state in (Target.RESERVED, Target.RECEIVING)


class Guests:
    """All guests of this instance.

    Attributes:
        by_stream: guests by stream id; by_rid: the same by their rid here.
        draining: take no more.
        prefix: of guests' rids here.
    """

    def __init__(self, engine: Engine, post: Post, config: StarConfig) -> None:
        self.by_stream: dict[str, Guest] = {}
        self.by_rid: dict[str, Guest] = {}
        self.draining = False
        self.prefix = f"{GUEST_PREFIX}{engine.new_id()}-"
        self._engine = engine
        self._post = post
        self._config = config

    def new_rid(self) -> str:
        """A name for a guest that no client's request has."""
        return self.prefix + self._engine.new_id()

    def add(self, guest: Guest) -> None:
        """Take in a guest whose move may still fail."""
        self.by_stream[guest.reserve.stream_id] = guest
        self.by_rid[guest.rid] = guest

    def arriving(self) -> list[Guest]:
        """Guests that do not decode here yet."""
        return [guest for guest in self.by_stream.values() if guest.arriving]

    def expecting(self) -> bool:
        """Whether a commit should arrive within about a step."""
        now = self._engine.now()
        return any(guest.due > now for guest in self.arriving())

    def step(self, faults: Faults) -> None:
        """Drop arrivals whose deadline has passed."""
        now = self._engine.now()
        for guest in [g for g in self.arriving() if now > g.deadline]:
            with faults.contained("an arrival", partial(self.forget, guest)):
                self.refuse(guest.reserve, OrderRefused("deadline passed at the target"))

    def on_release(self, message: Release) -> None:
        """Home or source no longer wants it."""
        guest = self.by_stream.get(message.stream_id)
        if guest is None:
            return
        if guest.arriving and guest.reserve.migration_id != message.migration_id:
            return
        self.drop(guest, message.reason)

    def abandon(self, guest: Guest, why: str) -> None:
        """Give a guest up after a defect: its source, or its home, goes on without it."""
        if guest.arriving:
            self.refuse(guest.reserve, OrderRefused(why))
        else:
            self.drop(guest, why)

    def drop(self, guest: Guest, why: str) -> None:
        """Free everything of a guest and tell nobody."""
        logger.info("STAR drops guest %s: %s", guest.reserve.client_rid, why)
        if guest.arriving:
            if guest.machine is not None:
                guest.machine.fire(TargetEvent.CANCEL)
            if guest.req is not None:
                self._engine.release(guest.req, keep_prefix=False)
            self.forget(guest)
        elif not guest.muted:
            guest.muted = True
            assert guest.machine is not None
            guest.machine.fire(TargetEvent.ABORT)
            self._engine.abort(guest.rid)

    def handed_over(self, stream_id: str) -> None:
        """A guest has moved on to another host."""
        guest = self.by_stream.get(stream_id)
        if guest is not None and guest.machine is not None:
            guest.machine.fire(TargetEvent.MOVE_ON)
            self.forget(guest)

    def stay_away(self, stream_id: str, why: str) -> None:
        """A stream of ours is over, or goes on without the host that is sending it home."""
        guest = self.by_stream.get(stream_id)
        if guest is not None and guest.comes_home:
            self.refuse(guest.reserve, OrderRefused(why))

    def on_live(self, peer: Peer, live: frozenset[str]) -> None:
        """A home told which streams it wants; drop what it has not wanted for too long."""
        now = self._engine.now()
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

    def refuse(self, message: Reserve, error: StarError) -> None:
        """Drop what is here of a move and tell its source why."""
        guest = self.by_stream.get(message.stream_id)
        if guest is not None and guest.reserve.migration_id == message.migration_id:
            self.drop(guest, error.message)
        self._post.send(
            message.source,
            Refused(
                **self.address(message),
                error_type=type(error).__name__,
                message=str(error),
            ),
        )

    def forget(self, guest: Guest) -> None:
        """Its request is over, or not ours any more."""
        guest.carrier.close()
        self.by_stream.pop(guest.reserve.stream_id, None)
        self.by_rid.pop(guest.rid, None)

    def address(self, message: MigrationMessage, *, to: Peer | None = None) -> dict[str, Any]:
        """Fields of an answer to ``message``, or of a message to a third instance."""
        return {
            "migration_id": message.migration_id,
            "stream_id": message.stream_id,
            "sender_incarnation": self._post.peer.incarnation,
            "receiver_incarnation": to.incarnation if to else message.sender_incarnation,
        }
