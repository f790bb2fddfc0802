"""Every message STAR puts on a wire, and the only two functions that encode and decode them.

One message is one msgpack array ``[protocol_version, body]``, the body a tagged msgspec struct.
Nothing is ever unpickled: bytes of another version raise :class:`VersionMismatch`, anything else
that does not decode raises :class:`MalformedMessage`, and the receiver counts and drops it.

Three conversations use this file:

* instance -> router, ZMQ PUB/SUB: :class:`InstanceStatus`;
* HTTP process -> scheduler of one instance, ZMQ over a private ipc socket: the ``*Order`` messages
  and their :class:`OrderReply`;
* between instances, ZMQ PUSH to the receiver's one PULL socket: ``Reserve`` ... ``Heartbeat``.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from sglang_star.errors import MalformedMessage, VersionMismatch

PROTOCOL_VERSION: Final = 6

DRAIN: Final = "drain"
"""Reason of every move off an instance that is to go; targets go by it. The router's policies,
which import nothing of ours, spell it out."""

LOST: Final = "lost"
"""Type of the finish reason by which a host says that it cannot go on with a stream, but home
can."""

QUANTILE_LEVELS: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Levels of every remaining-length estimate on the wire; index 2 is the point estimate."""


class Message(msgspec.Struct, array_like=True, frozen=True, kw_only=True, tag=True):
    """Base of every body; array-like and tagged with the class name."""


# --------------------------------------------------------------------------- telemetry


