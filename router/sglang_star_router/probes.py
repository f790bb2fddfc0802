"""Whether the router lives, and whether it is ready to serve."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from sglang_star_router.closing import Closing
from sglang_star_router.fleet import Fleet
from sglang_star_router.replies import json_reply

READINESS: Final = ("/health", "/health_generate", "/ready", "/readiness")


class Probes:
    """What orchestrators ask."""

    def __init__(self, fleet: Fleet, closing: Closing) -> None:
        self._fleet = fleet
        self._closing = closing

    def routes(self) -> list[web.RouteDef]:
        """Its endpoints."""
        return [
            web.get("/liveness", self._is_alive),
            web.get("/ping", self._is_alive),
            *(web.get(path, self._is_ready) for path in READINESS),
        ]

    async def _is_alive(self, request: web.Request) -> web.Response:
        """200 while the router answers at all."""
        return web.Response()

    async def _is_ready(self, request: web.Request) -> web.Response:
        """200 while every role has a healthy instance and the router takes requests."""
        if self._closing.begun:
            return json_reply({"closing": True}, 503)
        roles = {one.role for one in self._fleet}
        missing = sorted(roles - {one.role for one in self._fleet if one.healthy})
        if not missing:
            return web.Response()
        trouble = {one.name: one.trouble for one in self._fleet if not one.healthy}
        return json_reply({"missing": missing, "trouble": trouble}, 503)
