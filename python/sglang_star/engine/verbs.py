"""What the protocol of moves asks of an engine: everything, and nothing of SGLang.

:class:`~sglang_star.engine.real.SglangEngine` is the engine that serves; the simulation has one of
its own. All verbs are called between two decode steps, on the scheduler's thread, unless they say
otherwise; none of them waits.

A copy of KV is begun by one verb and is over later. It has a *ticket*, a number: 1, 2, 3 ... in
the order in which copies are begun here. Whether the copy of a ticket is over is looked up once per
step boundary (:meth:`Engine.poll`) and does not change until the next; one that was over when its
verb returned may be known to be at once. Copies need not be over in the order of their tickets: a
peer that is slow to be read holds up nobody else's. What went wrong with a copy is said of its
ticket and not raised, so that several ranks can agree on it.
"""

from __future__ import annotations

from collections.abc import Collection, MutableSequence, Sequence
from typing import Any, Protocol

from sglang_star.migration.transport.base import Fetch


class Request(Protocol):
    """A request as the protocol sees it; all else about it is asked of its engine.

    Attributes:
        rid: its name on this engine.
        output_ids: the output so far.
    """

    rid: str
    output_ids: MutableSequence[int]

    def finished(self) -> bool:
        """Whether the output has come to its end."""


class Engine(Protocol):
    """One engine.

    Attributes:
        unsupported: why no KV of this engine can move; empty if it can.
        page_size: tokens per KV page; token_bytes: bytes of KV per token over all layers.
        serves_decode: whether requests decode here: not on a prefill instance.
    """

    unsupported: str
    page_size: int
    token_bytes: int
    serves_decode: bool

    # ------------------------------------------------------------------ time and names

    def now(self) -> float:
        """Seconds of a clock that never jumps; only ever compared with itself."""

    def wall(self) -> float:
        """Seconds since the epoch, for reports."""

    def new_id(self) -> str:
        """A name that nobody else has or can guess."""

    def weights(self) -> str:
        """Version and checksum of the model's weights; KV of others is of no use here."""

    def is_paused(self) -> bool:
        """Whether no step is made, by order."""

    # ------------------------------------------------------------------ room

    def free_tokens(self) -> int:
        """KV tokens that could be allocated now, evicting cached prefixes if need be."""

    def has_slot(self, arriving: int) -> bool:
        """Whether one more request may run here beside those that run and ``arriving`` others."""

    def retracted(self) -> int:
        """Requests that were taken out of the batch and wait for KV memory."""

    def kept_free(self, guests: int) -> int:
        """KV tokens that are to stay free for those that run once ``guests`` more are here."""

    # ------------------------------------------------------------------ requests

    def running(self) -> Sequence[Request]:
        """Those that decode, in whatever batch they are between two steps."""

    def is_running(self, req: Request) -> bool:
        """Whether the request decodes and will decode again."""

    def is_ending(self, req: Request) -> bool:
        """Whether the request will end with its next result, whatever that is."""

    def pinned(self, req: Request) -> str:
        """Why this request cannot move; empty if it can."""

    def tokens(self, req: Request) -> int:
        """Prompt and output tokens so far."""

    def max_new_tokens(self, req: Request) -> int:
        """The limit on its output."""

    def written(self, req: Request) -> int:
        """Positions whose KV is complete once it is settled: all but the last token's."""

    def is_settled(self, req: Request) -> bool:
        """Whether no step of the parked request is in flight any more."""

    # ------------------------------------------------------------------ leaving

    def park(self, req: Request) -> None:
        """Take the request out of the batch; a step in flight still counts."""

    def unpark(self, req: Request) -> None:
        """Put a settled request back into the batch."""

    def describe(self, req: Request) -> tuple[bytes, bytes]:
        """What :meth:`rebuild` needs: the request's message, and its prompt's token ids."""

    def state(self, req: Request) -> tuple[tuple[int, ...], bytes]:
        """What :meth:`join` needs: accumulated penalties, and what the predictor remembers."""

    def gather(self, req: Request, start: int, end: int, slot: Any) -> int:
        """Begin to copy KV of positions ``[start, end)`` into a slot's memory; the ticket of that.

        The slot must stay until the copy is over. The request need not: what is read of pages that
        were given away meanwhile is not KV any more, and nobody may be told of it.
        """

    def release(self, req: Request, *, keep_prefix: bool, after: Collection[int] = ()) -> None:
        """Give back its slot and KV; ``keep_prefix`` leaves the KV in the prefix cache.

        Args:
            req: holds none of it any more when this returns.
            keep_prefix: only of KV that is complete.
            after: tickets; what is here is given back only once all these copies are over.
        """

    # ------------------------------------------------------------------ copies

    def poll(self) -> None:
        """A step boundary has come: see which copies are over, and give back what waited for it."""

    def copied(self, ticket: int) -> bool:
        """Whether that copy is over, in whatever way."""

    def failure(self, ticket: int) -> str:
        """Why a copy that is over did not succeed; empty if it did."""

    def draining(self) -> bool:
        """Whether KV that was released waits for a copy into it."""

    # ------------------------------------------------------------------ arriving

    def rebuild(self, message: bytes, prompt: bytes, rid: str) -> None:
        """Make a request of what :meth:`describe` gave, under another name.

        The engine hands it to :meth:`Target.rebuilt`, now or once its grammar is compiled, or
        never, if it does not accept such a request.

        Raises:
            MalformedMessage: the bytes are not such a message, or name no tokens of this model.
        """

    def compiles(self, rid: str) -> bool:
        """Whether a request of that name waits for its grammar."""

    def refusal(self, req: Request) -> str:
        """Why a request that was just rebuilt ended at once; empty if it did not."""

    def seat(self, req: Request, max_new_tokens: int) -> bool:
        """Give a request without KV a slot of its own; False if none is free.

        Raises:
            MalformedMessage: there can be no such limit.
        """

    def held(self, req: Request) -> int:
        """Positions it has KV memory for."""

    def extend(self, req: Request, length: int) -> bool:
        """Allocate KV for positions ``[0, length)``; False if memory is full.

        The grammar of a guest takes in what it is known to have put out there.

        Raises:
            OrderRefused: its grammar does not accept that.
        """

    def scatter(self, req: Request, start: int, end: int, fetch: Fetch) -> int:
        """Begin to copy what is fetched into KV of positions ``[start, end)``; its ticket.

        What is there may be used, and given back, only once the copy is over, and the fetch is
        closed by then. A fetch that fails, or was not intact, is a copy that failed.
        """

    def adopt(self, req: Request, output_ids: Sequence[int]) -> None:
        """Give a rebuilt request the output it has had elsewhere.

        Raises:
            OrderRefused: its grammar does not accept it.
            MalformedMessage: it is no output that such a request could have and go on.
        """

    def join(self, req: Request, length: int, penalty_log: Sequence[int], predictor: bytes) -> None:
        """Let a request whose KV is complete decode here from the next step on.

        Raises:
            OrderRefused: ``length`` is not the positions it must have, or has.
            MalformedMessage: penalties are of no tokens of this model, or what the predictor
                remembers does not decode.
        """

    # ------------------------------------------------------------------ the client's stream

    def append(self, req: Request, tokens: Sequence[int], details: bytes) -> None:
        """Append tokens that were decoded elsewhere, and see whether the output ends with them.

        May be called while a step runs.

        Raises:
            MalformedMessage: these are no tokens of this model, or ``details`` not what
                :meth:`details` gave of them.
        """

    def end(self, req: Request, reason: dict[str, Any] | None = None) -> None:
        """The output is over: by itself, or for a ``reason`` as :meth:`finish_reason` gives it."""

    def emit(self, reqs: Sequence[Request]) -> None:
        """Send what is new of these requests to their clients; while a step runs, too."""

    def details(self, req: Request, start: int, end: int) -> bytes:
        """Log-probabilities of the tokens ``[start, end)`` decoded here; empty if not wanted."""

    def finish_reason(self, req: Request) -> bytes:
        """Why the output ended, as JSON; empty while it goes on."""

    # ------------------------------------------------------------------ endings

    def abort(self, rid: str) -> None:
        """End a request of that name as its client would."""

    def requeue(self, req: Request) -> None:
        """Let a request whose KV was lost elsewhere be recomputed from its tokens."""
