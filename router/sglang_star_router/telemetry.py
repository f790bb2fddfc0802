"""Listens to every instance's status socket and believes nothing that does not decode."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import zmq
import zmq.asyncio

from sglang_star.errors import PeerError, ProtocolError
from sglang_star.fleet_key import Access
from sglang_star.protocol import InstanceStatus, decode
from sglang_star_router.fleet import Fleet, Verdict
from sglang_star_router.instance import Instance

logger = logging.getLogger(__name__)

RECEIVE_QUEUE = 16
"""Statuses kept for a busy router; older ones are worth nothing."""
SILENT_S = 3.0
"""A socket that brings nothing for so long is replaced: its connection may hang half open.

Not libzmq's heartbeats: where the receive queue is full it reads no answers to them, takes the
connection for dead and ends the process when the queue is read again (libzmq issue 3937).
"""
REOPEN_S = 1.0
"""After so long a socket that could not be opened is tried again."""


def subscribe(socket: zmq.asyncio.Socket, access: Access, address: str) -> None:
    """Make a SUB socket receive what an instance publishes.

    Raises:
        PeerError: it does not let us in; ZMQError: the address is none.
    """
    socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.subscribe(b"")
    access.connect(socket, address)


class StatusFeed:
    """One SUB socket per instance, following its advertisement.

    Attributes:
        dropped: messages dropped, by ``(instance URL, reason)``.
        received: statuses taken in.
    """

    def __init__(self, fleet: Fleet, suspect: Callable[[Instance], None], access: Access) -> None:
        """``suspect`` is called when an instance speaks as another incarnation."""
        self._access = access
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.received = 0
        self._fleet = fleet
        self._suspect = suspect
        self._context = zmq.asyncio.Context()
        self._listening: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._live: set[str] = set()
        self._warned: set[tuple[str, str]] = set()

    def follow(self, instance: Instance) -> None:
        """Listen where the instance publishes now, or nowhere if it does not.

        A socket that has brought nothing since the last call is replaced even so.
        """
        url = instance.endpoint.url
        advertised = instance.advertisement
        address = advertised.status_address if advertised is not None else ""
        known = self._listening.get(url)
        if known is not None:
            if known[0] == address and not known[1].done() and url in self._live:
                self._live.discard(url)
                return
            known[1].cancel()
            del self._listening[url]
        if address:
            task = asyncio.create_task(self._listen(instance, address), name=f"status {url}")
            self._listening[url] = (address, task)

    async def close(self) -> None:
        """Stop listening."""
        tasks = [task for _, task in self._listening.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listening.clear()
        self._context.destroy(linger=0)

    async def _listen(self, instance: Instance, address: str) -> None:
        while True:
            try:
                with self._context.socket(zmq.SUB) as socket:
                    await self._receive(socket, instance, address)
            except TimeoutError:
                continue
            except (PeerError, zmq.ZMQError) as error:
                self._drop(instance, "address", f"cannot subscribe to {address!r}: {error}")
            await asyncio.sleep(REOPEN_S)

    async def _receive(self, socket: zmq.asyncio.Socket, instance: Instance, address: str) -> None:
        subscribe(socket, self._access, address)
        while True:
            async with asyncio.timeout(SILENT_S):
                frames = await socket.recv_multipart()
            self._take(instance, frames)

    def _take(self, instance: Instance, frames: list[bytes]) -> None:
        self._live.add(instance.endpoint.url)
        try:
            message = decode(frames[-1])
        except ProtocolError as error:
            self._drop(instance, type(error).__name__, str(error))
            return
        if not isinstance(message, InstanceStatus):
            self._drop(instance, "unexpected", f"{type(message).__name__} on a status socket")
            return
        verdict = self._fleet.apply(instance, message)
        if verdict is Verdict.TAKEN:
            self.received += 1
            return
        self.dropped[instance.endpoint.url, verdict.value] += 1
        if verdict is not Verdict.STALE:
            self._suspect(instance)

    def _drop(self, instance: Instance, reason: str, detail: str) -> None:
        key = (instance.endpoint.url, reason)
        self.dropped[key] += 1
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("dropping messages from %s: %s", instance.endpoint.url, detail)
