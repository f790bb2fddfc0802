"""How a generation request gets its answer: attempts until one has begun to answer.

Until the first event of an answer has come, nothing has reached the client, so that whatever goes
wrong is tried elsewhere: a refused connection, a reset, an error status, silence, a stream that
begins with an error. After that the answer's bytes go from socket to socket untouched, and a
failure ends the stream with an error the client can read. Whoever is to blame is told to its
breaker; what the router itself lacks is nobody's failure.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from aiohttp import web

from sglang_star.errors import PeerError
from sglang_star_router.affinity import Affinity
from sglang_star_router.beginnings import AttemptFailed, Beginnings
from sglang_star_router.breaker import Trial
from sglang_star_router.calls import Call
from sglang_star_router.descriptors import Descriptors
from sglang_star_router.dispatch import Dispatcher
from sglang_star_router.exchange import Exchange, UpstreamLost
from sglang_star_router.faults import FaultLimits
from sglang_star_router.forwarding import request_block
from sglang_star_router.framing import ResponseHead
from sglang_star_router.health import Health
from sglang_star_router.instance import Instance
from sglang_star_router.logprobs import with_prompt_logprobs
from sglang_star_router.metrics import Metrics
from sglang_star_router.paths import RESPONSES
from sglang_star_router.relay import relay
from sglang_star_router.replies import Rejected
from sglang_star_router.retry import RetryBudget, backoff_s
from sglang_star_router.seat import Seat
from sglang_star_router.upstream import OutOfResources, Pool

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Record:
    """What has become of one request so far.

    Attributes:
        excluded: URLs not to be asked again; answers: trials that ended in an error answer.
        kept: trials of those that failed in a pair and are asked again with another partner.
        narrow: URLs not to be asked in the next attempt only.
        again: a pair without alternative has been asked a second time.
    """

    excluded: set[str] = field(default_factory=set)
    answers: list[Trial] = field(default_factory=list)
    kept: list[Trial] = field(default_factory=list)
    narrow: set[str] = field(default_factory=set)
    stale: bool = False
    again: bool = False


class Attempts:
    """Makes attempts, blames for failed ones and makes others."""

    def __init__(
        self,
        limits: FaultLimits,
        pool: Pool,
        dispatcher: Dispatcher,
        health: Health,
        metrics: Metrics,
        budget: RetryBudget,
        descriptors: Descriptors,
        affinity: Affinity,
    ) -> None:
        self._limits = limits
        self._pool = pool
        self._dispatcher = dispatcher
        self._health = health
        self._metrics = metrics
        self._budget = budget
        self._descriptors = descriptors
        self._affinity = affinity
        self._beginnings = Beginnings(limits, health)

    async def answer(
        self, request: web.Request, call: Call, arrived: float, deadline: float
    ) -> web.StreamResponse:
        """Try instances until one has begun to answer.

        Raises:
            Rejected: none can, or none did.
            TimeoutError: the deadline, a loop time, has passed.
        """
        rid = call.name()
        record = _Record(excluded=set(call.avoid))
        failure: AttemptFailed | None = None
        retry = 0
        while True:
            try:
                seat = await self._dispatcher.seat(
                    call,
                    rid,
                    record.excluded | record.narrow,
                    since=None if failure is None else arrived,
                    deadline=deadline,
                )
            except Rejected:
                if record.narrow:
                    record.narrow = set()
                    continue
                if failure is None:
                    raise
                break
            record.narrow = set()
            try:
                return await self._attempt(request, call, rid, seat, record, arrived, deadline)
            except AttemptFailed as error:
                if error.final and error.answer is not None:
                    return error.answer
                failure = error
                self._blame(error, seat, record)
            finally:
                self._dispatcher.leave(seat)
            logger.warning("attempt at %s failed: %s", call.path, failure)
            if retry >= self._limits.retry_max_retries or not self._budget.grant():
                break
            self._metrics.retries.inc()
            if failure.outcome == "stale" and not record.stale:
                record.stale = True
            else:
                async with asyncio.timeout_at(deadline):
                    await asyncio.sleep(backoff_s(self._limits, retry))
            retry += 1
        assert failure is not None
        return self._given_up(failure, record)

    def _given_up(self, failure: AttemptFailed, record: _Record) -> web.Response:
        if len({id(trial.breaker) for trial in record.answers}) > 1:
            # Different instances failed alike: it is the request, which must harm none of them.
            for trial in record.answers:
                trial.forgive()
        if failure.answer is not None:
            return failure.answer
        raise Rejected(
            f"every instance asked has failed; the last: {failure}",
            status=503,
            kind="service_unavailable",
            retry_after_s=self._dispatcher.retry_after_s(),
        )

    def _blame(self, error: AttemptFailed, seat: Seat, record: _Record) -> None:
        """Tell breakers and health checks, and look elsewhere next time."""
        for instance in error.guilty:
            trial = seat.trial(instance)
            trial.failure(error.outcome)
            if error.outcome in ("answer", "event"):
                record.answers.append(trial)
        if error.outcome == "local":
            self._descriptors.errors["connections"] += 1
        for trial in seat.trials.values():
            if not trial.outcome:
                trial.neutral(error.outcome if error.outcome in ("local", "stale") else "partner")
        away = [one for one in error.guilty if self._dispatcher.others(one, record.excluded)]
        if len(error.guilty) > 1:
            # One of a pair is exchanged, so that the next attempt tells which of them it was.
            away = sorted(away, key=lambda one: -one.breaker.share())[:1]
            kept = [one for one in error.guilty if one not in away]
            record.kept += [seat.trial(one) for one in kept]
            record.narrow = {
                url for one in kept for url in self._dispatcher.others(one, record.excluded)
            }
            if not away and not record.again:
                record.again = True
                return
        record.excluded.update(one.endpoint.url for one in away or error.guilty)

    # ------------------------------------------------------------------ one attempt

    async def _attempt(
        self,
        request: web.Request,
        call: Call,
        rid: str,
        seat: Seat,
        record: _Record,
        arrived: float,
        deadline: float,
    ) -> web.StreamResponse:
        """Send to the seat's instances and pass the decode side's answer through."""
        prefill: Exchange | None = None
        decode: Exchange | None = None
        try:
            fields = call.naming(rid)
            if seat.prefill is not None:
                fields |= self._bootstrap(call, seat.prefill)
            body = call.with_fields(fields)
            if seat.prefill is not None:
                prefill = await self._send(request, body, seat.prefill, deadline)
            decode = await self._send(request, body, seat.decode, deadline)
            head = await self._begun(seat, prefill, decode, deadline)
            for instance in (seat.decode, seat.prefill):
                if instance is not None:
                    instance.line.heard_at = time.monotonic()
                    seat.trial(instance).succeeded()
            for trial in record.kept:
                if any(trial.breaker is one.breaker for one in seat.trials.values()):
                    trial.forgive()
            if prefill is not None and call.prompt_logprobs and not call.streams:
                async with asyncio.timeout_at(deadline):
                    return await self._merged(seat, prefill, decode, head)
            if call.path == RESPONSES and head.status < 400:
                self._affinity.note(rid, seat.decode)
            self._metrics.first_byte.observe(time.monotonic() - arrived)
            if prefill is not None:
                self._dispatcher.prefilled(seat)
                prefill.discard()
                prefill = None
            response = await relay(request, decode, head, deadline, self._limits.token_timeout)
            if response.lost:
                self._metrics.lost_streams.inc()
                seat.trial(seat.decode).failure("stream")
                self._health.suspect(seat.decode)
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
                "connect",
                (prefill,),
            )
        return call.bootstrap(prefill.endpoint.host, prefill.bootstrap_port)

    async def _send(
        self,
        request: web.Request,
        body: tuple[bytes, ...],
        instance: Instance,
        deadline: float,
    ) -> Exchange:
        try:
            return await self._pool.send(
                instance.endpoint,
                request_block(request, body, instance),
                unframe=request.version < (1, 1),
                deadline=deadline,
            )
        except OutOfResources as error:
            raise AttemptFailed(error.message, "local") from error
        except PeerError as error:
            self._health.suspect(instance, error.message)
            raise AttemptFailed(error.message, "connect", (instance,)) from error

    async def _begun(
        self, seat: Seat, prefill: Exchange | None, decode: Exchange, deadline: float
    ) -> ResponseHead:
        """Wait for the answer to begin, known to the lines of the instances that are waited for.

        So a dead one can send what waits elsewhere.
        """
        both = [(seat.decode.line, decode)]
        if seat.prefill is not None and prefill is not None:
            both.append((seat.prefill.line, prefill))
        for line, exchange in both:
            line.wait(exchange, seat.prompt_tokens)
        try:
            return await self._beginnings.begun(seat, prefill, decode, deadline)
        finally:
            for line, exchange in both:
                line.begun(exchange)

    async def _merged(
        self, seat: Seat, prefill: Exchange, decode: Exchange, head: ResponseHead
    ) -> web.Response:
        """Decode's answer with prefill's logprobs of the prompt in it."""
        assert seat.prefill is not None
        bodies = []
        for exchange, instance in ((prefill, seat.prefill), (decode, seat.decode)):
            try:
                bodies.append(await exchange.collect())
            except UpstreamLost as error:
                raise AttemptFailed(error.message, "broken", (instance,)) from error
        return web.Response(
            body=with_prompt_logprobs(*bodies), status=head.status,
            content_type="application/json",
        )  # fmt: skip
