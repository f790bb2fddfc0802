"""The router put together: one aiohttp application around one fleet."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

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
from sglang_star_router.door import FLEET_PATHS, OPEN_PATHS, Door
from sglang_star_router.engine import EngineClient
from sglang_star_router.fault_views import fault_metrics
from sglang_star_router.fleet import Fleet, Instance
from sglang_star_router.forwarding import request_block
from sglang_star_router.health import Health
from sglang_star_router.intake import CONTROL_BYTES, Intake
from sglang_star_router.ledger import Ledger
from sglang_star_router.metrics import Metrics
from sglang_star_router.paths import PATHS
from sglang_star_router.policy.base import DispatchPolicy, ReschedulePolicy
from sglang_star_router.policy.params import StarParams
from sglang_star_router.policy.registry import make_dispatch, make_rescheduler
from sglang_star_router.proxy import Proxy
from sglang_star_router.relay import Relayed
from sglang_star_router.replies import Rejected, json_reply, rejection
from sglang_star_router.rescheduler import OrderSender, Rescheduler
from sglang_star_router.snapshot import Snapshots
from sglang_star_router.star_api import StarApi
from sglang_star_router.telemetry import StatusFeed
from sglang_star_router.upkeep import Upkeep
from sglang_star_router.upstream import Pool
from sglang_star_router.views import fleet_metrics

ANY_INSTANCE: Final = (
    "/v1/{rest:.*}",
    "/api/tags",
    "/api/show",
    "/get_model_info",
    "/model_info",
    "/tokenize",
    "/detokenize",
    "/parse_function_call",
    "/separate_reasoning",
)
"""Paths any instance answers alike. What changes an instance goes to that instance directly."""
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SECRETS: Final = frozenset({"api_key", "admin_api_key", "ssl_keyfile_password", "launch_command"})
READINESS: Final = ("/health", "/health_generate", "/ready", "/readiness")
NOBODY: Final = Rejected(
    "no healthy instance", status=503, kind="service_unavailable", retry_after_s=1
)


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
        self._turn = 0
        self.metrics.add_source(self._collect)

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._let_in])
        app[CUT] = self.closing
        for path, kind in sorted(PATHS.items()):
            for method in kind.methods:
                app.router.add_route(method, path, self.proxy.generate)
        for path in FLEET_PATHS:
            app.router.add_route("*", path, self._every_instance)
        api = StarApi(
            self.fleet, self.ledger, self.sender, self.engine, self.dispatcher, self.feed,
            self.intake,
        )  # fmt: skip
        app.add_routes(api.routes())
        app.add_routes(
            [
                web.get("/liveness", self._is_alive),
                web.get("/ping", self._is_alive),
                *(web.get(path, self._is_ready) for path in READINESS),
                web.get("/metrics", self.show_metrics),
                web.get("/dashboard", dashboard.page),
                web.get("/server_info", self._server_info),
                web.get("/get_server_info", self._server_info),
                web.get("/v1/realtime", self._no_websocket),
                web.get("/v1/responses/{name}", self._stored_response),
                web.post("/v1/responses/{name}/cancel", self._stored_response),
            ]
        )
        for path in ANY_INSTANCE:
            app.router.add_route("*", path, self._any_instance)
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

    async def _is_alive(self, request: web.Request) -> web.Response:
        """200 while the router answers at all."""
        return web.Response()

    async def _is_ready(self, request: web.Request) -> web.Response:
        """200 while every role has a healthy instance and the router takes requests."""
        if self.closing.begun:
            return json_reply({"closing": True}, 503)
        roles = {one.role for one in self.fleet}
        missing = sorted(roles - {one.role for one in self.fleet if one.healthy})
        if not missing:
            return web.Response()
        trouble = {one.name: one.trouble for one in self.fleet if not one.healthy}
        return json_reply({"missing": missing, "trouble": trouble}, 503)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Show what Prometheus reads."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": METRICS_TYPE})

    async def _no_websocket(self, request: web.Request) -> web.Response:
        raise Rejected(
            "the router passes no WebSocket on", status=501, kind="not_implemented_error",
            hint="POST audio to /v1/audio/transcriptions, or connect to an engine",
        )  # fmt: skip

    async def _stored_response(self, request: web.Request) -> web.StreamResponse:
        """Ask the engine that stores a response."""
        if self.config.disaggregated:
            raise Rejected(
                "SGLang stores no responses where prefill and decode are apart",
                status=501, kind="not_implemented_error",
            )  # fmt: skip
        home = await self.intake.affinity.home(request.match_info["name"])
        return await self.proxy.forward(request, home)

    async def _any_instance(self, request: web.Request) -> web.StreamResponse:
        """Pass on what any instance can answer, to each healthy one in turn."""
        healthy = [one for one in self.fleet.decoding() if one.healthy]
        if not healthy:
            return rejection(NOBODY)
        self._turn += 1
        return await self.proxy.forward(request, healthy[self._turn % len(healthy)])

    async def _every_instance(self, request: web.Request) -> web.Response:
        """Send to every healthy instance; the answer is the worst of theirs."""
        body = await self.intake.read(request, CONTROL_BYTES)
        members = [one for one in self.fleet if one.healthy]
        if not members:
            return rejection(NOBODY)
        answers = await asyncio.gather(
            *(self._ask(request, one, body) for one in members), return_exceptions=True
        )
        report: dict[str, Any] = {}
        worst = 200
        for instance, answer in zip(members, answers, strict=True):
            if isinstance(answer, BaseException):
                answer = (502, str(answer))
            worst = max(worst, answer[0])
            report[instance.name] = {"status": answer[0], "answer": answer[1]}
        return json_reply({"instances": report}, worst)

    async def _ask(self, request: web.Request, instance: Instance, body: bytes) -> tuple[int, str]:
        block = request_block(request, (body,), instance)
        exchange = await self.pool.send(instance.endpoint, block)
        try:
            async with asyncio.timeout(self.config.request_timeout):
                head = await exchange.opened
                return head.status, (await exchange.collect()).decode(errors="replace")
        finally:
            exchange.abort()

    async def _server_info(self, request: web.Request) -> web.StreamResponse:
        """One instance's when aggregated; in PD all of them, under ``prefill`` and ``decode``."""
        if not self.config.disaggregated:
            self._turn += 1
            healthy = [one for one in self.fleet if one.healthy]
            if not healthy:
                return rejection(NOBODY)
            one = healthy[self._turn % len(healthy)]
            status, info = await self.engine.json(one, "GET", "/server_info")
            return json_reply(_without_secrets(info), status)
        infos: dict[str, list[Any]] = {"prefill": [], "decode": []}
        for instance in self.fleet:
            if not instance.healthy:
                continue
            try:
                status, info = await self.engine.json(instance, "GET", "/server_info")
            except PeerError:
                continue
            if status == 200:
                infos[instance.role].append(_without_secrets(info))
        if not all(infos.values()):
            return rejection(NOBODY)
        return json_reply(infos)

    def _collect(self) -> Iterable[Metric]:
        yield from fleet_metrics(
            self.fleet, self.ledger, self.dispatcher, self.feed, self.rescheduler
        )
        yield from fault_metrics(self.fleet, self.dispatcher, self.proxy, self.health, self.upkeep)


def _without_secrets(info: Any) -> Any:
    """What an engine says of itself, less its keys, which plain SGLang shows."""
    if not isinstance(info, dict):
        return info
    return {name: value for name, value in info.items() if name not in SECRETS}


def _hold_deadline_s(config: RouterConfig) -> float:
    """After how long a held request yields to fresher ones: ``star``'s parameter, else never."""
    if config.policy != "star":
        return math.inf
    return float(config.dispatch_params.get("hold_deadline_s", StarParams().hold_deadline_s))
