"""The socket that clients connect to, and how long they may take over a request's head."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from aiohttp import ClientConnectionResetError, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from sglang_star_router import tls
from sglang_star_router.acceptor import Acceptor
from sglang_star_router.app import Router
from sglang_star_router.descriptors import Descriptors

IDLE_S: Final = 75.0
"""A connection without a request is closed after this."""
LINGER_S: Final = 2.0
"""The rest of a body that was refused is read for so long, so that the client sees the refusal."""
FAULTS_OF_CLIENTS: Final = (
    HttpProcessingError, web.RequestPayloadError, ClientConnectionResetError,
)  # fmt: skip
"""What is no HTTP, or leaves while it is told to go on (``Expect: 100-continue``)."""
LAST_S: Final = 1.0
"""What is cut short at the end gets so long to say so."""


class _Handler(RequestHandler):
    """Closes its connection when a head has begun, or the first was due, and does not end."""

    __slots__ = (
        "_clients", "_descriptors", "_head_s", "_late", "_malformed", "_timer", "heard_at",
    )  # fmt: skip

    def __init__(
        self,
        *args: Any,
        head_s: float,
        late: Callable[[], None],
        malformed: Callable[[], None],
        descriptors: Descriptors,
        clients: set[_Handler],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.heard_at = 0.0
        self._clients = clients
        self._descriptors = descriptors
        self._head_s = head_s
        self._late = late
        self._malformed = malformed
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._clients.add(self)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Tell heads that are whole from those that are not."""
        seen = self._request_count
        self.heard_at = time.monotonic()
        super().data_received(data)
        if self._request_count > seen or self._request_in_progress:
            self._head_is_here()
        elif self._timer is None and data:
            self._await_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait for nothing more."""
        self._head_is_here()
        self._descriptors.clients -= 1
        self._clients.discard(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Count what is the client's fault."""
        if isinstance(exc, HttpProcessingError):
            self._malformed()
        return super().handle_error(request, status, exc, message)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Leave out what is the client's fault: a stack in the log for each could fill a disk."""
        if not isinstance(kw.get("exc_info"), FAULTS_OF_CLIENTS):
            super().log_exception(*args, **kw)

    @property
    def idle(self) -> bool:
        """It has had its answers, and no other request has begun."""
        # aiohttp waits for the next request, and none has come nor begun to. Between taking a
        # request and working on it nothing else tells.
        waiter = self._waiter
        waits = waiter is not None and not waiter.done()
        return waits and self._timer is None and self._request_count > 0

    def _await_head(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._head_s, self._too_late)

    def _head_is_here(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if self._request_in_progress or self._messages:
            return
        self._late()
        self.force_close()


class Listener:
    """Serves one router on one address; :attr:`port` is known once it listens.

    Raises:
        ConfigError: certificates cannot be used.
    """

    def __init__(self, router: Router, host: str, port: int) -> None:
        self.port = port
        self.tls = tls.server_context(router.config)
        self._router = router
        self._host = host
        self._clients: set[_Handler] = set()
        self._acceptor: Acceptor | None = None
        self._runner = web.AppRunner(
            router.application(),
            # A client that hangs up cancels its handler, which closes the instance's connection.
            handler_cancellation=True,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=LAST_S,
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be bound.
        """
        await self._runner.setup()
        server, loop = self._runner.server, asyncio.get_running_loop()
        assert server is not None
        config, metrics = self._router.config, self._router.metrics
        descriptors = self._router.proxy.descriptors
        self._acceptor = Acceptor(
            lambda: _Handler(
                server, loop=loop, access_log=None, keepalive_timeout=IDLE_S,
                lingering_time=LINGER_S, head_s=config.head_timeout,
                late=metrics.slow_heads.inc, malformed=metrics.malformed.inc,
                descriptors=descriptors, clients=self._clients,
            ),
            descriptors, self._close_idle, tls=self.tls, handshake_s=config.head_timeout,
        )  # fmt: skip
        self.port = await self._acceptor.listen(self._host, self.port)

    def _close_idle(self) -> None:
        """Close the client that has been idle for longest: another one waits for its place."""
        idle = [one for one in self._clients if one.idle]
        if idle:
            min(idle, key=lambda one: one.heard_at).force_close()

    async def close(self, grace_s: float = 0.0, at_once: asyncio.Event | None = None) -> None:
        """Let what is open end, then end what is left.

        Args:
            grace_s: how long to wait for it, seconds.
            at_once: ends the wait early.
        """
        closing = self._router.closing
        ended = asyncio.create_task(closing.wait())
        hurried = asyncio.create_task(at_once.wait()) if at_once is not None else None
        waits = [task for task in (ended, hurried) if task is not None]
        if self._acceptor is not None:
            await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
            self._acceptor.close()
        for task in waits:
            task.cancel()
        closing.cut = True
        await self._runner.cleanup()
