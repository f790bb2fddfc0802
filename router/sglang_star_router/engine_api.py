"""SGLang's endpoints that run no model: one instance answers for all, or all are told."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web

from sglang_star.errors import PeerError
from sglang_star_router.config import RouterConfig
from sglang_star_router.door import FLEET_PATHS
from sglang_star_router.engine import EngineClient
from sglang_star_router.fleet import Fleet
from sglang_star_router.forwarding import request_block
from sglang_star_router.instance import Instance
from sglang_star_router.intake import CONTROL_BYTES, Intake
from sglang_star_router.proxy import Proxy
from sglang_star_router.replies import Rejected, json_reply, rejection
from sglang_star_router.upstream import Pool

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
SECRETS: Final = frozenset({"api_key", "admin_api_key", "ssl_keyfile_password", "launch_command"})
NOBODY: Final = Rejected(
    "no healthy instance", status=503, kind="service_unavailable", retry_after_s=1
)


class EngineApi:
    """Asks instances on behalf of clients."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        pool: Pool,
        engine: EngineClient,
        intake: Intake,
        proxy: Proxy,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._pool = pool
        self._engine = engine
        self._intake = intake
        self._proxy = proxy
        self._turn = 0

    def routes(self) -> list[web.RouteDef]:
        """Its endpoints, special ones before those that take the rest."""
        return [
            *(web.route("*", path, self._every_instance) for path in FLEET_PATHS),
            web.get("/server_info", self._server_info),
            web.get("/get_server_info", self._server_info),
            web.get("/v1/realtime", self._no_websocket),
            web.get("/v1/responses/{name}", self._stored_response),
            web.post("/v1/responses/{name}/cancel", self._stored_response),
            *(web.route("*", path, self._any_instance) for path in ANY_INSTANCE),
        ]

    async def _no_websocket(self, request: web.Request) -> web.Response:
        raise Rejected(
            "the router passes no WebSocket on", status=501, kind="not_implemented_error",
            hint="POST audio to /v1/audio/transcriptions, or connect to an engine",
        )  # fmt: skip

    async def _stored_response(self, request: web.Request) -> web.StreamResponse:
        """Ask the engine that stores a response."""
        if self._config.disaggregated:
            raise Rejected(
                "SGLang stores no responses where prefill and decode are apart",
                status=501, kind="not_implemented_error",
            )  # fmt: skip
        home = await self._intake.affinity.home(request.match_info["name"])
        return await self._proxy.forward(request, home)

    async def _any_instance(self, request: web.Request) -> web.StreamResponse:
        """Pass on what any instance can answer, to each healthy one in turn."""
        healthy = [one for one in self._fleet.decoding() if one.healthy]
        if not healthy:
            return rejection(NOBODY)
        self._turn += 1
        return await self._proxy.forward(request, healthy[self._turn % len(healthy)])

    async def _every_instance(self, request: web.Request) -> web.Response:
        """Send to every healthy instance; the answer is the worst of theirs."""
        body = await self._intake.read(request, CONTROL_BYTES)
        members = [one for one in self._fleet if one.healthy]
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
        exchange = await self._pool.send(instance.endpoint, block)
        try:
            async with asyncio.timeout(self._config.request_timeout):
                head = await exchange.opened
                return head.status, (await exchange.collect()).decode(errors="replace")
        finally:
            exchange.abort()

    async def _server_info(self, request: web.Request) -> web.StreamResponse:
        """One instance's when aggregated; in PD all of them, under ``prefill`` and ``decode``."""
        if not self._config.disaggregated:
            self._turn += 1
            healthy = [one for one in self._fleet if one.healthy]
            if not healthy:
                return rejection(NOBODY)
            one = healthy[self._turn % len(healthy)]
            status, info = await self._engine.json(one, "GET", "/server_info")
            return json_reply(_without_secrets(info), status)
        infos: dict[str, list[Any]] = {"prefill": [], "decode": []}
        for instance in self._fleet:
            if not instance.healthy:
                continue
            try:
                status, info = await self._engine.json(instance, "GET", "/server_info")
            except PeerError:
                continue
            if status == 200:
                infos[instance.role].append(_without_secrets(info))
        if not all(infos.values()):
            return rejection(NOBODY)
        return json_reply(infos)


def _without_secrets(info: Any) -> Any:
    """What an engine says of itself, less its keys, which plain SGLang shows."""
    if not isinstance(info, dict):
        return info
    return {name: value for name, value in info.items() if name not in SECRETS}
