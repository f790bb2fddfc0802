"""One request to an instance and its response, handed on as it comes.

A general client parses every chunk into an object, queues it and wakes a task. Here a response
is handed on from the socket's own callback, framing and all, so a token costs the router a few
microseconds; that is what lets a Python router stand beside a compiled one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from sglang_star.errors import PeerError
from sglang_star_router.first_event import end_of_event
from sglang_star_router.framing import (
    ChunkScanner,
    FramingError,
    ResponseHead,
    parse_head,
    unframed,
)

MAX_HEAD: Final = 64 * 1024
FIRST_EVENT: Final = 64 * 1024
"""A longer first event, or a longer answer in one piece, is not waited for as a whole."""


class UpstreamLost(PeerError):
    """The connection ended before the response did.

    Attributes:
        stale: it was a kept-alive one and not a byte had come back, so that the server may
            simply have closed it for idleness: try again on a fresh one.
    """

    stale: bool = False


class Carrier(Protocol):
    """The connection that carries an exchange."""

    @property
    def url(self) -> str:
        """Of the instance."""

    @property
    def transport(self) -> asyncio.Transport:
        """To pause and resume."""

    def exchanged(self, *, reusable: bool) -> None:
        """Take the connection back."""

    def close(self) -> None:
        """Close it at once."""


class Exchange:
    """One request and its response.

    A response may be complete before its reader has woken up; its connection serves the next
    request only once somebody has taken the body.

    Attributes:
        opened: resolves to the head once the answer has begun: a stream's first event is there,
            or the whole of a plain answer, or too much of either to wait on. Until then nothing
            has reached a client and another instance may be asked instead.
        finished: resolves when the whole response has been handed on.
        scanner: follows the body's chunks; None if it is not chunked.
        heard_at: when bytes last came, monotonic seconds.
    """

    __slots__ = (
        "_block",
        "_bodiless",
        "_connection",
        "_detached",
        "_done",
        "_early",
        "_early_size",
        "_head",
        "_left",
        "_payload",
        "_reusable",
        "_sink",
        "finished",
        "fresh",
        "heard_at",
        "opened",
        "scanner",
    )  # fmt: skip

    def __init__(
        self,
        connection: Carrier,
        *,
        unframe: bool,
        bodiless: bool,
        fresh: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[ResponseHead] = loop.create_future()
        self.finished: asyncio.Future[None] = loop.create_future()
        self.scanner: ChunkScanner | None = None
        self.fresh = fresh
        self.heard_at = time.monotonic()
        self._connection = connection
        self._bodiless = bodiless
        self._payload: list[bytes] | None = [] if unframe else None
        self._detached = False
        self._done = False
        self._reusable = False
        self._head: ResponseHead | None = None
        self._block = b""
        self._left: int | None = None
        self._early: list[bytes] = []
        self._early_size = 0
        self._sink: Callable[[bytes], None] | None = None

    # ------------------------------------------------------------------ for the caller

    def relay(self, sink: Callable[[bytes], None]) -> None:
        """Give every body byte, those that came already first, to ``sink``."""
        self._sink = sink
        if self._early:
            sink(b"".join(self._early))
            self._early = []
        self._settle()

    def beginning(self) -> bytes:
        """The body up to the end of its first event, as far as it is there, without framing."""
        data = b"".join(self._early)
        data = data[: end_of_event(data)]
        if self.scanner is None or self._payload is not None:
            return data
        return unframed(data)

    def discard(self) -> None:
        """Read the response to its end for nobody; its failure concerns nobody either."""
        self._detached = True
        self.relay(_nowhere)

    async def collect(self) -> bytes:
        """Return the whole body, without framing.

        Raises:
            UpstreamLost: the connection ended first.
        """
        parts: list[bytes] = []
        self.relay(parts.append)
        await self.finished
        body = b"".join(parts)
        if self.scanner is None or self._payload is not None:
            return body
        return unframed(body)

    def abort(self) -> None:
        """Drop the connection unless the response is complete; the instance sees a disconnect."""
        self._detached = True
        if not self._done:
            self._done = True
            self._connection.close()
        elif self._sink is None:
            self.discard()

    def pause(self) -> None:
        """Stop reading until :meth:`resume`."""
        if not self._done:
            self._connection.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if not self._done:
            self._connection.transport.resume_reading()

    # ------------------------------------------------------------------ for the connection

    def feed(self, data: bytes) -> None:
        """Take bytes from the socket."""
        self.heard_at = time.monotonic()
        try:
            if self._head is None:
                self._read_head(data)
            else:
                self._read_body(data)
        except FramingError as error:
            self.fail(f"{self._connection.url} broke HTTP framing: {error}")

    def end_of_connection(self, reason: str) -> None:
        """End the response, well if only the connection's end could end it."""
        if self._done:
            return
        if self._head is not None and self._left is None and self.scanner is None:
            self._finish(reusable=False)
        else:
            self.fail(f"{self._connection.url} closed the connection{reason}")

    def fail(self, message: str) -> None:
        """End the response badly."""
        if self._done:
            return
        self._done = True
        self._connection.close()
        if self._detached:
            return
        error = UpstreamLost(message)
        error.stale = not self.fresh and self._head is None and not self._block
        waiter = self.finished if self.opened.done() else self.opened
        waiter.set_exception(error)
        # A caller that is still waiting for the other half of a pair may never look.
        waiter.exception()

    def _read_head(self, data: bytes) -> None:
        self._block += data
        end = self._block.find(b"\r\n\r\n")
        if end < 0:
            if len(self._block) > MAX_HEAD:
                raise FramingError("endless response head")
            return
        head = parse_head(self._block[:end], bodiless=self._bodiless)
        rest, self._block = self._block[end + 4 :], b""
        if head.status < 200:
            if rest:
                self._read_head(rest)
            return
        self._head = head
        self.scanner = ChunkScanner() if head.chunked else None
        self._left = head.length
        if rest or self._left == 0:
            self._read_body(rest)

    def _read_body(self, data: bytes) -> None:
        scanner, ended, overrun = self.scanner, False, False
        if scanner is not None:
            used = scanner.feed(data, self._payload)
            overrun, ended = used < len(data), scanner.done
            if self._payload is not None:
                data = b"".join(self._payload)
                self._payload.clear()
            elif overrun:
                data = data[:used]
        elif self._left is not None:
            overrun = len(data) > self._left
            data = data[: self._left] if overrun else data
            self._left -= len(data)
            ended = self._left == 0
        if data:
            if self._sink is not None:
                self._sink(data)
            else:
                self._early.append(data)
                self._early_size += len(data)
        head = self._head
        assert head is not None
        if ended:
            self._finish(reusable=head.reusable and not overrun)
        elif not self.opened.done() and self._has_begun(head, data):
            self.opened.set_result(head)

    def _has_begun(self, head: ResponseHead, data: bytes) -> bool:
        if not data:
            return False
        if self._early_size > FIRST_EVENT:
            return True
        if head.content_type.startswith(b"text/event-stream"):
            # Nearly always the first event comes in one piece.
            whole = data if len(self._early) == 1 else b"".join(self._early)
            return end_of_event(whole) is not None
        return self._left is None or self._left + self._early_size > FIRST_EVENT

    def _finish(self, *, reusable: bool) -> None:
        self._done = True
        self._reusable = reusable
        if not self.opened.done():
            assert self._head is not None
            self.opened.set_result(self._head)
        self._settle()

    def _settle(self) -> None:
        if not self._done or self._sink is None or self.finished.done():
            return
        self.finished.set_result(None)
        self._connection.exchanged(reusable=self._reusable)


def _nowhere(data: bytes) -> None:
    """Sink of a response nobody reads."""
