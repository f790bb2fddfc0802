"""The home of a stream: shadows of requests that decode elsewhere.

A shadow keeps SGLang's own ``Req``: tokens that come home are appended to it exactly as if they had
been decoded here and leave through SGLang's ordinary output path, so that nothing above the
scheduler notices where they came from.

A stream has one writer, and home decides who that is. It serves the client from one epoch, the move
by which the present host got the stream. It takes up a later one when it hears of it, unless the
client already has tokens that the later host does not know of: then the earlier host had given that
move up. What any other host says beyond what the present one came with is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from sglang_star.engine.verbs import Engine, Request
from sglang_star.errors import MalformedMessage
from sglang_star.migration.post import Post
from sglang_star.migration.report import MoveLog
from sglang_star.migration.states import Lent, LentEvent, Machine, lent
from sglang_star.protocol import LOST, Inserted, MoveReport, Peer, Release, Route, TokenChunk
from sglang_star.star_request import star_of

logger = logging.getLogger(__name__)

MAX_EARLY = 1024
"""Chunks kept of a stream while one before them is missing; then it counts as lost."""


@dataclass(slots=True)
class Shadow:
    """A request of ours that decodes at ``host``.

    Attributes:
        migration_id: the epoch that its client is served from.
        base: output tokens that ``host`` came with; later ones are from nobody else.
        confirmed_at: when the host last said that it holds the stream.
        early: chunks that overtook another host's last ones, by index; gap_since: when the first
            of them came.
        strange_since: when the first token came of an epoch that is not its client's, if none of
            its own came after it.
    """

    req: Request
    stream_id: str
    migration_id: str
    host: Peer
    confirmed_at: float
    base: int
    early: dict[int, TokenChunk] = field(default_factory=dict)
    gap_since: float = 0.0
    strange_since: float | None = None
    machine: Machine[Lent, LentEvent] = field(default_factory=lent)


class Home:
    """All shadows of this instance.

    Args:
        over: told the stream, and why, before a shadow ends or its request is recomputed: nothing
            of it need come home any more, and what has holds KV of the same request.

    Attributes:
        shadows: by stream id.
        fresh: requests with tokens that their clients were not sent yet, by rid.
    """

    def __init__(
        self,
        engine: Engine,
        post: Post,
        log: MoveLog,
        over: Callable[[str, str], None],
        *,
        timeout_s: float,
    ) -> None:
        self.shadows: dict[str, Shadow] = {}
        self._engine = engine
        self._post = post
        self._log = log
        self._over = over
        self._timeout_s = timeout_s
        # SGLang's detokenizer must not see a request twice in one batch.
        self.fresh: dict[str, Request] = {}

    # ------------------------------------------------------------------ a stream leaves, returns

    def lend(self, req: Request, message: Inserted) -> None:
        """The request just left this instance; its KV is already given back."""
        self.shadows[message.stream_id] = Shadow(
            req=req,
            stream_id=message.stream_id,
            migration_id=message.migration_id,
            host=message.host,
            confirmed_at=self._engine.now(),
            base=len(req.output_ids),
        )
        self._arrived(req, message)

    def returned(self, shadow: Shadow, message: Inserted) -> None:
        """The request decodes here again."""
        shadow.machine.fire(LentEvent.RETURN)
        del self.shadows[shadow.stream_id]
        self._arrived(shadow.req, message)

    def on_inserted(self, message: Inserted) -> None:
        """A former host handed the stream to another one."""
        shadow = self.shadows.get(message.stream_id)
        if shadow is None:
            if message.home != self._post.peer:
                return  # told once more as the sender of another's stream
            # The stream ended or was reclaimed meanwhile: the new host holds a ghost.
            self._release(message.stream_id, message.migration_id, message.host, "stream is over")
            return
        # What a former host says may come after what a later one says.
        if message.moves > star_of(shadow.req).moves:
            req = shadow.req
            have = len(req.output_ids)
            base = message.facts.context_tokens + 1 - (self._engine.tokens(req) - have)
            if have > base:
                # The former host gave this move up and went on.
                self._release(message.stream_id, message.migration_id, message.host, "given up")
                return
            shadow.base = base
            shadow.host = message.host
            shadow.migration_id = message.migration_id
            shadow.confirmed_at = self._engine.now()
        self._arrived(shadow.req, message)

    # ------------------------------------------------------------------ tokens

    def on_chunk(self, chunk: TokenChunk) -> None:
        """Append a chunk, and those that it lets in."""
        shadow = self.shadows.get(chunk.stream_id)
        if shadow is None:
            return
        if chunk.migration_id != shadow.migration_id and (
            chunk.finished or chunk.index + len(chunk.token_ids) > shadow.base
        ):
            # Of a host that has given the stream away, or that we do not know of.
            if shadow.strange_since is None:
                shadow.strange_since = self._engine.now()
            return
        have = len(shadow.req.output_ids)
        if chunk.index > have:
            self._keep(shadow, chunk)
            return
        if chunk.index < have and not (
            chunk.finished and chunk.index + len(chunk.token_ids) == have
        ):
            return
        self._append(shadow, chunk)
        shadow.gap_since = self._engine.now()
        shadow.strange_since = None
        following = shadow.early.pop(len(shadow.req.output_ids), None)
        if following is not None:
            self.on_chunk(following)

    def _keep(self, shadow: Shadow, chunk: TokenChunk) -> None:
        """Keep a chunk until those before it have come."""
        if not shadow.early:
            shadow.gap_since = self._engine.now()
        if len(shadow.early) < MAX_EARLY:
            shadow.early[chunk.index] = chunk
        else:
            self.reclaim(shadow, "tokens of it were lost on their way")

    def flush(self) -> None:
        """Send what arrived in this tick to the clients."""
        fresh = list(self.fresh.values())
        self.fresh.clear()
        if fresh:
            self._engine.emit(fresh)

    def _append(self, shadow: Shadow, chunk: TokenChunk) -> None:
        req = shadow.req
        # What can be malformed is read before anything is appended.
        reason = _reason(chunk.finished)
        self._engine.append(req, chunk.token_ids, chunk.details)
        star_of(req).estimate = chunk.remaining
        if reason is not None and reason.get("type") == LOST:
            self.reclaim(shadow, str(reason.get("message")))
            return
        if req.finished():
            reason = None  # it saw the end itself, and why
        if reason is not None or req.finished():
            self._end(shadow, LentEvent.FINISH, reason)
            if not chunk.finished:
                self._release(shadow.stream_id, shadow.migration_id, shadow.host, "finished")
        self.fresh[req.rid] = req

    def _end(self, shadow: Shadow, event: LentEvent, reason: dict[str, Any] | None) -> None:
        shadow.machine.fire(event)
        self._over(shadow.stream_id, "the stream has ended at home")
        self._engine.end(shadow.req, reason)
        del self.shadows[shadow.stream_id]

    # ------------------------------------------------------------------ abort, loss

    def abort(self, wanted: Callable[[Request], bool], reason: dict[str, Any]) -> None:
        """End every shadow that ``wanted`` names, here and at its host."""
        for shadow in [s for s in self.shadows.values() if wanted(s.req)]:
            self._end(shadow, LentEvent.ABORT, reason)
            self._release(shadow.stream_id, shadow.migration_id, shadow.host, "aborted")
            self.fresh[shadow.req.rid] = shadow.req
        self.flush()

    def on_live(self, peer: Peer, live: frozenset[str]) -> None:
        """A host told which streams it holds; reclaim what it has not held for too long."""
        now = self._engine.now()
        for shadow in [s for s in self.shadows.values() if s.host == peer]:
            if shadow.early and now - shadow.gap_since > self._timeout_s:
                self.reclaim(shadow, "tokens of it were lost on their way")
            elif shadow.strange_since and now - shadow.strange_since > self._timeout_s:
                self.reclaim(shadow, "its host decodes it under another epoch")
            elif shadow.stream_id in live:
                shadow.confirmed_at = now
            elif now - shadow.confirmed_at > self._timeout_s:
                self.reclaim(shadow, "its host no longer holds it")

    def on_lost(self, peer: Peer, why: str) -> None:
        """A host is gone: its streams go on here."""
        for shadow in [s for s in self.shadows.values() if s.host == peer]:
            self.reclaim(shadow, why)

    def reclaim(self, shadow: Shadow, why: str) -> None:
        """Take a stream back and let SGLang recompute its KV."""
        req = shadow.req
        logger.warning(
            "STAR reclaims %s from %s at token %d: %s",
            req.rid,
            shadow.host.instance_id,
            len(req.output_ids),
            why,
        )
        shadow.machine.fire(LentEvent.RECLAIM)
        self._over(shadow.stream_id, "home recomputes the stream")
        del self.shadows[shadow.stream_id]
        self._release(shadow.stream_id, shadow.migration_id, shadow.host, "reclaimed")
        self._log.add(
            MoveReport(
                migration_id=shadow.migration_id,
                rid=req.rid,
                source=shadow.host.instance_id,
                target=self._post.peer.instance_id,
                outcome="reclaimed",
                detail=why,
                output_tokens=len(req.output_ids),
                started_at=self._engine.wall(),
                finished_at=self._engine.wall(),
            )
        )
        self._engine.requeue(req)

    def _release(self, stream_id: str, migration_id: str, host: Peer, reason: str) -> None:
        route = Route(migration_id=migration_id, stream_id=stream_id, receiver=host.incarnation)
        self._post.send(host, Release(route=route, reason=reason))

    def _arrived(self, req: Request, message: Inserted) -> None:
        star = star_of(req)
        star.moves = max(message.moves, star.moves)
        self._log.arrived(req, message.migration_id, message.host.instance_id, message.facts)


_REASON = {"message": str, "status_code": int, "err_type": str}
"""What of a reason is told to clients, and its type."""


def _reason(finished: bytes) -> dict[str, Any] | None:
    """Why a host says that the output is over; None while it goes on.

    Raises:
        MalformedMessage: it does not say it as :meth:`Engine.finish_reason` does.
    """
    if not finished:
        return None
    try:
        reason = orjson.loads(finished)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(f"not a finish reason: {error}") from error
    if not isinstance(reason, dict) or not all(
        isinstance(reason.get(name), kind | None) for name, kind in _REASON.items()
    ):
        raise MalformedMessage("not a finish reason")
    return reason
