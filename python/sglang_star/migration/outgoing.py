"""One outgoing move and what is told of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sglang_star.engine.verbs import Engine, Request
from sglang_star.migration.piece import Loaded
from sglang_star.migration.states import OFF_BATCH, Machine, Sending, SendingEvent, sending
from sglang_star.migration.transport.base import Region
from sglang_star.protocol import MoveFacts, MoveReport, Offer, Peer, Reserve, Route
from sglang_star.star_request import star_of

SLOTS = 4
"""Pieces of a move on their way at once: one is filled while others are being emptied."""


@dataclass(slots=True)
class Outgoing:
    """One outgoing move.

    Attributes:
        source: this instance; home: whose stream it is, ourselves unless the request is a guest.
        region: where its pieces lie for the target; None until that has chosen a transport.
        transport: its name; transport_reason: why that one.
        token_bytes: size of one KV position.
        loading: pieces that are being copied, oldest first; filled: those that the target has
            been told of and still reads, by stamp.
        full: whether there was more to gather at the last step boundary than may be on its way.
        copied_from: (monotonic seconds, KV positions) when the target had answered.
        sent: KV positions gathered so far; precopied: of these, before parking.
        deadline: monotonic seconds; started_at: seconds since the epoch.
        hold_at: output tokens at which the request leaves the batch whatever was copied by then;
            None to let it decode until the copy has caught up.
        announced: whether the target was told that the commit is near.
    """

    migration_id: str
    stream_id: str
    req: Request
    client_rid: str
    source: Peer
    home: Peer
    target: Peer
    reason: str
    token_bytes: int
    step_ms: float
    deadline: float
    started_at: float
    hold_at: int | None = None
    announced: bool = False
    machine: Machine[Sending, SendingEvent] = field(default_factory=sending)
    region: Region | None = None
    transport: str = ""
    transport_reason: str = ""
    loading: deque[Loaded] = field(default_factory=deque)
    filled: dict[int, Loaded] = field(default_factory=dict)
    full: bool = False
    copied_from: tuple[float, int] = (0.0, 0)
    sent: int = 0
    precopied: int = 0

    @property
    def off_batch(self) -> bool:
        """Whether the request is out of the running batch, with its KV still held here."""
        return self.machine.state in OFF_BATCH

    @property
    def on_their_way(self) -> int:
        """Pieces that the target does not have yet."""
        return len(self.loading) + len(self.filled)

    @property
    def ahead(self) -> int:
        """Bytes of these."""
        pieces = (*self.loading, *self.filled.values())
        return sum(piece.end - piece.start for piece in pieces) * self.token_bytes

    @property
    def held(self) -> bool:
        """Whether it is time for the request to leave the batch, come what may."""
        return self.hold_at is not None and len(self.req.output_ids) >= self.hold_at

    @property
    def route(self) -> Route:
        """Address of every message to the target."""
        return Route(
            migration_id=self.migration_id,
            stream_id=self.stream_id,
            receiver=self.target.incarnation,
        )

    def facts(self) -> MoveFacts:
        """What the home cannot know, for its report of a move that came to pass."""
        return MoveFacts(
            source=self.source.instance_id,
            reason=self.reason,
            context_tokens=self.sent,
            precopied_tokens=self.precopied,
            transport_bytes=self.sent * self.token_bytes,
            step_ms=self.step_ms,
            started_at=self.started_at,
            transport=self.transport,
            transport_reason=self.transport_reason,
        )

    def failed(self, outcome: str, detail: str, context_tokens: int, now: float) -> MoveReport:
        """The report of a move that did not; ``now`` by the wall clock."""
        return MoveReport(
            migration_id=self.migration_id,
            rid=self.client_rid,
            source=self.source.instance_id,
            target=self.target.instance_id,
            outcome=outcome,
            reason=self.reason,
            detail=detail,
            context_tokens=context_tokens,
            precopied_tokens=self.precopied,
            output_tokens=len(self.req.output_ids),
            step_ms=self.step_ms,
            transport_bytes=self.sent * self.token_bytes,
            transport=self.transport,
            transport_reason=self.transport_reason,
            started_at=self.started_at,
            finished_at=now,
        )


def reservation(
    engine: Engine,
    move: Outgoing,
    described: tuple[bytes, bytes],
    offers: tuple[Offer, ...],
    fingerprint: str,
) -> Reserve:
    """What a target is asked with, and all it needs to make the same request.

    ``described`` is what the engine says of the request (:meth:`Engine.describe`).
    """
    request, prompt = described
    return Reserve(
        route=move.route,
        source=move.source,
        home=move.home,
        fingerprint=fingerprint,
        client_rid=move.client_rid,
        request=request,
        prompt_ids=prompt,
        weights=engine.weights(),
        context_tokens=engine.tokens(move.req),
        max_new_tokens=engine.max_new_tokens(move.req),
        moves=star_of(move.req).moves,
        reason=move.reason,
        offers=offers,
    )
