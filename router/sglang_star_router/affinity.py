"""Which engine stores which response of the Responses API."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final
from urllib.parse import quote

from sglang_star.errors import PeerError
from sglang_star_router.engine import EngineClient
from sglang_star_router.fleet import Fleet
from sglang_star_router.instance import Instance
from sglang_star_router.replies import Rejected

REMEMBERED: Final = 100_000
LONGEST: Final = 256
"""Characters of a response's id; SGLang's own have 37."""


class Affinity:
    """Remembers where responses were made; asks all engines about those it does not know."""

    def __init__(self, fleet: Fleet, engine: EngineClient) -> None:
        self._fleet = fleet
        self._engine = engine
        self._homes: OrderedDict[str, str] = OrderedDict()

    def note(self, name: str, instance: Instance) -> None:
        """Remember that ``instance`` made the response ``name``."""
        if not name or len(name) > LONGEST:
            return
        self._homes[name] = instance.endpoint.url
        self._homes.move_to_end(name)
        if len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)

    async def home(self, name: str) -> Instance:
        """The instance that stores a response.

        Raises:
            Rejected: nobody has it, or the one that has it does not serve.
        """
        url = self._homes.get(name)
        found = self._fleet.instances.get(url) if url is not None else await self._ask(name)
        if found is None:
            raise Rejected(
                f"no instance has a response {name[:LONGEST]!r}",
                status=404,
                kind="invalid_request_error",
                hint="responses live as long as the engine that made them, if that was started "
                "with --enable-response-store",
            )
        if not found.healthy:
            raise Rejected(
                f"{found.name}, which stores response {name!r}, is down: {found.trouble}",
                status=503,
                kind="service_unavailable",
                retry_after_s=1,
            )
        return found

    async def others(self, name: str) -> frozenset[str]:
        """URLs of all instances but the one that stores a response.

        Raises:
            Rejected: as :meth:`home`.
        """
        home = await self.home(name)
        if home.draining:
            raise Rejected(
                f"{home.name}, which stores response {name!r}, is being drained",
                status=503,
                kind="service_unavailable",
                retry_after_s=1,
            )
        return frozenset(self._fleet.instances) - {home.endpoint.url}

    async def _ask(self, name: str) -> Instance | None:
        if len(name) > LONGEST:
            return None
        path = f"/v1/responses/{quote(name, safe='')}"
        healthy = [one for one in self._fleet.decoding() if one.healthy]
        answers = await asyncio.gather(*(self._has(one, path) for one in healthy))
        found = next((one for one, has in zip(healthy, answers, strict=True) if has), None)
        if found is not None:
            self.note(name, found)
        return found

    async def _has(self, instance: Instance, path: str) -> bool:
        try:
            status, _ = await self._engine.call(instance, "GET", path)
        except PeerError:
            return False
        return status == 200
