"""Taking requests in: within limits of size, time and memory, and only what can be served."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from sglang_star_router.affinity import Affinity
from sglang_star_router.calls import Call
from sglang_star_router.closing import Closing
from sglang_star_router.config import RouterConfig
from sglang_star_router.dispatch import Dispatcher
from sglang_star_router.early import Early
from sglang_star_router.gate import Gate
from sglang_star_router.paths import PATHS
from sglang_star_router.reader import BodyReader
from sglang_star_router.replies import Rejected

PIECE: Final = 256 * 1024
"""Bytes of a body kept in one piece: what a client sends byte by byte is not kept so."""
CONTROL_BYTES: Final = 1024 * 1024
"""Largest body of a request to the router's own endpoints."""


@dataclass(slots=True)
class Admission:
    """What one request holds until :meth:`Intake.release`.

    Attributes:
        charged: bytes of its body, as counted; inside: it has a place within the gate.
        early: comments to its client.
    """

    charged: int = 0
    inside: bool = False
    early: Early | None = None


class Intake:
    """Reads bodies and turns them into calls.

    Attributes:
        buffered: bytes of bodies that are kept now.
    """

    def __init__(
        self, config: RouterConfig, dispatcher: Dispatcher, affinity: Affinity, closing: Closing
    ) -> None:
        self.affinity = affinity
        self.buffered = 0
        self.reader = BodyReader()
        self.gate = Gate(
            config.max_concurrent_requests,
            config.rate_limit,
            queue_size=config.queue_size,
            queue_timeout_s=config.queue_timeout,
        )
        self._closing = closing
        self._config = config
        self._dispatcher = dispatcher

    async def admit(self, request: web.Request, admission: Admission) -> Call:
        """Take a generation request in; what it took must be released at the end.

        Raises:
            Rejected: it cannot be served, or breaks a limit.
        """
        if self._closing.begun:
            raise Rejected(
                "the router is shutting down", status=503, kind="service_unavailable",
                retry_after_s=1, close=True,
            )  # fmt: skip
        kind = PATHS[request.path]
        if self._config.disaggregated and not kind.paired:
            raise _unpaired(f"{request.path} cannot be served")
        # Whatever it is, it would be refused: say so before the client sends all of it.
        self._dispatcher.refuse_if_full()
        body = await self._body(request, self._config.max_payload_bytes, admission)
        await self.gate.enter()
        admission.inside = True
        call = await self.reader.call(request.path, body)
        if call is None:
            raise Rejected(
                "the body is not a JSON object", status=400, kind="invalid_request_error"
            )
        call = await self._placed(call)
        if call.streams and not kind.streams and self._config.sse_keepalive:
            admission.early = Early(request, self._config.sse_keepalive)
            admission.early.start()
        return call

    def release(self, admission: Admission) -> None:
        """Take back what a request took."""
        if admission.early is not None:
            admission.early.stop()
        if admission.inside:
            self.gate.leave()
        self.buffered -= admission.charged

    async def _body(
        self, request: web.Request, limit: int, admission: Admission
    ) -> tuple[bytes, ...]:
        """Read a body, in pieces, which is counted as kept from now on.

        Args:
            limit: bytes.

        Raises:
            Rejected: it is too large, too slow, or one too many.
        """
        try:
            if request.content.is_eof():
                # It has come with the head, as most do: nothing is waited for.
                return await self._pieces(request, limit, admission)
            async with asyncio.timeout(self._config.body_timeout):
                return await self._pieces(request, limit, admission)
        except TimeoutError:
            raise _too_slow(self._config.body_timeout) from None
        except (HttpProcessingError, web.RequestPayloadError) as error:
            raise Rejected(
                f"the body cannot be read: {error}", status=400, kind="invalid_request_error",
                close=True,
            ) from None  # fmt: skip

    async def _pieces(
        self, request: web.Request, limit: int, admission: Admission
    ) -> tuple[bytes, ...]:
        content, declared = request.content, request.content_length or 0
        pieces: list[bytes] = []
        size, tail = 0, bytearray()
        while True:
            if max(size, declared) > limit:
                raise _too_large(limit)
            due = max(0, max(size, declared) - admission.charged)
            if self.buffered + due > self._config.max_buffered_bytes:
                raise _too_many(self.buffered)
            admission.charged += due
            self.buffered += due
            if content.at_eof() or not (chunk := await content.readany()):
                break
            size += len(chunk)
            tail += chunk
            if len(tail) >= PIECE:
                pieces.append(bytes(tail))
                tail.clear()
        if tail or not pieces:
            pieces.append(bytes(tail))
        return tuple(pieces)

    async def read(self, request: web.Request, limit: int | None = None) -> bytes:
        """Read a small body whole.

        Raises:
            Rejected: it is too large, too slow, or one too many.
        """
        admission = Admission()
        try:
            return b"".join(
                await self._body(request, limit or self._config.max_payload_bytes, admission)
            )
        finally:
            self.release(admission)

    async def _placed(self, call: Call) -> Call:
        """Find out which instances cannot serve it.

        Raises:
            Rejected: none can.
        """
        if not call.previous and not call.background:
            return call
        if self._config.disaggregated:
            raise _unpaired("a response that is stored, or goes on from one, cannot be served")
        if not call.previous:
            return call
        return msgspec.structs.replace(call, avoid=await self.affinity.others(call.previous))


def _unpaired(what: str) -> Rejected:
    return Rejected(
        f"{what} where prefill and decode are apart",
        status=501,
        kind="not_implemented_error",
        hint="SGLang gives it no bootstrap room; ask a fleet of aggregated instances",
    )


def _too_large(limit: int) -> Rejected:
    return Rejected(
        f"the body is larger than {limit} bytes",
        status=413,
        kind="invalid_request_error",
        hint="an operator can raise --max-payload-size",
        close=True,
    )


def _too_slow(limit_s: float) -> Rejected:
    return Rejected(
        f"the body did not come within {limit_s:g} s",
        status=408,
        kind="timeout_error",
        hint="an operator can raise --client-body-timeout-secs",
        close=True,
    )


def _too_many(buffered: int) -> Rejected:
    return Rejected(
        f"the router keeps {buffered} bytes of requests already",
        status=503,
        kind="service_unavailable",
        retry_after_s=1,
        hint="an operator can raise --max-buffered-size",
        close=True,
    )
