"""Keep-alive HTTP/1.1 connections to instances, pooled."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, cast

from sglang_star.errors import PeerError
from sglang_star_router.descriptors import is_local
from sglang_star_router.exchange import Exchange
from sglang_star_router.members import Endpoint

IDLE_S: Final = 4.0
"""Idle connections older than this are not used: SGLang's server closes them after 5 s."""


class OutOfResources(PeerError):
    """This machine has no descriptor, port or memory for a connection; no instance is to blame."""


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.transport: asyncio.Transport
        self.idle_since = 0.0
        self._pool = pool
        self._exchange: Exchange | None = None
        self._used = False

    @property
    def url(self) -> str:
        """Of the instance."""
        return self.endpoint.url

    def send(self, block: Sequence[bytes], *, unframe: bool, bodiless: bool) -> Exchange:
        """Send one request, head and body in pieces."""
        self._exchange = Exchange(self, unframe=unframe, bodiless=bodiless, fresh=not self._used)
        self._used = True
        self.transport.writelines(block)
        return self._exchange

    @property
    def usable(self) -> bool:
        """True while another request may be sent."""
        young = time.monotonic() - self.idle_since < IDLE_S
        return self._exchange is None and not self.transport.is_closing() and young

    def exchanged(self, *, reusable: bool) -> None:
        """End the exchange."""
        self._exchange = None
        if reusable and not self.transport.is_closing():
            self._pool.release(self)
        else:
            self.close()

    def close(self) -> None:
        """Close at once, whatever is going on."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand on what arrived; an idle server has nothing to say."""
        if self._exchange is None:
            self.close()
        else:
            self._exchange.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange, if there is one."""
        self._pool.forget(self)
        if self._exchange is not None:
            self._exchange.end_of_connection(f": {exc}" if exc else "")


class Pool:
    """Idle connections by instance, the most recently used first."""

    def __init__(
        self, connect_timeout_s: float = 5.0, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._all: set[Connection] = set()

    async def send(
        self,
        endpoint: Endpoint,
        block: Sequence[bytes],
        *,
        unframe: bool = False,
        bodiless: bool = False,
        deadline: float = math.inf,
    ) -> Exchange:
        """Send a request on a kept or a new connection.

        Args:
            block: head and body, in pieces.
            unframe: hand on the response body without its chunked framing.
            bodiless: it is a HEAD request.
            deadline: loop time until which a connection may take to be made, at the longest.

        Raises:
            TimeoutError: the deadline has passed.
            PeerError: the instance does not accept connections.
            OutOfResources: this machine cannot make one.
        """
        idle = self._idle[endpoint.url]
        while idle:
            connection = idle.pop()
            if connection.usable:
                break
            connection.close()
        else:
            connection = await self._connect(endpoint, deadline)
        return connection.send(block, unframe=unframe, bodiless=bodiless)

    async def _connect(self, endpoint: Endpoint, deadline: float) -> Connection:
        loop = asyncio.get_running_loop()
        if endpoint.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + self._connect_timeout_s)):
                _, connection = await loop.create_connection(
                    lambda: Connection(self, endpoint),
                    endpoint.host,
                    endpoint.port,
                    ssl=self._tls if endpoint.tls else None,
                )
        except (OSError, TimeoutError, UnicodeError) as error:
            if isinstance(error, TimeoutError) and loop.time() >= deadline:
                raise
            if is_local(error):
                self._trim()
                raise OutOfResources(
                    f"cannot open a connection: {error}",
                    hint="raise the limit of open files (ulimit -n), or run more routers",
                ) from error
            raise PeerError(
                f"cannot connect to {endpoint.url}: {error or type(error).__name__}",
                hint="check that the instance runs and that the router can reach it",
            ) from error
        self._all.add(connection)
        return connection

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        connection.idle_since = time.monotonic()
        self._idle[connection.endpoint.url].append(connection)

    def forget(self, connection: Connection) -> None:
        """Drop a connection that has ended."""
        self._all.discard(connection)
        idle = self._idle[connection.endpoint.url]
        if connection in idle:
            idle.remove(connection)

    @property
    def open(self) -> int:
        """Connections, idle ones among them."""
        return len(self._all)

    def _trim(self) -> None:
        """Close what is idle: its descriptors are wanted."""
        for idle in self._idle.values():
            for connection in tuple(idle):
                connection.close()

    def close(self) -> None:
        """Close every connection."""
        for connection in tuple(self._all):
            connection.close()
