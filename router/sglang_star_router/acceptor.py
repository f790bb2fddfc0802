"""Where clients' connections are taken in, as many as there are descriptors for.

An event loop that runs out of descriptors while it accepts closes what it could not accept: libuv
keeps one descriptor back for nothing else. So connections are accepted here, and only while there
is room; the others wait in the kernel's backlog until one before them has had its answer, which
may be that there is no room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Final

from sglang_star_router.descriptors import LOOK_S, Descriptors, is_local

logger = logging.getLogger(__name__)

BACKLOG: Final = 4096
AT_ONCE: Final = 64
"""Connections accepted in one go, before anything else has its turn."""


class Acceptor:
    """Accepts on all addresses of one host.

    Args:
        serve: makes the protocol of one connection.
        make_room: called while clients wait and there is no room: it may close idle ones.
        handshake_s: how long a TLS handshake may take.
    """

    def __init__(
        self,
        serve: Callable[[], asyncio.Protocol],
        descriptors: Descriptors,
        make_room: Callable[[], None],
        *,
        tls: ssl.SSLContext | None,
        handshake_s: float,
    ) -> None:
        self._serve = serve
        self._descriptors = descriptors
        self._make_room = make_room
        self._tls = tls
        self._handshake_s = handshake_s
        self._sockets: list[socket.socket] = []
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._opening: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> int:
        """Listen; return the port.

        Raises:
            OSError: an address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, kind, proto, _, address in dict.fromkeys(found):
                one = socket.socket(family, kind, proto)
                self._sockets.append(one)
                one.setblocking(False)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(address)
                one.listen(BACKLOG)
        except OSError:
            self.close()
            raise
        for one in self._sockets:
            loop.add_reader(one, self._accept, one)
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        """Accept no more; what is open stays."""
        loop = asyncio.get_running_loop()
        for one in self._sockets:
            loop.remove_reader(one)
            one.close()
        for timer in self._paused.values():
            timer.cancel()
        self._paused.clear()
        self._sockets.clear()

    def _accept(self, listening: socket.socket) -> None:
        """Take in what waits, as far as there is room."""
        for _ in range(AT_ONCE):
            if not self._descriptors.has_room():
                self._pause(listening)
                return
            try:
                client, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if not is_local(error):
                    raise
                self._descriptors.errors["accept"] += 1
                self._pause(listening)
                return
            # Counted from now on; its protocol ends the count.
            self._descriptors.clients += 1
            client.setblocking(False)
            opening = asyncio.get_running_loop().create_task(self._open(client))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    def _pause(self, listening: socket.socket) -> None:
        """Leave clients in the backlog for a while."""
        self._make_room()
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        self._paused[listening] = loop.call_later(LOOK_S, self._go_on, listening)

    def _go_on(self, listening: socket.socket) -> None:
        del self._paused[listening]
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    async def _open(self, client: socket.socket) -> None:
        try:
            # A handshake that fails is the client's affair.
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.get_running_loop().connect_accepted_socket(
                    self._serve, client, ssl=self._tls,
                    ssl_handshake_timeout=self._handshake_s if self._tls else None,
                )  # fmt: skip
                return
        except BaseException:
            self._drop(client)
            raise
        self._drop(client)

    def _drop(self, client: socket.socket) -> None:
        self._descriptors.clients -= 1
        client.close()
