"""``/star/*``: what operators ask and order."""

from __future__ import annotations

import logging
from typing import Any

import orjson
from aiohttp import web

from sglang_star.errors import ConfigError, OrderRefused, PeerError, StarError, UnknownRequest
from sglang_star_router.dispatch import Dispatcher
from sglang_star_router.engine import EngineClient
from sglang_star_router.fleet import Fleet
from sglang_star_router.instance import Instance
from sglang_star_router.intake import CONTROL_BYTES, Intake
from sglang_star_router.ledger import Ledger
from sglang_star_router.policy.snapshot import MoveOrder
from sglang_star_router.replies import json_reply, star_error
from sglang_star_router.rescheduler import OrderSender, peer_json
from sglang_star_router.telemetry import StatusFeed
from sglang_star_router.views import cluster_json

logger = logging.getLogger(__name__)

MIGRATIONS_SHOWN = 200


class StarApi:
    """Handlers of the router's own endpoints; errors are ``{"error": {type, message, hint}}``."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        sender: OrderSender,
        engine: EngineClient,
        dispatcher: Dispatcher,
        feed: StatusFeed,
        intake: Intake,
    ) -> None:
        self._intake = intake
        self._fleet = fleet
        self._ledger = ledger
        self._sender = sender
        self._engine = engine
        self._dispatcher = dispatcher
        self._feed = feed

    def routes(self) -> list[web.RouteDef]:
        """Return the routes to add to the application."""
        return [
            web.get("/star/cluster", self.cluster),
            web.get("/star/migrations", self.migrations),
            web.post("/star/migrate", self.migrate),
            web.post("/star/drain", self.drain),
            web.post("/star/undrain", self.undrain),
        ]

    async def cluster(self, request: web.Request) -> web.Response:
        """Show the fleet; ``?requests=0`` leaves out the running requests."""
        requests = request.query.get("requests", "1") != "0"
        return json_reply(
            cluster_json(self._fleet, self._ledger, self._dispatcher, self._feed, requests=requests)
        )

    async def migrations(self, request: web.Request) -> web.Response:
        """Show migrations, the latest first; ``?limit=N``."""
        try:
            limit = max(0, int(request.query.get("limit", MIGRATIONS_SHOWN)))
        except ValueError:
            return star_error(ConfigError("limit must be a whole number"))
        rows = [migration.to_json() for migration in self._ledger]
        return json_reply(
            {
                "open": self._ledger.open_count,
                "outcomes": dict(self._ledger.outcomes),
                "total": len(rows),
                "migrations": rows[:limit],
            }
        )

    async def migrate(self, request: web.Request) -> web.Response:
        """Move one running request: ``{"rid", "target"}``."""
        try:
            body = await self._object(request)
            rid, target = _text(body, "rid"), _text(body, "target")
            source = self._fleet.holder(rid)
            if source is None:
                raise UnknownRequest(
                    f"no running request has rid {rid!r}",
                    hint="GET /star/cluster lists the running requests",
                )
            if rid in self._ledger.busy and self._ledger.busy[rid] == float("inf"):
                raise OrderRefused(f"{rid} is moving already", hint="wait for it to arrive")
            order = MoveOrder(rid, source.name, target, "operator", 0.0)
            migration = await self._sender.move(order, "operator")
        except StarError as error:
            return star_error(error)
        return json_reply(migration.to_json(), 202)

    async def drain(self, request: web.Request) -> web.Response:
        """Empty an instance: ``{"instance", "targets"?}``; targets default to all others."""
        try:
            body = await self._object(request)
            instance = self._instance(_text(body, "instance"))
            named = body.get("targets")
            if named is not None and not (
                isinstance(named, list) and all(isinstance(name, str) for name in named)
            ):
                raise ConfigError("targets must be a list of instances")
            if named is None:
                others = [
                    one for one in self._fleet.decoding()
                    if one is not instance and one.healthy and not one.draining
                    and self._fleet.obstacles.between(instance.name, one.name) is None
                ]  # fmt: skip
            else:
                others = [self._instance(name) for name in named]
            if instance in others:
                raise OrderRefused(f"{instance.name} cannot be drained to itself")
            for one in others:
                why = self._fleet.obstacles.between(instance.name, one.name)
                if why is not None:
                    raise OrderRefused(
                        f"{instance.name} cannot be drained to {one.name}: {why.text}",
                        hint="leave targets out: all that can take its requests are taken",
                    )
            instance.held_back = True
            self._fleet.changed()
            answer: Any = None
            if instance.advertisement is not None:
                targets = others if instance.role != "prefill" else []
                payload = {
                    "targets": [one.endpoint.url for one in targets],
                    "peers": [peer_json(one) for one in targets],
                }
                try:
                    answer = await self._order(instance, "/star/drain", payload)
                except StarError:
                    instance.held_back = False
                    self._fleet.changed()
                    raise
        except StarError as error:
            return star_error(error)
        logger.info("%s drains", instance.name)
        return json_reply({"instance": instance.name, "draining": True, "engine": answer})

    async def undrain(self, request: web.Request) -> web.Response:
        """Let an instance serve again: ``{"instance"}``."""
        try:
            body = await self._object(request)
            instance = self._instance(_text(body, "instance"))
            answer: Any = None
            if instance.advertisement is not None:
                answer = await self._order(instance, "/star/undrain", {})
        except StarError as error:
            return star_error(error)
        instance.held_back = False
        self._fleet.changed()
        logger.info("%s serves again", instance.name)
        return json_reply({"instance": instance.name, "draining": False, "engine": answer})

    # ------------------------------------------------------------------ inside

    async def _object(self, request: web.Request) -> dict[str, Any]:
        try:
            body = orjson.loads(await self._intake.read(request, CONTROL_BYTES))
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise ConfigError("the body must be a JSON object")
        return body

    async def _order(self, instance: Instance, path: str, payload: dict[str, Any]) -> Any:
        status, answer = await self._engine.json(instance, "POST", path, payload)
        if status >= 400:
            detail = answer.get("error") if isinstance(answer, dict) else None
            message = detail.get("message") if isinstance(detail, dict) else None
            kind = PeerError if status >= 500 else OrderRefused
            raise kind(str(message or f"{instance.name} answered {status} to {path}"))
        return answer

    def _instance(self, name: str) -> Instance:
        instance = self._fleet.find(name)
        if instance is None:
            known = ", ".join(one.name for one in self._fleet)
            raise NoSuchInstance(f"no instance {name!r} in the fleet", hint=f"it has: {known}")
        return instance


class NoSuchInstance(ConfigError):
    """An operator named an instance the router does not have."""

    status = 404


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name!r} is missing or not a string")
    return value
