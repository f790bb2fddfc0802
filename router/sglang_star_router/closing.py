"""The end of a router: what is open may finish, up to a limit of time; newcomers go elsewhere."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web


class Closing:
    """Counts open requests and knows when the last one has ended.

    Attributes:
        begun: the router takes nothing new; cut: what is still open is ended now.
        open: requests in progress.
    """

    def __init__(self) -> None:
        self.begun = False
        self.cut = False
        self.open = 0
        self._empty = asyncio.Event()

    def __bool__(self) -> bool:
        """Whether what is open is being ended."""
        return self.cut

    def __enter__(self) -> None:
        self.open += 1

    def __exit__(self, *exc: object) -> None:
        self.open -= 1
        if not self.open:
            self._empty.set()

    async def wait(self) -> None:
        """Return once nothing is open."""
        self.begun = True
        while self.open:
            self._empty.clear()
            await self._empty.wait()


CUT: Final = web.AppKey("cut", Closing)
