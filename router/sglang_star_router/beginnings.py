"""How an answer begins: well, or with something that another instance may do better.

A refused connection, a reset, an error status, silence and a stream that begins with an error are
all failures of an attempt. Of a pair it is told which of the two failed, as far as that can be.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from sglang_star_router.exchange import Exchange, UpstreamLost
from sglang_star_router.faults import FaultLimits
from sglang_star_router.first_event import error_in
from sglang_star_router.framing import ResponseHead
from sglang_star_router.health import Health
from sglang_star_router.instance import Instance
from sglang_star_router.pairs import Pairs
from sglang_star_router.seat import Seat

RETRIED_STATUSES: Final = frozenset({408, 429})
"""Answers about the instance rather than the request, besides 5xx: another may do better."""


@dataclass(eq=False)
class AttemptFailed(Exception):
    """One attempt ended before the first event of its answer.

    Attributes:
        outcome: what went wrong, as the metrics call it.
        guilty: instances to blame, not to be asked again; empty if nobody is.
        answer: the instance's own error answer, if it gave one.
        final: the answer is about the request: every other instance would give the same.
    """

    message: str
    outcome: str
    guilty: tuple[Instance, ...] = ()
    answer: web.Response | None = None
    final: bool = False

    def __str__(self) -> str:
        """The message."""
        return self.message


class Beginnings:
    """Waits for answers to begin."""

    def __init__(self, limits: FaultLimits, health: Health) -> None:
        self._limits = limits
        self._health = health
        self._pairs = Pairs()

    async def begun(
        self, seat: Seat, prefill: Exchange | None, decode: Exchange, deadline: float
    ) -> ResponseHead:
        """Wait until the answer has begun well.

        Args:
            deadline: of the request as a whole, loop time.

        Raises:
            AttemptFailed: it has not.
            TimeoutError: the deadline has passed.
        """
        loop = asyncio.get_running_loop()
        due = min(deadline, loop.time() + self._limits.first_byte_timeout)
        try:
            async with asyncio.timeout_at(due) as limit:
                if prefill is None or seat.prefill is None:
                    head = await self._opened(decode, seat.decode)
                    await self._check(decode, head, (seat.decode,))
                    return head
                return await self._pair_begun(prefill, seat.prefill, decode, seat.decode)
        except TimeoutError:
            if not limit.expired() or due == deadline:
                raise
            late: tuple[Instance, ...] = (seat.decode,)
            if seat.prefill is not None and prefill is not None:
                late = (seat.prefill,)
                if prefill.opened.done():
                    late = self._guilty(seat.prefill, seat.decode)
            for one in late:
                self._health.suspect(one)
            text = f"{late[0].name} did not begin to answer"
            raise AttemptFailed(
                f"{text} within {self._limits.first_byte_timeout:g} s", "late", late
            ) from None

    async def _pair_begun(
        self, prefill: Exchange, p: Instance, decode: Exchange, d: Instance
    ) -> ResponseHead:
        """The same for a pair: decode waits in vain for KV once prefill has failed."""
        await asyncio.wait((prefill.opened, decode.opened), return_when=asyncio.FIRST_COMPLETED)
        if not decode.opened.done():
            head = await self._opened(prefill, p)
            await self._check(prefill, head, (p,), final=head.status >= 400)
        head = await self._opened(decode, d)
        try:
            await self._check(decode, head, (p, d))
        except AttemptFailed as error:
            if prefill.opened.done():
                await self._check(prefill, await self._opened(prefill, p), (p,))
            error.guilty = self._guilty(p, d)
            raise
        self._pairs.note(p.endpoint.url, d.endpoint.url, worked=True)
        return head

    def _guilty(self, p: Instance, d: Instance) -> tuple[Instance, ...]:
        """Who failed, where the answer does not tell: as likely as not the transfer between."""
        self._pairs.note(p.endpoint.url, d.endpoint.url, worked=False)
        # It may have restarted and listen elsewhere.
        self._health.doubt(p)
        guilty = self._pairs.guilty(p.endpoint.url, d.endpoint.url)
        return tuple(one for one in (p, d) if one.endpoint.url in guilty)

    async def _opened(self, exchange: Exchange, instance: Instance) -> ResponseHead:
        try:
            return await exchange.opened
        except UpstreamLost as error:
            if error.stale:
                raise AttemptFailed(error.message, "stale") from error
            self._health.suspect(instance)
            raise AttemptFailed(error.message, "broken", (instance,)) from error

    async def _check(
        self,
        exchange: Exchange,
        head: ResponseHead,
        guilty: tuple[Instance, ...],
        *,
        final: bool = False,
    ) -> None:
        """Look at how an answer begins.

        Args:
            final: an answer about the request ends it too, instead of being passed on.

        Raises:
            AttemptFailed: with an error that another instance may not give.
        """
        name = guilty[-1].name
        if head.status in RETRIED_STATUSES or head.status >= 500 or final:
            try:
                body = await exchange.collect()
            except UpstreamLost as error:
                raise AttemptFailed(error.message, "broken", guilty) from error
            kind = head.content_type.split(b";")[0].decode("latin-1") or "application/json"
            answer = web.Response(body=body, status=head.status, content_type=kind)
            about_it = head.status not in RETRIED_STATUSES and head.status < 500
            raise AttemptFailed(
                f"{name} answered {head.status}", "answer", guilty, answer, final=about_it
            )
        if head.status == 200 and head.content_type.startswith(b"text/event-stream"):
            found = error_in(exchange.beginning())
            if found is not None and not found.about_the_request:
                raise AttemptFailed(
                    f"{name} began a stream with error {found.code}", "event", guilty,
                    web.Response(
                        body=found.payload, status=found.code, content_type="application/json"
                    ),
                )  # fmt: skip
