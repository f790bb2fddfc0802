"""The last hop: an instance's answer onto the client's socket, byte for byte."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from sglang_star_router import early
from sglang_star_router.closing import CUT
from sglang_star_router.exchange import Exchange, UpstreamLost
from sglang_star_router.framing import ResponseHead
from sglang_star_router.replies import openai_error, sse_error

logger = logging.getLogger(__name__)

HIGH_WATER: Final = 64 * 1024
"""Unsent bytes at which the instance is not read further: aiohttp's own limit."""


class Relayed(web.StreamResponse):
    """Tells aiohttp that the answer has been written already.

    Attributes:
        lost: the instance failed after the stream had begun.
    """

    def __init__(self, status: int, keep_alive: bool) -> None:
        super().__init__(status=status)
        self.lost = False
        self.stays = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        """Whether the client's connection takes another request."""
        return self.stays

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Do nothing: the head is out."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: so is the end."""


class _Client:
    """Writes to the client and holds the instance back while the client does not keep up."""

    __slots__ = (
        "_draining", "_exchange", "_pending", "_request", "_transport", "last", "old", "path",
    )  # fmt: skip

    def __init__(
        self,
        request: web.Request,
        transport: asyncio.Transport,
        exchange: Exchange,
        head: bytes,
    ) -> None:
        self._request = request
        self.path = request.path
        self._transport = transport
        self._exchange = exchange
        self._pending = head
        self._draining: asyncio.Task[None] | None = None
        self.last = b""
        self.old = request.version < (1, 1)

    @property
    def behind(self) -> bool:
        """The client does not keep up: the instance is silent because it is not read."""
        return self._draining is not None

    def __call__(self, data: bytes) -> None:
        self.last = data
        if self._pending:
            data, self._pending = self._pending + data, b""
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > HIGH_WATER and self._draining is None:
            self._exchange.pause()
            self._draining = asyncio.ensure_future(self._drain())

    def finish(self) -> None:
        """Send the head if no body followed it."""
        if self._pending:
            self._transport.write(self._pending)
            self._pending = b""

    async def _drain(self) -> None:
        try:
            await self._request.writer.drain()
        except ConnectionError:
            return
        finally:
            self._draining = None
        self._exchange.resume()


async def relay(
    request: web.Request,
    exchange: Exchange,
    head: ResponseHead,
    deadline: float,
    silence_s: float = math.inf,
) -> Relayed:
    """Pass a response through.

    Args:
        exchange: its ``opened`` has resolved to ``head``.
        deadline: loop time at which the instance is given up.
        silence_s: silence after which it is, too.

    Raises:
        ConnectionResetError: the client has gone.
    """
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client closed the connection")
    begun = early.stop(request)
    if begun is not None and not early.continues(head):
        return await _as_event(begun, exchange, head)
    old_client = request.version < (1, 1)
    keep_alive = request.keep_alive and not old_client
    response = Relayed(head.status, keep_alive and (head.chunked or head.length is not None))
    extra = request.get(early.EXTRA_HEAD, b"")
    out = _head_bytes(head, old_client, response.stays, extra) if begun is None else b""
    client = _Client(request, transport, exchange, out)
    try:
        exchange.relay(client)
        await _finished(client, exchange, deadline, silence_s)
        client.finish()
        if not response.stays:
            await request.writer.drain()
    except UpstreamLost as error:
        _end_badly(client, transport, exchange, head, response, str(error))
    except asyncio.CancelledError:
        if request.app[CUT]:
            _end_badly(client, transport, exchange, head, response, "the router shuts down")
        raise
    except Exception as error:
        if not isinstance(error, ConnectionError):
            # The head is out: an error page would be read as part of the answer.
            transport.abort()
        raise
    return response


async def _as_event(begun: early.Early, exchange: Exchange, head: ResponseHead) -> Relayed:
    """Tell what is no stream of events to a client whose stream has begun."""
    response = Relayed(head.status, begun.stays)
    try:
        begun.end(await exchange.collect())
    except UpstreamLost as error:
        response.lost = True
        begun.end(openai_error(error.message, 502, "upstream_error"))
    return response


class _Patience:
    """Ends a response whose instance is silent for too long, or does not finish in time.

    One timer at a time, and none moved for a token: it looks again when the silence that began
    with the last token it knows of would be too long.
    """

    __slots__ = ("_client", "_deadline", "_exchange", "_loop", "_silence_s", "_timer")

    def __init__(
        self, client: _Client, exchange: Exchange, deadline: float, silence_s: float
    ) -> None:
        self._client = client
        self._exchange = exchange
        self._deadline = deadline
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look whether it is too late, and again when it could be."""
        left = self._exchange.heard_at + self._silence_s - time.monotonic()
        if left <= 0 and self._client.behind:
            left = self._silence_s
        if left <= 0:
            self._exchange.fail(f"nothing came for {self._silence_s:g} s")
        elif self._loop.time() >= self._deadline:
            self._exchange.fail("not finished within the time limit")
        else:
            due = min(left, self._deadline - self._loop.time())
            self._timer = self._loop.call_later(due, self.start)

    def end(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _finished(client: _Client, exchange: Exchange, deadline: float, silence_s: float) -> None:
    """Wait until the whole response has been handed on.

    Raises:
        UpstreamLost: the instance broke off, or took too long.
    """
    patience = _Patience(client, exchange, deadline, silence_s)
    patience.start()
    try:
        await exchange.finished
    finally:
        patience.end()


def _head_bytes(head: ResponseHead, old_client: bool, stays: bool, extra: bytes) -> bytes:
    lines = head.lines
    if old_client and head.chunked:
        lines = tuple(line for line in lines if not line.lower().startswith(b"transfer-encoding"))
    if not stays:
        lines = (*lines, b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n" + extra + b"\r\n"


def _end_badly(
    client: _Client,
    transport: asyncio.Transport,
    exchange: Exchange,
    head: ResponseHead,
    response: Relayed,
    message: str,
) -> None:
    """End a stream that has begun: with an error event where one fits, else by hanging up."""
    response.lost = True
    logger.warning("stream broken: %s", message)
    scanner = exchange.scanner
    if (
        head.content_type.startswith(b"text/event-stream")
        and scanner is not None
        and scanner.at_boundary
    ):
        whole = client.last.endswith(b"\n\n" if client.old else b"\n\n\r\n")
        event = b"" if whole else b"\n\n"
        event += sse_error(f"the instance failed: {message}", 502, "upstream_error", client.path)
        if not client.old:
            # The framing is whole, and the head has promised that the connection stays.
            event = b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event)
        transport.write(event)
        return
    response.stays = False
    # A truncated body must look truncated: whatever we appended could pass for the answer.
    transport.abort()
