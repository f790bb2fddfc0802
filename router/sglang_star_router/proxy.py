"""Passing requests on: the door of the data path, from a request to its count.

How a generation request gets its answer is :mod:`attempts`; everything else goes to one instance
as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import web

from sglang_star.errors import PeerError
from sglang_star_router.attempts import Attempts
from sglang_star_router.config import RouterConfig
from sglang_star_router.descriptors import Descriptors
from sglang_star_router.dispatch import Dispatcher
from sglang_star_router.exchange import Exchange
from sglang_star_router.forwarding import request_block
from sglang_star_router.health import Health
from sglang_star_router.instance import Instance
from sglang_star_router.intake import Admission, Intake
from sglang_star_router.metrics import Metrics
from sglang_star_router.relay import relay
from sglang_star_router.replies import Rejected, rejection
from sglang_star_router.retry import RetryBudget
from sglang_star_router.upstream import Pool

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Status under which a request is counted whose client did not wait for the answer."""


class Proxy:
    """Forwards requests and counts every one of them.

    Attributes:
        budget: retries of the fleet; descriptors: what is left of this process's.
    """

    def __init__(
        self,
        config: RouterConfig,
        pool: Pool,
        dispatcher: Dispatcher,
        health: Health,
        metrics: Metrics,
        intake: Intake,
    ) -> None:
        self.budget = RetryBudget(config.faults)
        self.descriptors = Descriptors(config.faults.descriptor_reserve, lambda: pool.open)
        self._config = config
        self._pool = pool
        self._dispatcher = dispatcher
        self._metrics = metrics
        metrics.active.set_function(lambda: self.budget.active)
        self._intake = intake
        self._attempts = Attempts(
            config.faults, pool, dispatcher, health, metrics, self.budget, self.descriptors,
            intake.affinity,
        )  # fmt: skip

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Handle one generation request, start to end."""
        status = 500
        self.budget.arrived()
        try:
            response = await self._generate(request)
            status = response.status
        except web.HTTPException as error:
            status = error.status
            raise
        except (asyncio.CancelledError, ConnectionError):
            status = CLIENT_LEFT
            raise
        finally:
            self.budget.ended()
            self._metrics.count(request.path, status)
        return response

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout
        wanted = 2 if self._config.disaggregated else 1
        if not await self.descriptors.take(wanted):
            return self._no_descriptors()
        admission = Admission()
        try:
            call = await self._intake.admit(request, admission)
            return await self._attempts.answer(request, call, arrived, deadline)
        except Rejected as error:
            return rejection(error)
        except TimeoutError:
            limit = f"no answer within {self._config.request_timeout:g} s"
            return rejection(Rejected(limit, status=504, kind="timeout_error"))
        finally:
            self._intake.release(admission)
            self.descriptors.give_back(wanted)

    def _no_descriptors(self) -> web.Response:
        response = rejection(
            Rejected(
                "the router has as many connections as it may",
                status=503,
                kind="service_unavailable",
                retry_after_s=self._dispatcher.retry_after_s(),
                hint="raise the limit of open files (ulimit -n), or run more routers",
            )
        )
        # The client's connection is one of them.
        response.force_close()
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
