"""Passing requests on: one instance when aggregated, a prefill and decode pair otherwise.

Until the first byte of the answer has come, nothing has reached the client, so a failed attempt is
repeated elsewhere. After that the answer's bytes go from socket to socket untouched, and a failure
ends the stream with an error the client can read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from aiohttp import web

from sglang_star.errors import PeerError
from sglang_star_router.calls import Call
from sglang_star_router.config import RouterConfig
from sglang_star_router.dispatch import Dispatcher, Seat
from sglang_star_router.door import AUTHORIZATION
from sglang_star_router.fleet import Instance
from sglang_star_router.framing import HOP_BY_HOP, ResponseHead
from sglang_star_router.health import Health
from sglang_star_router.intake import Intake
from sglang_star_router.logprobs import with_prompt_logprobs
from sglang_star_router.metrics import Metrics
from sglang_star_router.paths import RESPONSES
from sglang_star_router.relay import relay
from sglang_star_router.replies import Rejected, rejection
from sglang_star_router.upstream import Exchange, Pool, UpstreamLost

logger = logging.getLogger(__name__)

RETRIED_STATUSES: Final = frozenset({502, 503, 504})
"""Answers about the instance rather than the request: another instance may do better."""

_NOT_FORWARDED: Final = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"content-encoding",  # aiohttp has decoded the body
    b"transfer-encoding",
    b"expect",
    b"trailer",
}


class AttemptFailed(Exception):
    """One attempt ended before its first byte.

    Attributes:
        instance: not to be asked again for this request; None if nobody is to blame.
        answer: the instance's own error answer, if it gave one.
        final: the answer is about the request: every other instance would give the same.
    """

    def __init__(
        self,
        message: str,
        instance: Instance | None,
        answer: web.Response | None = None,
        *,
        final: bool = False,
    ) -> None:
        super().__init__(message)
        self.instance = instance
        self.answer = answer
        self.final = final


class Proxy:
    """Forwards requests and retries what can be retried."""

    def __init__(
        self,
        config: RouterConfig,
        pool: Pool,
        dispatcher: Dispatcher,
        health: Health,
        metrics: Metrics,
        intake: Intake,
    ) -> None:
        self._config = config
        self._pool = pool
        self._dispatcher = dispatcher
        self._health = health
        self._metrics = metrics
        self._intake = intake

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Handle one generation request, start to end."""
        arrived = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout
        response: web.StreamResponse
        self._metrics.active.inc()
        try:
            async with self._intake.admit(request) as call:
                response = await self._attempts(request, call, arrived, deadline)
        except Rejected as error:
            response = rejection(error)
        except TimeoutError:
            limit = f"no answer within {self._config.request_timeout:g} s"
            response = rejection(Rejected(limit, status=504, kind="timeout_error"))
        finally:
            self._metrics.active.dec()
        self._metrics.count(request.path, response.status)
        return response

    async def forward(self, request: web.Request, instance: Instance) -> web.StreamResponse:
        """Pass any other request to one instance, unchanged."""
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout
        block = request_block(request, (await self._intake.read(request),), instance)
        exchange: Exchange | None = None
        try:
            async with asyncio.timeout_at(deadline):
                exchange = await self._pool.send(
                    instance.endpoint,
                    block,
                    unframe=request.version < (1, 1),
                    bodiless=request.method == "HEAD",
                )
                head = await exchange.opened
            return await relay(request, exchange, head, deadline)
        except (PeerError, TimeoutError) as error:
            text = str(error) or f"no answer within {self._config.request_timeout:g} s"
            return rejection(Rejected(text, status=502, kind="upstream_error"))
        finally:
            if exchange is not None:
                exchange.abort()

    # ------------------------------------------------------------------ attempts

    async def _attempts(
        self, request: web.Request, call: Call, arrived: float, deadline: float
    ) -> web.StreamResponse:
        """Try instances until one has begun to answer."""
        rid = call.name()
        excluded: set[str] = set(call.avoid)
        failure: AttemptFailed | None = None
        for _ in range(self._config.max_retries + 1):
            try:
                async with asyncio.timeout_at(deadline):
                    seat = await self._dispatcher.seat(call, rid, excluded)
            except Rejected:
                if failure is None:
                    raise
                break
            try:
                return await self._attempt(request, call, rid, seat, arrived, deadline)
            except AttemptFailed as error:
                if error.final and error.answer is not None:
                    return error.answer
                failure = error
                if error.instance is not None:
                    excluded.add(error.instance.endpoint.url)
                self._metrics.retries.inc()
                logger.warning("attempt at %s failed: %s", call.path, error)
            finally:
                self._dispatcher.leave(seat)
        assert failure is not None
        if failure.answer is not None:
            return failure.answer
        raise Rejected(
            f"every instance asked has failed; the last: {failure}",
            status=503,
            kind="service_unavailable",
            retry_after_s=1,
        )

    async def _attempt(
        self,
        request: web.Request,
        call: Call,
        rid: str,
        seat: Seat,
        arrived: float,
        deadline: float,
    ) -> web.StreamResponse:
        """Send to the seat's instances and pass the decode side's answer through."""
        prefill: Exchange | None = None
        decode: Exchange | None = None
        try:
            async with asyncio.timeout_at(deadline):
                fields = call.naming(rid)
                if seat.prefill is None:
                    decode = await self._send(request, call.with_fields(fields), seat.decode)
                    head = await self._opened(decode, seat.decode)
                else:
                    body = call.with_fields(fields | self._bootstrap(call, seat.prefill))
                    prefill = await self._send(request, body, seat.prefill)
                    decode = await self._send(request, body, seat.decode)
                    head = await self._pair_opened(prefill, seat.prefill, decode, seat.decode)
                if head.status in RETRIED_STATUSES:
                    raise await _refused(decode, seat.decode, head)
                if prefill is not None and call.prompt_logprobs and not call.streams:
                    merged = with_prompt_logprobs(await prefill.collect(), await decode.collect())
                    return web.Response(
                        body=merged, status=head.status, content_type="application/json"
                    )
            if call.path == RESPONSES and head.status < 400:
                self._intake.affinity.note(rid, seat.decode)
            self._metrics.first_byte.observe(time.monotonic() - arrived)
            if prefill is not None:
                self._dispatcher.prefilled(seat)
                prefill.discard()
                prefill = None
            response = await relay(request, decode, head, deadline)
            if response.lost:
                self._metrics.lost_streams.inc()
            return response
        finally:
            for exchange in (prefill, decode):
                if exchange is not None:
                    exchange.abort()

    def _bootstrap(self, call: Call, prefill: Instance) -> dict[str, object]:
        if prefill.bootstrap_port is None:
            raise AttemptFailed(
                f"{prefill.name} has not reported its bootstrap port; "
                "give it as --prefill URL PORT",
                prefill,
            )
        return call.bootstrap(prefill.endpoint.host, prefill.bootstrap_port)

    async def _send(
        self, request: web.Request, body: tuple[bytes, ...], instance: Instance
    ) -> Exchange:
        try:
            return await self._pool.send(
                instance.endpoint,
                request_block(request, body, instance),
                unframe=request.version < (1, 1),
            )
        except PeerError as error:
            self._health.suspect(instance, error.message)
            raise AttemptFailed(error.message, instance) from error

    async def _opened(self, exchange: Exchange, instance: Instance) -> ResponseHead:
        """Wait for the first body byte.

        Raises:
            AttemptFailed: the instance died first.
        """
        try:
            return await exchange.opened
        except UpstreamLost as error:
            if error.stale:
                raise AttemptFailed(error.message, None) from error
            self._health.suspect(instance, error.message)
            raise AttemptFailed(error.message, instance) from error

    async def _pair_opened(
        self, prefill: Exchange, p: Instance, decode: Exchange, d: Instance
    ) -> ResponseHead:
        """Wait for decode's first byte, unless prefill fails before it.

        Raises:
            AttemptFailed: either side died, or prefill refused: decode would wait in vain for KV.
        """
        await asyncio.wait((prefill.opened, decode.opened), return_when=asyncio.FIRST_COMPLETED)
        if not decode.opened.done():
            head = await self._opened(prefill, p)
            if head.status >= 400:
                raise await _refused(prefill, p, head)
        return await self._opened(decode, d)


