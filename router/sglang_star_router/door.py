"""The door: who may ask what, by key; what browsers may read; and who asked for what.

The levels are those of SGLang's own server. Ordinary routes need the API key if there is one. The
control plane needs an admin key if there is one, else the API key.
"""

from __future__ import annotations

import hmac
import logging
from typing import Final

from aiohttp import web

from sglang_star_router.config import RouterConfig
from sglang_star_router.control_key import ControlKey
from sglang_star_router.early import EXTRA_HEAD
from sglang_star_router.metrics import Metrics
from sglang_star_router.replies import Rejected

audit = logging.getLogger("sglang_star_router.audit")

AUTHORIZATION: Final = web.RequestKey("authorization", bytes)
"""Where a request keeps the ``Authorization`` that instances are given; empty bytes for none."""
HOLDER: Final = web.RequestKey("holder", str)
OPEN_PATHS: Final = frozenset(
    {"/health", "/health_generate", "/ready", "/readiness", "/liveness", "/ping", "/metrics",
     "/dashboard"}
)  # fmt: skip
"""Served without a key, as SGLang does for health and metrics; they show no prompts."""
FLEET_PATHS: Final = ("/flush_cache", "/abort_request", "/start_profile", "/stop_profile")
"""SGLang's admin routes that make sense only for the whole fleet."""


class Door:
    """Lets requests in or refuses them."""

    def __init__(self, config: RouterConfig, metrics: Metrics) -> None:
        self._metrics = metrics
        self._api_key = config.api_key
        self._worker = config.api_key
        self._worker_admin = config.admin_api_key or config.api_key
        self._admins = config.control_plane_api_keys
        if config.admin_api_key:
            self._admins = (ControlKey("admin", True, config.admin_api_key), *self._admins)
        self._audit = config.control_plane_audit_enabled
        self._origins = frozenset(config.cors_allowed_origins)

    def open(self, request: web.Request) -> None:
        """Check a request's key, and note the one that instances are given instead.

        Raises:
            Rejected: it has none, a wrong one, or one that is not enough.
        """
        path = request.path
        if "." in path and any(part in (".", "..") for part in path.split("/")):
            raise Rejected("no such path", status=404, kind="invalid_request_error")
        if request.path in OPEN_PATHS:
            return
        given = _bearer(request)
        holder = next((one for one in self._admins if _same(given, one.key)), None)
        request[HOLDER] = "nobody known" if holder is None else holder.name
        control, admin = is_control(request), holder is not None and holder.admin
        if control and self._admins:
            if holder is None:
                raise self._denied("admin", "this needs an admin key", 401)
            if not admin and (request.method != "GET" or request.path in FLEET_PATHS):
                raise self._denied("admin", "this key may look but give no orders", 403)
        elif self._api_key and not (admin or _same(given, self._api_key)):
            raise self._denied("client", "missing or wrong API key", 401)
        key = self._worker_admin if control else self._worker
        if key:
            request[AUTHORIZATION] = f"Bearer {key}".encode()
        elif holder is not None:
            request[AUTHORIZATION] = b""

    def log(self, request: web.Request, status: int) -> None:
        """Note what the control plane was asked, if that is wanted."""
        if self._audit and is_control(request):
            who = request.get(HOLDER, "nobody known")
            # As it came, percent signs and all: what is decoded could hold a line of its own.
            path = request.rel_url.raw_path
            audit.info("%s from %s: %s %s: %d", who, request.remote, request.method, path, status)

    def origin(self, request: web.Request) -> dict[str, str]:
        """Headers that let the page that asks read the answer; none for others."""
        origin = request.headers.get("Origin", "")
        if not origin or not ({"*", origin} & self._origins):
            return {}
        headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        request[EXTRA_HEAD] = "".join(f"{k}: {v}\r\n" for k, v in headers.items()).encode("latin-1")
        return headers

    def preflight(self, request: web.Request, allowed: dict[str, str]) -> web.Response:
        """Answer a browser that asks before it sends."""
        wanted = request.headers.get("Access-Control-Request-Headers", "*")
        return web.Response(
            status=204,
            headers=allowed
            | {
                "Access-Control-Allow-Methods": "GET, POST, PUT, OPTIONS",
                "Access-Control-Allow-Headers": wanted,
                "Access-Control-Max-Age": "3600",
            },
        )

    def _denied(self, door: str, message: str, status: int) -> Rejected:
        self._metrics.denied.labels(door).inc()
        kind = "authentication_error" if status == 401 else "permission_error"
        return Rejected(message, status=status, kind=kind, hint="send Authorization: Bearer KEY")


def is_control(request: web.Request) -> bool:
    """Whether a request is for the control plane."""
    resource = request.match_info.route.resource
    route = request.path if resource is None else resource.canonical
    return any(path.startswith("/star/") or path in FLEET_PATHS for path in (request.path, route))


def _bearer(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode())
