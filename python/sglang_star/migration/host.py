"""The host of a stream: guests, which decode here for another home, and their tokens' way there.

A guest is an ordinary SGLang request under a rid of its own; only its output takes another path.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import orjson

from sglang_star.engine.verbs import Engine, Request
from sglang_star.migration.post import Post
from sglang_star.migration.states import Hosting, HostingEvent, Machine, hosting
from sglang_star.protocol import LOST, Peer, Release, TokenChunk, Tokens
from sglang_star.star_request import star_of

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Guest:
    """A request of another home that decodes here.

    Attributes:
        client_rid: what its client calls it.
        migration_id: the move that brought it, the epoch of its tokens.
        base: output tokens it came with; sent: output tokens its home has or was sent.
        confirmed_at: when home last said that it wants the stream.
    """

    req: Request
    client_rid: str
    stream_id: str
    migration_id: str
    home: Peer
    base: int
    sent: int
    confirmed_at: float
    machine: Machine[Hosting, HostingEvent] = field(default_factory=hosting)

    @property
    def rid(self) -> str:
        """What it is called here."""
        return self.req.rid

    @property
    def wanted(self) -> bool:
        """Whether its tokens are of use to anybody."""
        return self.machine.state is Hosting.RUNNING


class Host:
    """All guests of this instance.

    Attributes:
        by_stream: guests by stream id; by_rid: the same by their rid here.
    """

    def __init__(self, engine: Engine, post: Post, *, timeout_s: float) -> None:
        self.by_stream: dict[str, Guest] = {}
        self.by_rid: dict[str, Guest] = {}
        self._engine = engine
        self._post = post
        self._timeout_s = timeout_s
        self._fresh: dict[Peer, list[TokenChunk]] = {}

    def take(self, guest: Guest) -> None:
        """A request has come and decodes here from now on."""
        self.by_stream[guest.stream_id] = guest
        self.by_rid[guest.rid] = guest

    # ------------------------------------------------------------------ tokens

    def emit(self, guest: Guest) -> None:
        """Its new tokens, if it has any, go home with the next :meth:`flush`."""
        req = guest.req
        have = len(req.output_ids)
        if guest.wanted and (have > guest.sent or req.finished()):
            self._add(
                guest,
                tuple(req.output_ids[guest.sent :]),
                self._engine.finish_reason(req),
                details=self._engine.details(req, guest.sent - guest.base, have - guest.base),
                remaining=star_of(req).estimate,
            )
            guest.sent = have
        if req.finished():
            self._end(guest, HostingEvent.FINISH)

    def aborted(self, guest: Guest, reason: dict[str, Any] | None) -> None:
        """The engine ended a guest outside its output stream: tell home."""
        if guest.wanted:
            if star_of(guest.req).unbacked:
                # Its client asked for no end, and home can have the KV computed again.
                reason = {"type": LOST, "message": "its host ran out of KV memory"}
            reason = reason or {"type": "abort", "message": "Aborted at its migration target"}
            self._add(guest, (), orjson.dumps(reason))
        self._end(guest, HostingEvent.FINISH)

    def flush(self) -> None:
        """Send what is new: one message for each home."""
        if self._fresh:
            for home, chunks in self._fresh.items():
                self._post.send(
                    home,
                    Tokens(receiver=home.incarnation, chunks=tuple(chunks)),
                )
            self._fresh.clear()

    def _add(
        self,
        guest: Guest,
        token_ids: tuple[int, ...],
        finished: bytes,
        *,
        details: bytes = b"",
        remaining: tuple[float, ...] = (),
    ) -> None:
        chunk = TokenChunk(
            migration_id=guest.migration_id,
            stream_id=guest.stream_id,
            index=guest.sent,
            token_ids=token_ids,
            details=details,
            remaining=remaining,
            finished=finished,
        )
        self._fresh.setdefault(guest.home, []).append(chunk)

    # ------------------------------------------------------------------ endings

    def on_release(self, message: Release) -> None:
        """Its home no longer wants it; what is meant for an earlier visit is not for this one."""
        guest = self.by_stream.get(message.stream_id)
        if guest is not None and guest.migration_id == message.migration_id:
            self.drop(guest, message.reason)

    def moved_on(self, stream_id: str) -> None:
        """A guest has moved on to another host."""
        guest = self.by_stream.get(stream_id)
        if guest is not None:
            self._end(guest, HostingEvent.MOVE_ON)

    def drop(self, guest: Guest, why: str) -> None:
        """Let the engine end a guest, and send nothing of it any more."""
        if guest.wanted:
            logger.info("STAR drops guest %s: %s", guest.client_rid, why)
            guest.machine.fire(HostingEvent.DROP)
            self._engine.abort(guest.rid)

    def on_live(self, peer: Peer, live: frozenset[str]) -> None:
        """A home told which streams it wants; drop what it has not wanted for too long."""
        now = self._engine.now()
        for guest in [g for g in self.by_stream.values() if g.home == peer]:
            if guest.stream_id in live:
                guest.confirmed_at = now
            elif now - guest.confirmed_at > self._timeout_s:
                self.drop(guest, "its home no longer wants it")

    def on_lost(self, peer: Peer, why: str) -> None:
        """A home is gone."""
        for guest in [g for g in self.by_stream.values() if g.home == peer]:
            self.drop(guest, f"{peer.instance_id}: {why}")

    def _end(self, guest: Guest, event: HostingEvent) -> None:
        guest.machine.fire(event)
        del self.by_stream[guest.stream_id]
        del self.by_rid[guest.rid]
