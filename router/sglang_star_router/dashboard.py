"""``/dashboard``: one page without outside assets that polls the router's own endpoints."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from aiohttp import web


@cache
def html() -> str:
    """Return the page."""
    return (files(__package__) / "dashboard.html").read_text(encoding="utf-8")


async def page(request: web.Request) -> web.Response:
    """Serve the page."""
    return web.Response(text=html(), content_type="text/html", charset="utf-8")