def request_block(
    request: web.Request, body: tuple[bytes, ...], instance: Instance
) -> tuple[bytes, ...]:
    """Return the request as it goes to an instance: the client's headers, this hop's framing."""
    endpoint = instance.endpoint
    size = sum(map(len, body))
    lines = [
        f"{request.method} {request.raw_path} HTTP/1.1".encode("latin-1"),
        b"Host: " + endpoint.url.partition("://")[2].encode("latin-1"),
    ]
    lines += [
        name + b": " + value
        for name, value in request.raw_headers
        if name.lower() not in _NOT_FORWARDED
    ]
    if (authorization := request.get(AUTHORIZATION)) is not None:
        lines = [line for line in lines if not line.lower().startswith(b"authorization:")]
        lines += [b"Authorization: " + authorization] if authorization else []
    if size or request.method not in ("GET", "HEAD"):
        lines.append(b"Content-Length: %d" % size)
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    return (head + body[0], *body[1:])


async def _refused(exchange: Exchange, instance: Instance, head: ResponseHead) -> AttemptFailed:
    """Turn an instance's error answer into a failure that carries it."""
    try:
        body = await exchange.collect()
    except UpstreamLost as error:
        return AttemptFailed(error.message, instance)
    kind = head.content_type.split(b";")[0].decode("latin-1") or "application/json"
    answer = web.Response(body=body, status=head.status, content_type=kind)
    return AttemptFailed(
        f"{instance.name} answered {head.status}",
        instance,
        answer,
        final=head.status not in RETRIED_STATUSES,
    )
