"""A real cluster under test: its engines, its router, and moves that happen at a token.

Nothing here hopes that a move falls into an answer: orders are armed before the request is sent,
start at a token of its stream, and hold it if it might end first. The time limits end a test that
hangs; none is about speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from sglang_star.cluster import Cluster

HANGS_S = 300.0
"""What takes longer than this will never happen."""


_PROVOKED: dict[str, dict[str, int]] = {}
"""Defects that tests brought about, by the engine's address; any other is one of ours."""

PROMPT_IDS = list(range(1000, 1060, 3))


async def until(happens: Callable[[], Awaitable[Any]], what: str, pause_s: float = 0.02) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + HANGS_S
    while not (answer := await happens()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(pause_s)
    return answer


@dataclass(frozen=True)
class Hop:
    """Each stay of a request on its way around the ring of engines, in output tokens.

    Attributes:
        tokens: decoded on an engine when the next move starts.
        hold_after: decoded at most while it is copied; 0: none, all is copied while it is held;
            None: as many as the copy takes, so that a short answer may end before.
    """

    tokens: int
    hold_after: int | None = 0


class Endless:
    """A streamed greedy request that goes on until the test has seen enough of it.

    What happens to it can take any time, since it never ends before. Its limit is far above the
    tokens that any test waits for.

    Attributes:
        tokens: the output so far.
    """

    REST = 20
    """Tokens to see after what a test did."""
    TIE = 1e-3
    """Two tokens whose logarithms of likelihood are closer are as likely as each other."""

    def __init__(
        self, fleet: Fleet, url: str, rid: str, prompt: list[int], limit: int = 8000
    ) -> None:
        self.rid = rid
        self.tokens: list[int] = []
        self._fleet = fleet
        self._url = url
        self._prompt = prompt
        self._limit = limit
        self._reader = asyncio.create_task(self._read())

    async def until(self, tokens: int) -> None:
        """Wait until so many tokens are here.

        Raises:
            AssertionError: the stream broke off before.
        """

        async def here() -> bool:
            if self._reader.done():
                self._reader.result()
                raise AssertionError(f"{self.rid} ended after {len(self.tokens)} tokens")
            return len(self.tokens) >= tokens

        await until(here, f"{self.rid} has {tokens} tokens")

    async def leave(self) -> None:
        """Disconnect."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def equals_twin(self) -> None:
        """What has come is what the request says undisturbed.

        Sums of floats depend on what else is in a batch, and where two tokens are as likely as
        each other to the last digits this decides: either is right there, and what follows is
        compared with what follows that one.

        Raises:
            AssertionError: it is not, and where.
        """
        known = 0
        while known < len(self.tokens):
            twin = await self._said(known, len(self.tokens) - known)
            rest = self.tokens[known:]
            if twin == rest:
                return
            same = next(
                k for k, pair in enumerate(zip(twin, rest, strict=True)) if len({*pair}) > 1
            )
            at = known + same
            gap = await self._behind(at)
            about = f"{self.rid}: token {at} of {len(self.tokens)} is {self.tokens[at]}"
            assert gap < self.TIE, f"{about}; {twin[same]} is likelier by {gap} (logarithm)"
            known = at + 1

    async def _said(self, known: int, tokens: int) -> list[int]:
        """The next tokens after those that are known."""
        body = self._body(tokens)
        body["input_ids"] = self._prompt + self.tokens[:known]
        code, answer = await self._fleet.post(self._url + "/generate", body)
        assert code == 200, answer
        return list(answer["output_ids"])

    async def _behind(self, at: int) -> float:
        """By how much the likeliest token there is likelier than the one that came."""
        body = {**self._body(2), "return_logprob": True, "top_logprobs_num": 8}
        body["input_ids"] = self._prompt + self.tokens[:at]
        code, answer = await self._fleet.post(self._url + "/generate", body)
        assert code == 200, answer
        likely = answer["meta_info"]["output_top_logprobs"][0]
        came = [chance for chance, token, *_ in likely if token == self.tokens[at]]
        return float(likely[0][0] - came[0]) if came else math.inf

    def _body(self, tokens: int) -> dict[str, Any]:
        params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return {"input_ids": self._prompt, "sampling_params": params}

    async def _read(self) -> None:
        body = {**self._body(self._limit), "rid": self.rid, "stream": True}
        async with self._fleet.session.post(self._url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    self.tokens = chunk["output_ids"]


class Fleet:
    """HTTP access to a running cluster, for one event loop.

    Attributes:
        engines: those that decode, by name; all_engines: prefill instances as well.
        moved: the reports of the latest tour.
    """

    def __init__(self, cluster: Cluster, session: aiohttp.ClientSession) -> None:
        self.router = cluster.url
        self.session = session
        self.engines = {e.name: e.url for e in cluster.engines if e.role != "prefill"}
        self.all_engines = {e.name: e.url for e in cluster.engines}
        self.moved: list[dict[str, Any]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, cluster: Cluster) -> AsyncIterator[Fleet]:
        timeout = aiohttp.ClientTimeout(total=2 * HANGS_S)
        # A kept connection may be closed by the server while a request is being written to it.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            yield cls(cluster, session)

    async def post(self, url: str, body: Any) -> tuple[int, Any]:
        async with self.session.post(url, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    async def get(self, url: str) -> Any:
        async with self.session.get(url) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None)

    async def status(self, name: str) -> dict[str, Any]:
        return dict(await self.get(self.engines[name] + "/star/status"))

    async def statuses(self) -> dict[str, Any]:
        found = await asyncio.gather(*map(self.status, self.engines))
        return dict(zip(self.engines, found, strict=True))

    def other(self, name: str) -> str:
        return next(engine for engine in self.engines if engine != name)

    # ------------------------------------------------------------------ a quiet cluster

    async def settle(self) -> None:
        """Wait until nothing runs anywhere, then forget every cached prefix."""

        async def quiet() -> bool:
            return all(
                s["running"] == s["queued"] == s["kv_reserved_tokens"] == 0
                for s in (await self.statuses()).values()
            )

        await until(quiet, "all requests end")
        await asyncio.gather(*map(self._flush, self.all_engines.values()))
        for name, status in (await self.statuses()).items():
            assert status["kv_used_tokens"] == 0, f"{name} leaks KV"
            assert status["armed"] == 0, f"{name} still has orders"
            met, provoked = status["faults"], _PROVOKED.get(self.engines[name], {})
            assert met == provoked, f"{name} has met defects, see its log: {met}"

    async def _flush(self, url: str) -> None:
        async def flushed() -> bool:
            async with self.session.post(url + "/flush_cache") as answer:
                return answer.status == 200

        await until(flushed, f"{url} flushes its cache: it holds something")

    async def faults(self, name: str, counts: dict[str, int]) -> None:
        """Wait until an engine has met just these defects, beside those provoked before."""
        wanted = Counter(_PROVOKED.get(self.engines[name], {})) + Counter(counts)

        async def met() -> bool:
            found = (await self.status(name))["faults"]
            assert not Counter(found) - wanted, found
            return bool(found == wanted)

        await until(met, f"{name} meets {counts}")
        _PROVOKED[self.engines[name]] = dict(wanted)

    # ------------------------------------------------------------------ orders

    async def order(self, rid: str, source: str, target: str, **fields: Any) -> tuple[int, Any]:
        """Order a move at once, or with ``at_tokens`` arm it."""
        return await self.post(
            self.engines[source] + "/star/migrate",
            {"rid": rid, "target": self.engines[target], "reason": "test", **fields},
        )

    async def arm(self, rid: str, source: str, target: str, hop: Hop, **fields: Any) -> str:
        """Arm one move; returns its migration id."""
        if hop.hold_after is not None:
            fields["hold_after"] = hop.hold_after
        code, answer = await self.order(rid, source, target, at_tokens=hop.tokens, **fields)
        assert code == 202, answer
        return str(answer["migration_id"])

    async def disarm(self) -> list[str]:
        """Forget every armed order; returns their migration ids."""
        answers = await asyncio.gather(
            *(self.post(url + "/star/disarm", {}) for url in self.engines.values())
        )
        return [one for _, answer in answers for one in answer["disarmed"]]

    async def reports(self, migration_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Wait for the end of each move; whatever engine tells of it."""

        async def all_told() -> list[dict[str, Any]] | None:
            told = {
                report["migration_id"]: dict(report)
                for status in (await self.statuses()).values()
                for report in status["recent_moves"]
            }
            wanted = [told.get(one) for one in migration_ids]
            return wanted if all(wanted) else None  # type: ignore[return-value]

        found: list[dict[str, Any]] = await until(all_told, f"{len(migration_ids)} moves end")
        return found

    async def report(self, migration_id: str) -> dict[str, Any]:
        return (await self.reports([migration_id]))[0]

    @property
    def laps(self) -> int:
        """How often a tour passes each engine, so that it has three or four moves."""
        return 1 if len(self.engines) > 2 else 2

    def hops(self, tokens: int) -> list[Hop]:
        """Stays for one tour of an answer of so many tokens, that fit into it whatever happens.

        Every other one is held at once; in between a request is copied while it decodes.
        """
        share = (tokens - 1) // (self.laps * len(self.engines) + 1)
        # A request moves from its second token on, and decodes one more while it is parked.
        assert share >= 3, f"{tokens} tokens are too few for a tour"
        stay = max(2, share // 2)
        return [Hop(stay, 0 if k % 2 else share - stay - 1) for k in range(len(self.engines))]

    @contextlib.asynccontextmanager
    async def tour(
        self, *rids: str, hops: Sequence[Hop], laps: int | None = None
    ) -> AsyncIterator[None]:
        """Send requests around the ring of engines, from wherever they start.

        Each engine gets an order for each name and lap. When the block is over, all of these
        moves must have taken place, and none but these: their reports are in ``self.moved``.
        """
        names = list(self.engines)
        ring = list(itertools.pairwise([*names, names[0]]))
        before = await self._outcomes()
        try:
            orders = [
                await self.arm(rid, source, target, hop)
                for rid in rids
                for _ in range(self.laps if laps is None else laps)
                for (source, target), hop in zip(ring, hops, strict=True)
            ]
            yield
        finally:
            never = await self.disarm()
        assert not never, f"{len(never)} of {len(orders)} armed moves never started"
        self.moved = await self.reports(orders)
        wrong = [report for report in self.moved if report["outcome"] != "moved"]
        assert not wrong, wrong
        assert await self._outcomes() - before == len(orders), "other moves took place as well"

    @contextlib.asynccontextmanager
    async def endless(self, rid: str, url: str = "", limit: int = 8000) -> AsyncIterator[Endless]:
        """A request that decodes until the block is over, and equals its twin afterwards."""
        stream = Endless(self, url or self.router, rid, PROMPT_IDS, limit)
        try:
            yield stream
            _, request = await self.found(rid)
            await stream.until(int(request["output_tokens"]) + Endless.REST)
        finally:
            await stream.leave()
        await self.settle()
        await stream.equals_twin()
        await self.settle()

    async def found(self, rid: str, moves: int = 0) -> tuple[str, dict[str, Any]]:
        """Wait until a request decodes steadily after so many moves: the engine, its status."""

        async def here() -> tuple[str, dict[str, Any]] | None:
            for name, status in (await self.statuses()).items():
                for request in status["requests"]:
                    if (request["rid"], request["state"]) == (rid, "running") and (
                        request["moves"] >= moves and request["output_tokens"] >= 2
                    ):
                        return name, request
            return None

        found: tuple[str, dict[str, Any]] = await until(here, f"{rid} decodes after {moves} moves")
        return found

    async def _outcomes(self) -> int:
        statuses = (await self.statuses()).values()
        return sum(sum(status["move_outcomes"].values()) for status in statuses)


def new_rid(name: str) -> str:
    """A name that no other request has or begins with."""
    return f"{name}-{uuid.uuid4().hex}"
