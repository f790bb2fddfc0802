"""Keep-alive HTTP/1.1 connections to instances, made for passing streams through.

A general client parses every chunk into an object, queues it and wakes a task. Here a response
is handed on from the socket's own callback, framing and all, so a token costs the router a few
microseconds; that is what lets a Python router stand beside a compiled one.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Final, cast

from sglang_star.errors import PeerError
from sglang_star_router.config import Endpoint
from sglang_star_router.framing import ChunkScanner, FramingError, ResponseHead

MAX_HEAD: Final = 64 * 1024
IDLE_S: Final = 4.0
"""Idle connections older than this are not used: SGLang's server closes them after 5 s."""


class UpstreamLost(PeerError):
    """The connection ended before the response did.

    Attributes:
        stale: it was a kept-alive one and not a byte had come back, so that the server may
            simply have closed it for idleness: try again on a fresh one.
    """

    stale: bool = False


class Connection(asyncio.Protocol):
    """One connection; one request at a time.

    Attributes:
        opened: resolves to the head once the first body byte, or the end, is there too: until
            then nothing has reached a client and another instance may be asked instead.
        finished: resolves when the whole response has been handed on.
        received: bytes of this response so far.
    """

    finished: asyncio.Future[None]
    opened: asyncio.Future[ResponseHead]

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.received = 0
        self.idle_since = 0.0
        self.scanner: ChunkScanner | None = None
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._busy = False
        self._used = False
        self._reused = False
        self._detached = False
        self._bodiless = False
        self._payload: list[bytes] | None = None
        self._head: ResponseHead | None = None
        self._block = b""
        self._left: int | None = None
        self._early: list[bytes] = []
        self._sink: Callable[[bytes], None] | None = None

    # ------------------------------------------------------------------ for the caller

    def send(self, block: bytes, *, unframe: bool, bodiless: bool) -> None:
        """Send one request.

        Args:
            block: head and body.
            unframe: hand on the body without its chunked framing.
            bodiless: it is a HEAD request.
        """
        loop = asyncio.get_running_loop()
        self.opened = loop.create_future()
        self.finished = loop.create_future()
        self.received = 0
        self.scanner = None
        self._reused, self._used = self._used, True
        self._busy, self._detached, self._bodiless = True, False, bodiless
        self._payload = [] if unframe else None
        self._head, self._block, self._left = None, b"", None
        self._early, self._sink = [], None
        assert self._transport is not None
        self._transport.write(block)

    def relay(self, sink: Callable[[bytes], None]) -> None:
        """Give every body byte, those that came already first, to ``sink``."""
        self._sink = sink
        if self._early:
            sink(b"".join(self._early))
            self._early = []

    def discard(self) -> None:
        """Read the response to its end for nobody; its failure concerns nobody either."""
        self._detached = True
        self._sink = _nowhere
        self._early = []

    async def collect(self) -> bytes:
        """Return the whole body, without framing."""
        parts: list[bytes] = []
        self.relay(parts.append)
        await self.finished
        body = b"".join(parts)
        if self.scanner is None or self._payload is not None:
            return body
        content: list[bytes] = []
        ChunkScanner().feed(body, content)
        return b"".join(content)

    def abort(self) -> None:
        """Drop the connection unless the response is complete; the instance sees a disconnect."""
        if self._busy:
            self._detached = True
            self._close()

    def close(self) -> None:
        """Close the connection whatever it is doing."""
        self._detached = True
        self._close()

    def pause(self) -> None:
        """Stop reading until :meth:`resume`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def usable(self) -> bool:
        """True while another request may be sent."""
        return (
            not self._busy
            and self._transport is not None
            and not self._transport.is_closing()
            and time.monotonic() - self.idle_since < IDLE_S
        )

    # ------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand on what arrived."""
        if not self._busy:
            self._close()
            return
        self.received += len(data)
        try:
            if self._head is None:
                self._read_head(data)
            else:
                self._read_body(data)
        except FramingError as error:
            self._fail(f"{self.endpoint.url} broke HTTP framing: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the response, well or badly."""
        self._pool.forget(self)
        if not self._busy:
            return
        if self._head is not None and self._left is None and self.scanner is None:
            self._finish(reusable=False)
            return
        self._fail(f"{self.endpoint.url} closed the connection{f': {exc}' if exc else ''}")

    # ------------------------------------------------------------------ inside

    def _read_head(self, data: bytes) -> None:
        self._block += data
        end = self._block.find(b"\r\n\r\n")
        if end < 0:
            if len(self._block) > MAX_HEAD:
                raise FramingError("endless response head")
            return
        head = ResponseHead.parse(self._block[:end], bodiless=self._bodiless)
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
        scanner, ended = self.scanner, False
        overrun = False
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
        if not self.opened.done():
            assert self._head is not None
            self.opened.set_result(self._head)
        if ended:
            assert self._head is not None
            self._finish(reusable=self._head.reusable and not overrun)

    def _finish(self, *, reusable: bool) -> None:
        self._busy = False
        if not self.opened.done():
            assert self._head is not None
            self.opened.set_result(self._head)
        if not self.finished.done():
            self.finished.set_result(None)
        if reusable:
            self._pool.release(self)
        else:
            self._close()

    def _fail(self, message: str) -> None:
        self._busy = False
        self._close()
        if self._detached:
            self.opened.cancel()
            self.finished.cancel()
            return
        error = UpstreamLost(message)
        error.stale = self._reused and self.received == 0
        waiter = self.finished if self.opened.done() else self.opened
        if not waiter.done():
            waiter.set_exception(error)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Pool:
    """Idle connections by instance, the most recently used first."""

    def __init__(self, connect_timeout_s: float = 5.0) -> None:
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)
        self._connect_timeout_s = connect_timeout_s
        self._tls: ssl.SSLContext | None = None
        self._all: set[Connection] = set()

    async def send(
        self, endpoint: Endpoint, block: bytes, *, unframe: bool = False, bodiless: bool = False
    ) -> Connection:
        """Send ``block`` on a kept or a new connection.

        Raises:
            PeerError: the instance does not accept connections.
        """
        idle = self._idle[endpoint.url]
        while idle:
            connection = idle.pop()
            if connection.usable:
                break
            connection.close()
        else:
            connection = await self._connect(endpoint)
        connection.send(block, unframe=unframe, bodiless=bodiless)
        return connection

    async def _connect(self, endpoint: Endpoint) -> Connection:
        if endpoint.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self, endpoint),
                    endpoint.host,
                    endpoint.port,
                    ssl=self._tls if endpoint.tls else None,
                )
        except (OSError, TimeoutError) as error:
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

    def close(self) -> None:
        """Close every connection."""
        for connection in tuple(self._all):
            connection.close()


def _nowhere(data: bytes) -> None:
    """Sink of a response nobody reads."""
