"""What the protocol of moves asks of an engine: everything, and nothing of SGLang.

:class:`~sglang_star.engine.real.SglangEngine` is the engine that serves; the simulation has one of
its own. All verbs are called between two decode steps, on the scheduler's thread, unless they say
otherwise; none of them waits.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any, Protocol


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

    def gather(self, req: Request, start: int, end: int, slot: Any) -> None:
        """Copy KV of positions ``[start, end)`` into a carrier's slot."""

    def release(self, req: Request, *, keep_prefix: bool) -> None:
        """Give back its slot and KV; ``keep_prefix`` leaves the KV in the prefix cache."""

    # ------------------------------------------------------------------ arriving

    def rebuild(self, message: bytes, prompt: bytes, rid: str) -> None:
        """Make a request of what :meth:`describe` gave, under another name.

        The engine hands it to :meth:`Target.rebuilt`, now or once its grammar is compiled, or
        never, if it does not accept such a request.

        Raises:
            MalformedMessage: the bytes are not such a message.
        """

    def compiles(self, rid: str) -> bool:
        """Whether a request of that name waits for its grammar."""

    def refusal(self, req: Request) -> str:
        """Why a request that was just rebuilt ended at once; empty if it did not."""

    def seat(self, req: Request, max_new_tokens: int) -> bool:
        """Give a request without KV a slot of its own; False if none is free."""

    def held(self, req: Request) -> int:
        """Positions it has KV memory for."""

    def extend(self, req: Request, length: int) -> bool:
        """Allocate KV for positions ``[0, length)``; False if memory is full.

        The grammar of a guest takes in what it is known to have put out there.

        Raises:
            OrderRefused: its grammar does not accept that.
        """

    def scatter(self, req: Request, start: int, end: int, slot: Any) -> None:
        """Copy a carrier's slot into KV of positions ``[start, end)``.

        Raises:
            OrderRefused: the slot does not hold that many.
        """

    def adopt(self, req: Request, output_ids: Sequence[int]) -> None:
        """Give a rebuilt request the output it has had elsewhere.

        Raises:
            OrderRefused: its grammar does not accept it.
        """

    def join(self, req: Request, length: int, penalty_log: Sequence[int], predictor: bytes) -> None:
        """Let a request whose KV is complete decode here from the next step on.

        Raises:
            OrderRefused: ``length`` is not the positions it must have, or has.
            MalformedMessage: what the predictor remembers does not decode.
        """

    # ------------------------------------------------------------------ the client's stream

    def append(self, req: Request, tokens: Sequence[int], details: bytes) -> None:
        """Append tokens that were decoded elsewhere, and see whether the output ends with them.

        May be called while a step runs.

        Raises:
            MalformedMessage: ``details`` are not what :meth:`details` gave.
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
