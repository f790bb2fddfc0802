"""Reports of moves as the engines publish them: asking for them would disturb what is measured."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import aiohttp
import zmq
import zmq.asyncio
from msgspec import structs

from sglang_star.errors import PeerError, ProtocolError
from sglang_star.protocol import InstanceStatus, decode

END_TIMEOUT_S: Final = 600.0
"""A move that is not reported by then will never be."""


class Reports:
    """What became of the moves of some engines.

    Attributes:
        names: the engines' instance ids by URL.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self._ended: dict[str, dict[str, Any]] = {}
        self._news = asyncio.Event()

    async def of(self, migration_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Wait until all these moves have ended.

        Raises:
            PeerError: one did not.
        """
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                while not all(one in self._ended for one in migration_ids):
                    await self._news.wait()
                    self._news.clear()
        except TimeoutError:
            raise PeerError(
                f"moves {migration_ids} have no end after {END_TIMEOUT_S:g} s"
            ) from None
        return [self._ended[one] for one in migration_ids]

    async def _follow(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            with contextlib.suppress(ProtocolError):
                status = decode(frames[-1])
                if isinstance(status, InstanceStatus):
                    for report in status.recent_moves:
                        self._ended.setdefault(report.migration_id, structs.asdict(report))
                    self._news.set()


@contextlib.asynccontextmanager
async def following(session: aiohttp.ClientSession, urls: Sequence[str]) -> AsyncIterator[Reports]:
    """Listen to the engines at ``urls`` during the block."""
    reports = Reports({})
    context = zmq.asyncio.Context()
    tasks = []
    try:
        for url in urls:
            async with session.get(url + "/server_info") as answer:
                star = (await answer.json())["star"]
            reports.names[url] = star["instance_id"]
            socket = context.socket(zmq.SUB)
            socket.subscribe(b"")
            socket.connect(star["status_address"])
            tasks.append(asyncio.create_task(reports._follow(socket)))
        yield reports
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        context.destroy(linger=0)
