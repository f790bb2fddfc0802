"""A real cluster under test: its engines, its router, and a mover that keeps requests moving."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from sglang_star.cluster import Cluster


class Fleet:
    """HTTP access to a running cluster, for one event loop."""

    def __init__(self, cluster: Cluster, session: aiohttp.ClientSession) -> None:
        self.router = cluster.url
        self.session = session
        self.engines = {e.name: e.url for e in cluster.engines if e.role != "prefill"}
        self.all_engines = {e.name: e.url for e in cluster.engines}
        self.moved: list[dict[str, Any]] = []
        self._reports: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, cluster: Cluster) -> AsyncIterator[Fleet]:
        timeout = aiohttp.ClientTimeout(total=240)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            yield cls(cluster, session)

    async def post(self, url: str, body: Any) -> tuple[int, Any]:
        async with self.session.post(url, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    async def get(self, url: str) -> Any:
        async with self.session.get(url) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None)

    async def statuses(self) -> dict[str, Any]:
        found = await asyncio.gather(
            *(self.get(url + "/star/status") for url in self.engines.values())
        )
        return dict(zip(self.engines, found, strict=True))

    async def settle(self) -> None:
        """Wait until nothing runs anywhere, then forget every cached prefix."""
        for _ in range(600):
            statuses = await self.statuses()
            if all(
                s["running"] == s["queued"] == s["kv_reserved_tokens"] == 0
                for s in statuses.values()
            ):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"requests are left behind: {statuses}")
        await asyncio.gather(*(self._flush(url) for url in self.all_engines.values()))
        for name, status in (await self.statuses()).items():
            assert status["kv_used_tokens"] == 0, f"{name} leaks KV"

    async def _flush(self, url: str) -> None:
        for _ in range(100):
            async with self.session.post(url + "/flush_cache") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{url} cannot flush its cache: it holds something")

    async def order(self, rid: str, source: str, target: str) -> tuple[int, Any]:
        return await self.post(
            self.engines[source] + "/star/migrate",
            {"rid": rid, "target": self.engines[target], "reason": "test"},
        )

    async def keep_moving(self, moves: int, pause_s: float = 0.02) -> None:
        """Send every running request to the next engine of the ring, at most ``moves`` times."""
        ring = dict(itertools.pairwise([*self.engines, next(iter(self.engines))]))
        done: dict[str, int] = {}
        while True:
            for name, status in (await self.statuses()).items():
                self._note(status)
                for request in status["requests"]:
                    rid = request["rid"]
                    ready = request["state"] == "running" and not request["queued"]
                    if ready and request["output_tokens"] >= 2 and done.get(rid, 0) < moves:
                        code, _ = await self.order(rid, name, ring[name])
                        done[rid] = done.get(rid, 0) + (code == 202)
            await asyncio.sleep(pause_s)

    @contextlib.asynccontextmanager
    async def moving(self, moves: int = 3) -> AsyncIterator[None]:
        """Keep requests moving during the block; collects what moved in ``self.moved``."""
        before = {m["migration_id"] for s in (await self.statuses()).values() for m in _moves(s)}
        mover = asyncio.create_task(self.keep_moving(moves))
        try:
            yield
        finally:
            mover.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await mover
        for status in (await self.statuses()).values():
            self._note(status)
        self.moved = [
            report
            for name, report in self._reports.items()
            if name not in before and report["outcome"] == "moved"
        ]

    def _note(self, status: dict[str, Any]) -> None:
        """Keep the reports of a status: it shows each for ten seconds only."""
        for report in _moves(status):
            self._reports[report["migration_id"]] = report


def _moves(status: dict[str, Any]) -> list[dict[str, Any]]:
    return list(status["recent_moves"])
