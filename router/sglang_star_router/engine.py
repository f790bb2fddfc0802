"""The router's own calls to an instance: health, description, orders."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from sglang_star.errors import PeerError
from sglang_star_router.exchange import UpstreamLost
from sglang_star_router.instance import Instance
from sglang_star_router.upstream import Pool


class EngineClient:
    """Small JSON requests on the shared connection pool."""

    def __init__(
        self, pool: Pool, api_key: str | None, timeout_s: float, *, admin_key: str | None = None
    ) -> None:
        """``admin_key`` is for engines' admin routes, ``/star/*``; without it ``api_key`` is."""
        self._pool = pool
        self._keys = {False: api_key, True: admin_key or api_key}
        self._timeout_s = timeout_s

    async def call(
        self,
        instance: Instance,
        method: str,
        path: str,
        payload: object = None,
        timeout_s: float | None = None,
    ) -> tuple[int, bytes]:
        """Return status and body.

        Raises:
            PeerError: no answer, or not in time.
        """
        body = b"" if payload is None else orjson.dumps(payload)
        key = self._keys[path.startswith("/star/")]
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        block = (
            f"{method} {path} HTTP/1.1\r\n"
            f"Host: {instance.endpoint.url.partition('://')[2]}\r\n"
            f"Accept: application/json\r\n{authorization}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                try:
                    return await self._exchange(instance, block)
                except UpstreamLost as error:
                    if not error.stale:
                        raise
                # A kept connection that the server had closed says nothing about it.
                return await self._exchange(instance, block)
        except TimeoutError:
            raise PeerError(f"{method} {path} at {instance.name}: no answer in time") from None

    async def _exchange(self, instance: Instance, block: bytes) -> tuple[int, bytes]:
        exchange = await self._pool.send(instance.endpoint, (block,))
        try:
            head = await exchange.opened
            return head.status, await exchange.collect()
        finally:
            exchange.abort()

    async def json(
        self, instance: Instance, method: str, path: str, payload: object = None
    ) -> tuple[int, Any]:
        """Return status and parsed body; None for a body that is not JSON.

        Raises:
            PeerError: no answer, or not in time.
        """
        status, body = await self.call(instance, method, path, payload)
        try:
            return status, orjson.loads(body)
        except orjson.JSONDecodeError:
            return status, None
