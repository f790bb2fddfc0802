"""Comments to a client whose stream is held, so that nothing between us hangs up for silence.

With the first comment the answer has begun: its status is 200 whatever follows, and what fails
later can only be told as an event.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from sglang_star_router.framing import ResponseHead
from sglang_star_router.replies import error_event

EXTRA_HEAD: Final = web.RequestKey("extra_head", bytes)
"""Where a request keeps header lines that its answer must carry, as bytes."""
COMMENT: Final = b": held\n\n"
FULL: Final = 64 * 1024
"""Unsent bytes at which a client that does not read is sent no more comments."""


class Early:
    """The beginning of one stream, before any instance has answered.

    Attributes:
        begun: a head has been sent.
    """

    def __init__(self, request: web.Request, every_s: float) -> None:
        self.begun = False
        self.stays = bool(request.keep_alive)
        self._request = request
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Send a comment now and then from now on."""
        if self._every_s and self._request.version >= (1, 1):
            self._request[EARLY] = self
            self._task = asyncio.create_task(self._comment())

    def stop(self) -> bool:
        """Send no more; return whether the answer has begun."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        return self.begun

    def end(self, error: bytes) -> None:
        """End the stream with an error, as JSON."""
        event = error_event(error, self._request.path)
        transport = self._request.transport
        if transport is not None:
            transport.write(_chunk(event) + b"0\r\n\r\n")

    async def _comment(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            transport = self._request.transport
            if transport is None or transport.get_write_buffer_size() > FULL:
                continue
            head = b"" if self.begun else self._head()
            self.begun = True
            transport.write(head + _chunk(COMMENT))

    def _head(self) -> bytes:
        close = b"" if self.stays else b"Connection: close\r\n"
        extra = self._request.get(EXTRA_HEAD) or b""
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n" + extra + close + b"\r\n"
        )


EARLY: Final = web.RequestKey("early", Early)


def stop(request: web.Request) -> Early | None:
    """The beginning that has been made of a request's answer, if any; it goes no further."""
    early = request.get(EARLY)
    return early if early is not None and early.stop() else None


def continues(head: ResponseHead) -> bool:
    """Whether an answer can follow comments as it is: a chunked stream of events."""
    return (
        head.status == 200 and head.chunked and head.content_type.startswith(b"text/event-stream")
    )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
