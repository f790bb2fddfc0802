"""Keep-alive HTTP/1.1 connections to instances, made for passing streams through.

A general client parses every chunk into an object, queues it and wakes a task. Here a response
is handed on from the socket's own callback, framing and all, so a token costs the router a few
microseconds; that is what lets a Python router stand beside a compiled one.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final, cast

from sglang_star.errors import PeerError
from sglang_star_router.config import Endpoint
from sglang_star_router.descriptors import is_local
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
IDLE_S: Final = 4.0
"""Idle connections older than this are not used: SGLang's server closes them after 5 s."""


class UpstreamLost(PeerError):
    """The connection ended before the response did.

    Attributes:
        stale: it was a kept-alive one and not a byte had come back, so that the server may
            simply have closed it for idleness: try again on a fresh one.
    """

    stale: bool = False


class OutOfResources(PeerError):
    """This machine has no descriptor, port or memory for a connection; no instance is to blame."""


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
        connection: Connection,
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
            self.fail(f"{self._connection.endpoint.url} broke HTTP framing: {error}")

    def end_of_connection(self, reason: str) -> None:
        """End the response, well if only the connection's end could end it."""
        if self._done:
            return
        if self._head is not None and self._left is None and self.scanner is None:
            self._finish(reusable=False)
        else:
            self.fail(f"{self._connection.endpoint.url} closed the connection{reason}")

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


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.transport: asyncio.Transport
        self.idle_since = 0.0
        self._pool = pool
        self._exchange: Exchange | None = None
        self._used = False

    def send(self, block: Sequence[bytes], *, unframe: bool, bodiless: bool) -> Exchange:
        """Send one request, head and body in pieces."""
        self._exchange = Exchange(self, unframe=unframe, bodiless=bodiless, fresh=not self._used)
        self._used = True
        self.transport.writelines(block)
        return self._exchange

    @property
    def usable(self) -> bool:
        """True while another request may be sent."""
        young = time.monotonic() - self.idle_since < IDLE_S
        return self._exchange is None and not self.transport.is_closing() and young

    def exchanged(self, *, reusable: bool) -> None:
        """End the exchange."""
        self._exchange = None
        if reusable and not self.transport.is_closing():
            self._pool.release(self)
        else:
            self.close()

    def close(self) -> None:
        """Close at once, whatever is going on."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand on what arrived; an idle server has nothing to say."""
        if self._exchange is None:
            self.close()
        else:
            self._exchange.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange, if there is one."""
        self._pool.forget(self)
        if self._exchange is not None:
            self._exchange.end_of_connection(f": {exc}" if exc else "")


class Pool:
    """Idle connections by instance, the most recently used first."""

    def __init__(
        self, connect_timeout_s: float = 5.0, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._all: set[Connection] = set()

    async def send(
        self,
        endpoint: Endpoint,
        block: Sequence[bytes],
        *,
        unframe: bool = False,
        bodiless: bool = False,
        deadline: float = math.inf,
    ) -> Exchange:
        """Send a request on a kept or a new connection.

        Args:
            block: head and body, in pieces.
            unframe: hand on the response body without its chunked framing.
            bodiless: it is a HEAD request.
            deadline: loop time until which a connection may take to be made, at the longest.

        Raises:
            TimeoutError: the deadline has passed.
            PeerError: the instance does not accept connections.
            OutOfResources: this machine cannot make one.
        """
        idle = self._idle[endpoint.url]
        while idle:
            connection = idle.pop()
            if connection.usable:
                break
            connection.close()
        else:
            connection = await self._connect(endpoint, deadline)
        return connection.send(block, unframe=unframe, bodiless=bodiless)

    async def _connect(self, endpoint: Endpoint, deadline: float) -> Connection:
        loop = asyncio.get_running_loop()
        if endpoint.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + self._connect_timeout_s)):
                _, connection = await loop.create_connection(
                    lambda: Connection(self, endpoint),
                    endpoint.host,
                    endpoint.port,
                    ssl=self._tls if endpoint.tls else None,
                )
        except (OSError, TimeoutError, UnicodeError) as error:
            if isinstance(error, TimeoutError) and loop.time() >= deadline:
                raise
            if is_local(error):
                self._trim()
                raise OutOfResources(
                    f"cannot open a connection: {error}",
                    hint="raise the limit of open files (ulimit -n), or run more routers",
                ) from error
            raise PeerError(
                f"cannot connect to {endpoint.url}: {error or type(error).__name__}",
                hint="check that the instance runs and that the router can reach it",
            ) from error
        self._all.add(connection)
        return connection

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        connection.idle_since = time.monotonic()
        self._idle[connection.endpoint.url].append(connection)

    def forget(self, connection: Connection) -> None:
        """Drop a connection that has ended."""
        self._all.discard(connection)
        idle = self._idle[connection.endpoint.url]
        if connection in idle:
            idle.remove(connection)

    @property
    def open(self) -> int:
        """Connections, idle ones among them."""
        return len(self._all)

    def _trim(self) -> None:
        """Close what is idle: its descriptors are wanted."""
        for idle in self._idle.values():
            for connection in tuple(idle):
                connection.close()

    def close(self) -> None:
        """Close every connection."""
        for connection in tuple(self._all):
            connection.close()


def _nowhere(data: bytes) -> None:
    """Sink of a response nobody reads."""
