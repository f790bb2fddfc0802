"""The router put together: one aiohttp application around one fleet."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client.core import Metric

from sglang_star.errors import PeerError
from sglang_star.fleet_key import access
from sglang_star_router import dashboard, early, tls
from sglang_star_router.affinity import Affinity
from sglang_star_router.closing import CUT, Closing
from sglang_star_router.config import RouterConfig
from sglang_star_router.dispatch import Dispatcher
from sglang_star_router.door import OPEN_PATHS, Door
from sglang_star_router.engine import EngineClient
from sglang_star_router.engine_api import EngineApi
from sglang_star_router.fault_views import fault_metrics
from sglang_star_router.fleet import Fleet
from sglang_star_router.health import Health
from sglang_star_router.intake import Intake
from sglang_star_router.ledger import Ledger
from sglang_star_router.metrics import Metrics
from sglang_star_router.paths import PATHS
from sglang_star_router.policy.base import DispatchPolicy, ReschedulePolicy
from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.registry import make_dispatch, make_rescheduler
from sglang_star_router.probes import Probes
from sglang_star_router.proxy import Proxy
from sglang_star_router.relay import Relayed
from sglang_star_router.replies import Rejected, rejection
from sglang_star_router.rescheduler import OrderSender, Rescheduler
from sglang_star_router.snapshot import Snapshots
from sglang_star_router.star_api import StarApi
from sglang_star_router.telemetry import StatusFeed
from sglang_star_router.upkeep import Upkeep
from sglang_star_router.upstream import Pool
from sglang_star_router.views import fleet_metrics

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Router:
    """All parts of one router, wired; :meth:`application` serves it.

    Args:
        rescheduler_policy, dispatch_policy: replace what the configuration names.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        dispatch_policy: DispatchPolicy | None = None,
        rescheduler_policy: ReschedulePolicy | None = None,
    ) -> None:
        oracle = config.rescheduler == "oracle"
        self.config = config
        self.fleet = Fleet(config.members, calibrate=config.calibrate, limits=config.faults)
        self.metrics = Metrics(config.prometheus_duration_buckets)
        self.door = Door(config, self.metrics)
        self.closing = Closing()
        self.pool = Pool(tls=tls.worker_context(config))
        self.engine = EngineClient(
            self.pool, config.api_key, config.health_check_timeout, admin_key=config.admin_api_key
        )
        self.ledger = Ledger(
            self.fleet,
            cooldown_s=config.move_cooldown,
            report_timeout_s=config.move_report_timeout,
        )
        self.fleet.on_move_report = self.ledger.report
        self.health = Health(config, self.fleet, self.engine, lambda one: self.feed.follow(one))
        self.feed = StatusFeed(
            self.fleet, self.health.doubt, access(config.fleet_key, insecure=config.insecure)
        )
        snapshots = Snapshots(
            self.fleet,
            self.fleet.decoding(),
            stale_s=config.status_stale,
            true_lengths=oracle,
            moves=self.ledger.moves_of,
            busy=self.ledger.busy,
        )
        prefills = self.fleet.of_role("prefill")
        self.dispatcher = Dispatcher(
            self.fleet,
            dispatch_policy or make_dispatch(config.policy, **config.dispatch_params),
            snapshots,
            prefill_policy=make_dispatch(config.prefill_policy) if prefills else None,
            prefill_snapshots=(
                Snapshots(self.fleet, prefills, stale_s=config.status_stale) if prefills else None
            ),
            queue_size=config.queue_size,
            queue_timeout_s=config.queue_timeout,
            hold_deadline_s=_hold_deadline_s(config),
            true_lengths=oracle,
        )
        self.intake = Intake(
            config, self.dispatcher, Affinity(self.fleet, self.engine), self.closing
        )
        self.metrics.buffered.set_function(lambda: self.intake.buffered)
        self.proxy = Proxy(
            config, self.pool, self.dispatcher, self.health, self.metrics, self.intake
        )
        self.sender = OrderSender(self.fleet, self.engine, self.ledger)
        self.rescheduler: Rescheduler | None = None
        if rescheduler_policy is None and config.rescheduler != "off":
            rescheduler_policy = make_rescheduler(config.rescheduler, **config.rescheduler_params)
        if rescheduler_policy is not None:
            self.rescheduler = Rescheduler(
                rescheduler_policy,
                snapshots,
                self.sender,
                self.ledger,
                self.metrics,
                interval_s=config.rescheduler_interval,
                max_moves=config.max_moves,
                max_moves_per_second=config.max_moves_per_second,
                stale_s=config.status_stale,
            )
        self.upkeep = Upkeep(self.ledger.expire, self.health.listen)
        self.metrics.add_source(self._collect)

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._let_in])
        app[CUT] = self.closing
        for path, kind in sorted(PATHS.items()):
            for method in kind.methods:
                app.router.add_route(method, path, self.proxy.generate)
        api = StarApi(
            self.fleet, self.ledger, self.sender, self.engine, self.dispatcher, self.feed,
            self.intake,
        )  # fmt: skip
        app.add_routes(api.routes())
        app.add_routes(Probes(self.fleet, self.closing).routes())
        app.router.add_get("/metrics", self.show_metrics)
        app.router.add_get("/dashboard", dashboard.page)
        app.add_routes(
            EngineApi(
                self.config, self.fleet, self.pool, self.engine, self.intake, self.proxy
            ).routes()
        )
        app.cleanup_ctx.append(self._running)
        return app

    async def _running(self, app: web.Application) -> AsyncIterator[None]:
        """Run the background work while the application serves."""
        self.health.start()
        upkeep = asyncio.create_task(self.upkeep.run())
        loop = asyncio.create_task(self.rescheduler.run()) if self.rescheduler else None
        yield
        upkeep.cancel()
        if loop is not None and self.rescheduler is not None:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            await self.rescheduler.close()
        await self.intake.reader.close()
        await self.health.close()
        await self.feed.close()
        self.pool.close()

    # ------------------------------------------------------------------ handlers

    @web.middleware
    async def _let_in(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Around every request: keys, browsers, the end of the router, and errors as JSON."""
        allowed = self.door.origin(request)
        if allowed and request.method == "OPTIONS":
            return self.door.preflight(request, allowed)
        response: web.StreamResponse
        try:
            self.door.open(request)
            if request.path in OPEN_PATHS:
                response = await handler(request)
            else:
                with self.closing:
                    response = await handler(request)
        except Rejected as error:
            response = rejection(error)
        except PeerError as error:
            response = rejection(Rejected(str(error), status=502, kind="upstream_error"))
        self.door.log(request, response.status)
        begun = early.stop(request)
        if isinstance(response, Relayed):
            return response
        if begun is not None:
            body = response.body if isinstance(response, web.Response) else b""
            begun.end(body if isinstance(body, bytes) else b"")
            return Relayed(response.status, begun.stays)
        response.headers.update(allowed)
        if self.closing.begun:
            response.force_close()
        return response

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Show what Prometheus reads."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": METRICS_TYPE})

    def _collect(self) -> Iterable[Metric]:
        yield from fleet_metrics(
            self.fleet, self.ledger, self.dispatcher, self.feed, self.rescheduler
        )
        yield from fault_metrics(self.fleet, self.dispatcher, self.proxy, self.health, self.upkeep)


def _hold_deadline_s(config: RouterConfig) -> float:
    """After how long a held request yields to fresher ones: ``star``'s parameter, else never."""
    if config.policy != "star":
        return math.inf
    return float(config.dispatch_params.get("hold_deadline_s", StarParams().hold_deadline_s))
