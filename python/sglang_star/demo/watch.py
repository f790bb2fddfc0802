"""A watcher of the router: KV of every decoding instance, its requests' estimates, the moves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from sglang_star.demo.forecast import peak_tokens

POLL_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Sighting:
    """A request as an instance reported it while it ran.

    Attributes:
        at_s: seconds of the monotonic clock.
        output_tokens: tokens so far.
        remaining: estimated remaining tokens, five quantiles, or empty.
    """

    at_s: float
    rid: str
    instance: str
    output_tokens: int
    remaining: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """An instance at one moment.

    Attributes:
        at_s: seconds of the monotonic clock.
        used, ahead, capacity: KV tokens now, expected at most within the forecast's horizon,
            and in all.
        waiting: requests that wait for memory or admission.
        retractions, late: totals since the engine started; see ``docs/metrics.md``.
    """

    at_s: float
    instance: str
    used: int
    ahead: float
    capacity: int
    running: int
    waiting: int
    retractions: int
    late: int


@dataclass
class Watcher:
    """Polls the router.

    Attributes:
        loads, sightings: of every poll, in order.
        moves: the router's migrations, the latest first, as of the last poll.
    """

    url: str
    loads: list[Load] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)
    clock_offset_s: float = field(default_factory=lambda: time.time() - time.monotonic())

    @contextlib.asynccontextmanager
    async def watching(self, seen: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
        """Poll during the block and once before it; ``seen`` is called after every poll."""
        async with aiohttp.ClientSession(self.url) as session:
            await self.poll(session)
            task = asyncio.create_task(self._watch(session, seen))
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _watch(self, session: aiohttp.ClientSession, seen: Callable[[], None]) -> None:
        while True:
            await self.poll(session)
            seen()
            await asyncio.sleep(POLL_S)

    def latest(self) -> dict[str, Load]:
        """Return the last load of every instance, by name."""
        return dict(sorted({load.instance: load for load in self.loads}.items()))

    async def poll(self, session: aiohttp.ClientSession) -> None:
        """Look once; an answer that fails to come is only a gap in the picture."""
        try:
            async with session.get("/star/cluster") as answer:
                fleet = await answer.json()
            async with session.get("/star/migrations", params={"limit": "2000"}) as answer:
                self.moves = (await answer.json())["migrations"]
        except (aiohttp.ClientError, OSError):
            return
        now = time.monotonic()
        for instance in fleet["instances"]:
            if instance["role"] != "prefill" and instance["status"]:
                self._take(now, instance["name"], instance["status"])

    def _take(self, now: float, name: str, status: dict[str, Any]) -> None:
        held = [request for request in status["requests"] if not request["queued"]]
        self.sightings += [
            Sighting(now, one["rid"], name, one["output_tokens"], tuple(one["remaining"]))
            for one in held
        ]
        ahead = peak_tokens(
            (one["prompt_tokens"] + one["output_tokens"], one["remaining"]) for one in held
        )
        self.loads.append(
            Load(
                now,
                name,
                used=status["kv_used_tokens"] + status["kv_reserved_tokens"],
                ahead=ahead,
                capacity=status["kv_capacity_tokens"],
                running=status["running"],
                waiting=status["queued"] + status["retracted"],
                retractions=status["retractions"],
                late=status["paced_late"],
            )
        )
