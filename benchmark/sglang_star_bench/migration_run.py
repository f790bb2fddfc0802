"""One row of ``star bench migration``, measured: streams in peace, then streams that move."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import aiohttp

from sglang_star.errors import PeerError
from sglang_star_bench.engines import Stream, greedy, post, warm_up
from sglang_star_bench.migration_reports import Reports, following
from sglang_star_bench.migration_stalls import COMPANION_TOKENS, Outcome, Plan, Round

IDLE_TIMEOUT_S: Final = 60.0
SETTLED: Final = 48
"""Tokens before the first move."""
MARGIN: Final = 1.5
"""A stream moves again only if it has tokens left for so many times the longest move so far."""


async def measure(
    urls: Sequence[str], plan: Plan, carried: Callable[[], int] = lambda: 0
) -> Outcome:
    """Measure one row on two engines.

    Args:
        urls: of the engines.
        plan: the row.
        carried: bytes that both have sent over the network so far.
    """
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
        following(session, urls) as reports,
    ):
        for url in urls:
            await warm_up(session, url, plan.batch)
        bodies = [_body(plan, number) for number in range(plan.at_once)]
        outcome = Outcome(names=[reports.names[url] for url in urls])
        await _forget(session, urls)
        async with _company(session, urls, plan), asyncio.TaskGroup() as group:
            for body in bodies:
                outcome.twins.append(Stream())
                group.create_task(outcome.twins[-1].read(session, urls[0], body))
        longest = 0
        while (missing := plan.moves - outcome.ordered) > 0:
            await _forget(session, urls)
            sent = carried()
            async with _company(session, urls, plan) as bystanders:
                made = Round([Stream() for _ in bodies], bystanders)
                outcome.rounds.append(made)
                course = Course(session, urls, plan, reports, made, len(outcome.rounds), longest)
                await course.run(bodies, missing)
            outcome.carried += carried() - sent
            longest = course.longest
            if not made.sets:
                raise PeerError(
                    f"a stream of {plan.tokens} tokens is too short for a move",
                    hint="raise --tokens, or take a faster link or shorter contexts",
                )
        await _forget(session, urls)
        for url in urls:
            async with session.get(url + "/star/status") as answer:
                for what, count in (await answer.json())["faults"].items():
                    outcome.faults[what] = outcome.faults.get(what, 0) + count
    return outcome


class Course:
    """Streams that go back and forth between two engines, together, for as long as they last.

    Attributes:
        longest: tokens decoded during the longest move so far.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        plan: Plan,
        reports: Reports,
        made: Round,
        number: int,
        longest: int,
    ) -> None:
        self.longest = longest
        self._session = session
        self._urls = urls
        self._plan = plan
        self._reports = reports
        self._made = made
        self._rids = [f"bench-migration-{number}-{k}-" for k in range(len(made.moved))]
        self._at = [0] * len(made.moved)

    async def run(self, bodies: Sequence[dict[str, Any]], moves: int) -> None:
        """Stream all ``bodies`` from the first engine to their ends, and order the moves."""
        readers = [
            asyncio.create_task(stream.read(self._session, self._urls[0], {**body, "rid": rid}))
            for stream, body, rid in zip(self._made.moved, bodies, self._rids, strict=True)
        ]
        try:
            # The engines' mean step must have forgotten the prefill.
            await self._tokens(min(SETTLED, self._plan.tokens // 8), readers)
            self._made.began = time.time()
            while moves > 0 and await self._gap(readers):
                moves -= await self._order(min(moves, len(readers)))
            await asyncio.gather(*readers)
        finally:
            for reader in readers:
                reader.cancel()

    async def _gap(self, readers: Sequence[asyncio.Task[None]]) -> bool:
        """Let tokens pass; False if too few are left to move again."""
        begin = max(stream.tokens for stream in self._made.moved) + self._plan.gap
        await self._tokens(begin, readers)
        # Nobody can move a request that ends before it arrives.
        left = self._plan.tokens - max(stream.tokens for stream in self._made.moved)
        return left > self._plan.gap + MARGIN * self.longest

    async def _tokens(self, tokens: int, readers: Sequence[asyncio.Task[None]]) -> None:
        while any(
            stream.tokens < tokens and not reader.done()
            for stream, reader in zip(self._made.moved, readers, strict=True)
        ):
            await asyncio.sleep(0.005)

    async def _order(self, count: int) -> int:
        """Send ``count`` requests over and wait until all have arrived; returns ``count``."""
        before = [stream.tokens for stream in self._made.moved]
        orders = [
            post(
                self._session,
                self._urls[self._at[k]] + "/star/migrate",
                {"rid": self._rids[k], "target": self._urls[1 - self._at[k]], "reason": "bench"},
            )
            for k in range(count)
        ]
        accepted = await asyncio.gather(*orders)
        ended = await self._reports.of([one["migration_id"] for one in accepted])
        for k, report in enumerate(ended):
            if report["outcome"] == "moved":
                self._at[k] = 1 - self._at[k]
        self._made.sets.append(ended)
        self.longest = max(
            self.longest,
            *(s.tokens - b for s, b in zip(self._made.moved, before, strict=True)),
        )
        return count


def _body(plan: Plan, number: int) -> dict[str, Any]:
    chance = random.Random(1000 * plan.context + number)
    prompt = [chance.randrange(100, 30000) for _ in range(plan.context)]
    return {"input_ids": prompt, "sampling_params": greedy(plan.tokens)}


@contextlib.asynccontextmanager
async def _company(
    session: aiohttp.ClientSession, urls: Sequence[str], plan: Plan
) -> AsyncIterator[list[list[Stream]]]:
    """Keep ``batch - 1`` other requests running on each engine; aborts them at the end."""
    streams: list[list[Stream]] = [[] for _ in urls]
    tasks = []
    for number in range((plan.batch - 1) * len(urls)):
        mine = streams[number % len(urls)]
        body = {
            "input_ids": [1000 + number] * COMPANION_TOKENS,
            "sampling_params": greedy(plan.companion_tokens),
        }
        mine.append(Stream())
        tasks.append(asyncio.create_task(mine[-1].read(session, urls[number % len(urls)], body)))
    try:
        while not all(stream.tokens for mine in streams for stream in mine):
            await asyncio.sleep(0.02)
        yield streams
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forget(session: aiohttp.ClientSession, urls: Sequence[str]) -> None:
    """Empty the prefix caches, as soon as nothing runs any more.

    Raises:
        PeerError: an engine keeps running something.
    """
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    for url in urls:
        while True:
            async with session.post(url + "/flush_cache") as answer:
                if answer.status == 200:
                    break
            if time.monotonic() > deadline:
                raise PeerError(f"{url} does not become idle", hint="see its log")
            await asyncio.sleep(0.1)