class RequestStatus(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One request that holds KV on the publishing instance.

    Attributes:
        rid: the rid the *client's* instance (home) knows the request by.
        prompt_tokens, output_tokens: counts so far; their sum is the KV held, less one.
        max_new_tokens: the client's limit on output tokens.
        remaining: remaining output tokens at :data:`QUANTILE_LEVELS`; empty if no estimate.
        home: instance id that owns the client's stream; differs from the publisher for a guest.
        state: migration state, lower case; when no move is under way ``running`` (decoding, and
            can move), ``joining`` (its KV is arriving from prefill, or it starts with the next
            step) or ``queued``.
        pinned: why the request cannot move; empty when it can.
        moves: how many times it has moved so far.
        queued: True while it holds no KV: it waits for admission, or was retracted.
    """

    rid: str
    prompt_tokens: int
    output_tokens: int
    max_new_tokens: int
    remaining: tuple[float, ...] = ()
    home: str = ""
    state: str = "running"
    pinned: str = ""
    moves: int = 0
    queued: bool = False


class MoveReport(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """How one migration ended, from its home's point of view.

    Attributes:
        outcome: ``moved``, ``refused``, ``failed``, ``reclaimed`` or ``cancelled``; of an armed
            order that never started ``expired`` or ``disarmed``, told by the engine it was given.
        reason: why it was ordered; ``detail``: why it ended so, empty when moved.
        context_tokens: tokens whose KV moved; precopied_tokens: of these, copied while decoding.
        stall_ms: gap between the last token decoded by the source and the first relayed one,
            minus ``step_ms``; stall_steps: the same divided by ``step_ms``.
        step_ms: mean decode step time at the source when the move was ordered, exponential.
        transport_bytes: KV bytes moved, by each rank.
        transport: what carried them; transport_reason: why that one.
        started_at, finished_at: wall clock, seconds since the epoch.
    """

    migration_id: str
    rid: str
    source: str
    target: str
    outcome: str
    reason: str = ""
    detail: str = ""
    context_tokens: int = 0
    precopied_tokens: int = 0
    output_tokens: int = 0
    stall_ms: float = 0.0
    stall_steps: float = 0.0
    step_ms: float = 0.0
    transport_bytes: int = 0
    transport: str = ""
    transport_reason: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0


class InstanceStatus(Message, frozen=True):
    """What one instance tells the router, several times a second.

    Attributes:
        instance_id: stable name; incarnation: differs after every restart.
        sequence: grows by one per message of an incarnation.
        role: ``aggregated``, ``prefill`` or ``decode``.
        wall_s, monotonic_s: sender's clocks at the time of the snapshot, seconds.
        step_ms_ema, step_ms_p99: decode step time, exponential mean and recent P99.
        kv_capacity_tokens: size of the KV pool; kv_used_tokens: not free, not evictable and not
            reserved; kv_reserved_tokens: held for guests that are being received.
        running, queued, retracted: request counts now, no request in two of them: admitted ones
            (decoding or joining), ones that wait for admission, ones that wait to resume;
            retractions: total since start.
        draining: no new work is wanted.
        requests: every running request, then the queued ones.
        recent_moves: moves whose home is this instance and that ended in the last 10 s;
            repeated in several statuses so that a lost message loses nothing. The answer to a
            :class:`StatusOrder` has the last few hundred, whatever their age.
        move_outcomes: how many moves ended in each way since start.
        predictor_fallbacks: estimates read from the head's by-age table because the model's or
            the head's numbers were not finite; predictor_failures: steps left without estimates.
        paced_late: forwards that took longer than the card they are paced to would have.
        armed: orders that wait for their request to come to its token.
        faults: defects that cost a message, a move or an order, by what was being done.
        dropped: messages lost here, by why: not understood, or too many.
        transports: ways to carry KV that this instance has, the fastest first, and the state of
            each: ``ready``, ``not started``, or why it cannot be had.
    """

    instance_id: str
    incarnation: int
    sequence: int
    role: str
    wall_s: float
    monotonic_s: float
    step_ms_ema: float
    step_ms_p99: float
    kv_capacity_tokens: int
    kv_used_tokens: int
    kv_reserved_tokens: int
    running: int
    queued: int
    retracted: int
    retractions: int = 0
    draining: bool = False
    requests: tuple[RequestStatus, ...] = ()
    recent_moves: tuple[MoveReport, ...] = ()
    move_outcomes: dict[str, int] = {}
    predictor_fallbacks: int = 0
    predictor_failures: int = 0
    paced_late: int = 0
    armed: int = 0
    faults: dict[str, int] = {}
    dropped: dict[str, int] = {}
    transports: dict[str, str] = {}


class Advertisement(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance puts under ``star`` in ``/server_info``, as JSON.

    Attributes:
        status_address: ZMQ PUB endpoint; migration_address: ZMQ endpoint peers connect to, empty
            on a prefill instance, which neither sends nor receives migrations.
        fingerprint: equal between instances that may exchange KV (model, dtype, layers, page
            size, tensor-parallel size, SGLang and STAR versions).
        host_token: equal between instances that share memory (one machine, whose processes see
            each other).
        predictor: what estimates remaining lengths: a head's model and digest, ``by-age`` where
            there is no head for the model, ``off``.
        transports: names of what can carry KV from and to here, the fastest first.
    """

    protocol_version: int
    star_version: str
    instance_id: str
    incarnation: int
    role: str
    status_address: str
    migration_address: str
    fingerprint: str
    host_token: str
    predictor: str = "off"
    transports: tuple[str, ...] = ()


# --------------------------------------------------------------------------- orders


class Peer(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """How to reach, and how to recognise, another instance's migration socket."""

    instance_id: str
    incarnation: int
    address: str


class StatusOrder(Message, frozen=True):
    """Ask the scheduler for a fresh :class:`InstanceStatus`, with older reports than published."""

    order_id: int


class MigrateOrder(Message, frozen=True):
    """Move one request to ``target``; answered when accepted or refused.

    Attributes:
        rid: its name; with ``at_tokens`` a name that ends in ``*`` stands for the first request
            that it is the beginning of.
        at_tokens: 0 for a running request, at once; else the order is armed: it starts when the
            request, which need not exist yet, has decoded so many tokens on this instance.
        hold_after: take the request out of the batch this many tokens after the start of the
            move, however much is copied by then; -1 never.
        expire_s: how long an armed order waits, seconds.
    """

    order_id: int
    rid: str
    target: Peer
    reason: str = ""
    at_tokens: int = 0
    hold_after: int = -1
    expire_s: float = 0.0


class DisarmOrder(Message, frozen=True):
    """Forget the armed orders that were given for exactly this rid; all, if it is empty."""

    order_id: int
    rid: str = ""


class DrainOrder(Message, frozen=True):
    """Refuse guests and move every movable request to ``targets``, round-robin."""

    order_id: int
    targets: tuple[Peer, ...] = ()


class UndrainOrder(Message, frozen=True):
    """Accept work again."""

    order_id: int


class OrderReply(Message, frozen=True):
    """Answer to any order; ``error_type`` empty means done, ``payload`` is JSON."""

    order_id: int
    error_type: str = ""
    message: str = ""
    hint: str = ""
    payload: bytes = b"{}"


# --------------------------------------------------------------------------- between instances


class Route(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a message is about, and for whom.

    Attributes:
        migration_id: unique per move, and so the *epoch* of a stream: the move by which its
            present host got it. Only the home decides which epoch its client is served from;
            tokens, hand-overs and releases of any other are dropped wherever they arrive.
        stream_id: unique per lease of a client's stream; given by its home and changed when home
            takes the stream back, so that what a former host still says is recognised. Nobody who
            was not told it or a migration id can guess one.
        receiver: incarnation it is meant for.
    """

    migration_id: str
    stream_id: str
    receiver: int


class MoveMessage(Message, frozen=True):
    """Base of the messages that are about one move."""

    route: Route

    @property
    def migration_id(self) -> str:
        """See :class:`Route`."""
        return self.route.migration_id

    @property
    def stream_id(self) -> str:
        """See :class:`Route`."""
        return self.route.stream_id

    @property
    def receiver(self) -> int:
        """See :class:`Route`."""
        return self.route.receiver


class Offer(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A transport that the source has.

    Attributes:
        setup: what the target needs to read by it, opaque; empty while it is not started.
    """

    name: str
    setup: bytes


class Reserve(MoveMessage, frozen=True):
    """Source asks for a request slot on the target.

    Attributes:
        source: where answers go; home: where tokens go.
        fingerprint: must equal the target's.
        client_rid: the rid the client's instance knows; for telemetry and orders.
        request: the original tokenized request, msgpack, without prompt and pickled fields.
        prompt_ids: the prompt's token ids, little-endian int64.
        weights: version of the source's weights; KV of others is of no use to a target.
        context_tokens: prompt plus output tokens at the time of asking.
        max_new_tokens: the limit in force at home, after its own clamping.
        moves: moves of this request so far.
        reason: why the move was ordered.
        offers: transports that the source has, the fastest first.
    """

    source: Peer
    home: Peer
    fingerprint: str
    client_rid: str
    request: bytes
    prompt_ids: bytes
    weights: str
    context_tokens: int
    max_new_tokens: int
    moves: int
    reason: str
    offers: tuple[Offer, ...]


class Reserved(MoveMessage, frozen=True):
    """Target holds a slot for the request and reads KV by ``transport``.

    Attributes:
        transport: one of those offered; reason: why that one.
    """

    transport: str
    reason: str = ""


class Refused(MoveMessage, frozen=True):
    """Target cannot take the request, or can no longer; it holds nothing of it."""

    error_type: str
    message: str


class PagesReady(MoveMessage, frozen=True):
    """KV of token positions ``[start, end)`` lies in a slot of the source's staging memory.

    Attributes:
        slot, stamp: which, and what tells this content of it from any other.
        checksum: CRC-32 of the bytes; 0 if it was not taken.
    """

    start: int
    end: int
    slot: int
    stamp: int
    checksum: int = 0


class PagesTaken(MoveMessage, frozen=True):
    """Target has copied what had that ``stamp``; the source may use the slot again."""

    stamp: int


class Parked(MoveMessage, frozen=True):
    """The request is out of the source's batch; :class:`Commit` follows when its step is over.

    Attributes:
        step_ms: how long a decode step takes there.
    """

    step_ms: float


class MoveFacts(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What only the source knows about a move; see :class:`MoveReport` for the units."""

    source: str
    reason: str
    context_tokens: int
    precopied_tokens: int
    transport_bytes: int
    step_ms: float
    started_at: float
    transport: str = ""
    transport_reason: str = ""


class Commit(MoveMessage, frozen=True):
    """The request is parked at the source and everything the target still lacks is here.

    Attributes:
        weights: see :class:`Reserve`; they may have changed since.
        committed_tokens: KV positions copied in all = prompt + output - 1.
        output_ids: all output tokens so far.
        penalty_log: token ids its sampling penalties have accumulated so far, in order.
        predictor: fused predictor state, opaque to the protocol.
    """

    weights: str
    committed_tokens: int
    output_ids: tuple[int, ...]
    penalty_log: tuple[int, ...]
    predictor: bytes
    facts: MoveFacts


class Inserted(MoveMessage, frozen=True):
    """The request decodes at ``host`` from now on; sent to the source and to the home.

    Attributes:
        home: whose stream it is.
        moves: of this request so far, this one included: a home that hears of two in the wrong
            order knows the later one by it.
    """

    host: Peer
    home: Peer
    facts: MoveFacts
    moves: int


class TokenChunk(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a host decoded of one stream.

    Attributes:
        migration_id, stream_id: see :class:`Route`.
        index: position in the request's output of the first token of this chunk; a chunk whose
            index is below what home already has is a duplicate, above it early.
        token_ids: the new tokens.
        details: logprobs and the like, msgpack, aligned with ``token_ids``; empty if none.
        remaining: estimate after the last token, at :data:`QUANTILE_LEVELS`.
        finished: JSON of SGLang's finish reason once the request is over, else empty.
    """

    migration_id: str
    stream_id: str
    index: int
    token_ids: tuple[int, ...]
    details: bytes = b""
    remaining: tuple[float, ...] = ()
    finished: bytes = b""


class Tokens(Message, frozen=True):
    """What a host decoded in one step for one home, sent there.

    Attributes:
        receiver: incarnation it is meant for.
    """

    receiver: int
    chunks: tuple[TokenChunk, ...]


class Release(MoveMessage, frozen=True):
    """The receiver shall drop what it holds of this stream: abort, cancel, reclaim, ghost."""

    reason: str


class Heartbeat(Message, frozen=True):
    """The sender is there.

    Attributes:
        receiver: incarnation it is meant for.
        live: streams the sender believes it shares with the receiver. A stream one side holds
            and the other has not listed for the peer time-out is an orphan and is dropped.
    """

    sender: Peer
    receiver: int
    live: tuple[str, ...] = ()


PeerMessage = MoveMessage | Tokens | Heartbeat
"""What instances send each other; a receiver drops what is not for its present incarnation."""

AnyMessage = (
    InstanceStatus
    | StatusOrder
    | MigrateOrder
    | DisarmOrder
    | DrainOrder
    | UndrainOrder
    | OrderReply
    | Reserve
    | Reserved
    | Refused
    | PagesReady
    | PagesTaken
    | Parked
    | Commit
    | Inserted
    | Tokens
    | Release
    | Heartbeat
)

_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw])
_body_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Serialise one message with its envelope."""
    return _encoder.encode((PROTOCOL_VERSION, message))


def decode(data: bytes | memoryview) -> Any:
    """Deserialise one message.

    Raises:
        VersionMismatch: the envelope is ours, its version is not.
        MalformedMessage: anything else.
    """
    try:
        version, body = _envelope_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a STAR message: {error}") from error
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"peer speaks STAR protocol {version}, this instance {PROTOCOL_VERSION}",
            hint="run the same sglang-star release on every instance and router",
        )
    try:
        return _body_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a STAR message body: {error}") from error
