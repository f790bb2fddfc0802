"""Hundreds of requests, armed and random moves, aborts and disconnects, and engines that die.

Every stream that finishes equals its twin, every one that was cut is a prefix of it, and all
pools return to their idle size. No penalties here: under overlap SGLang accumulates them a token
late or not depending on the prefills in between, so that even an unmoved request differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any

import aiohttp
import psutil
import pytest

from e2e.conftest import COMMON, EVERYTHING
from e2e.fleet import Endless, Fleet, Hop, new_rid, until
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.model import tiny_model
from sglang_star.predictor.choice import BY_AGE

pytestmark = pytest.mark.e2e

REQUESTS = 240 if EVERYTHING else 160
RESERVE = 96
CONCURRENT = 16
SEED = 5
LIMIT = 1800
"""Output tokens of requests that have to outlive what happens to them; two fit into a pool."""
PLAIN = "plain-"
"""Begins the names of requests that nobody moves before the move armed for them."""


def body(number: int) -> dict[str, Any]:
    chance = random.Random(number % 40)
    return {
        "input_ids": [chance.randrange(3, 49152) for _ in range(chance.randrange(4, 60))],
        "sampling_params": {
            "max_new_tokens": chance.randrange(8, 160),
            "temperature": 0,
            "ignore_eos": True,
        },
        "stream": True,
    }


def plain(number: int) -> bool:
    """Whether a request of the storm is left alone but for the one move armed for it."""
    return number % 4 == 0 and body(number)["sampling_params"]["max_new_tokens"] >= 60


async def stream(fleet: Fleet, url: str, request: dict[str, Any], cut_after: int = 0) -> list[int]:
    """Token ids of one streamed request; leaves after ``cut_after`` chunks if positive."""
    tokens: list[int] = []
    async with fleet.session.post(url + "/generate", json=request) as response:
        assert response.status == 200, await response.text()
        seen = 0
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            tokens = chunk["output_ids"]
            seen += 1
            if cut_after and seen >= cut_after:
                return tokens
    return tokens


async def random_moves(fleet: Fleet, chance: random.Random) -> None:
    names = list(fleet.engines)
    while True:
        for name in names:
            try:
                status = await fleet.get(fleet.engines[name] + "/star/status")
            except aiohttp.ClientError:
                continue
            for request in status["requests"]:
                waits = request["rid"].startswith(PLAIN) and not request["moves"]
                if not request["queued"] and not waits and chance.random() < 0.3:
                    target = chance.choice([n for n in names if n != name])
                    try:
                        await fleet.order(request["rid"], name, target)
                    except aiohttp.ClientError:
                        continue
        await asyncio.sleep(0.02)


async def storm(
    fleet: Fleet, twins: dict[int, list[int]], requests: int = REQUESTS
) -> tuple[int, int]:
    """Run so many requests; returns how many were cut on purpose, and how many moves were armed."""
    names, urls = list(fleet.engines), list(fleet.engines.values())
    armed = 0
    chance = random.Random(SEED)
    gate = asyncio.Semaphore(CONCURRENT)
    cuts = 0

    async def one(number: int) -> None:
        nonlocal cuts, armed
        cut_after = chance.randrange(1, 30) if chance.random() < 0.2 else 0
        aborted = chance.random() < 0.1
        if plain(number):
            cut_after = aborted = 0
        async with gate:
            request = body(number)
            at = number % len(urls)
            url = urls[at]
            if plain(number):
                request["rid"] = f"{PLAIN}{number}"
                target = names[(at + 1) % len(names)]
                hop = Hop(5, 30 if number % 8 else 0)
                move = await fleet.arm(request["rid"], names[at], target, hop)
                armed += 1
            if aborted:
                request["rid"] = f"storm-{number}-{chance.random()}-"
                asyncio.get_running_loop().call_later(
                    chance.random(),
                    lambda: asyncio.ensure_future(
                        fleet.post(url + "/abort_request", {"rid": request["rid"]})
                    ),
                )
            tokens = await stream(fleet, url, request, cut_after)
        if plain(number):
            assert (await fleet.report(move))["outcome"] == "moved"
        expected = twins[number % 40]
        if cut_after or aborted:
            cuts += 1
            assert tokens == expected[: len(tokens)], number
        else:
            assert tokens == expected, number

    await asyncio.gather(*(one(number) for number in range(requests)))
    return cuts, armed


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer | None):  # type: ignore[no-untyped-def]
    spec = ClusterSpec(
        model=str(tiny_model()),
        aggregated=3,
        rescheduler="off",
        max_total_tokens=4096,
        engine_arguments=(
            *(*COMMON, "--star-max-moves", "8", "--star-peer-timeout-s", "8"),
            *("--num-reserved-decode-tokens", str(RESERVE)),
        ),
    )
    with Cluster(spec, tmp_path_factory.mktemp("storm"), forks=forks) as running:
        yield running


async def twins_of(fleet: Fleet) -> dict[int, list[int]]:
    urls = list(fleet.engines.values())
    found = await asyncio.gather(*(stream(fleet, urls[n % len(urls)], body(n)) for n in range(40)))
    return dict(enumerate(found))


def test_the_router_knows_what_each_engine_keeps_free_and_estimates_by(trio: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            shown = (await fleet.get(fleet.router + "/star/cluster"))["instances"]
            assert [one["reserve_each"] for one in shown] == [RESERVE] * 3
            # Nobody has trained a head for this model, and it is served all the same.
            assert [one["predictor"] for one in shown] == [BY_AGE] * 3

    asyncio.run(scenario())


def test_storm_of_moves(trio: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            twins = await twins_of(fleet)
            mover = asyncio.create_task(random_moves(fleet, random.Random(SEED)))
            try:
                cuts, armed = await storm(fleet, twins)
            finally:
                mover.cancel()
            assert cuts > REQUESTS // 24
            await fleet.settle()
            assert armed > REQUESTS // 8

    asyncio.run(scenario())


def test_a_held_request_goes_on_when_its_target_stops(trio: Cluster) -> None:
    """The target neither takes nor refuses it, and for longer than a peer may be silent."""

    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            await fleet.settle()
            home, host = list(fleet.engines)[:2]
            rid = new_rid("held")
            move = await fleet.arm(rid, home, host, Hop(10))
            stopped = family(fleet.engines[host])
            for process in stopped:
                process.suspend()
            async with fleet.endless(rid, fleet.engines[home], limit=LIMIT) as request:
                try:
                    report = await told(fleet, home, move)
                    assert (report["outcome"], report["precopied_tokens"]) == ("failed", 0)
                    await request.until(report["output_tokens"] + 20)
                finally:
                    for process in stopped:
                        process.resume()

    asyncio.run(scenario())


async def told(fleet: Fleet, name: str, migration_id: str) -> dict[str, Any]:
    """The end of a move that engine ``name`` tells, while others are not to be asked."""

    async def here() -> dict[str, Any] | None:
        reports = (await fleet.status(name))["recent_moves"]
        return next((r for r in reports if r["migration_id"] == migration_id), None)

    report: dict[str, Any] = await until(here, f"{name} tells of {migration_id}")
    return report


def test_streams_survive_the_death_of_their_host(trio: Cluster) -> None:
    """Runs last in this module: it kills an engine."""

    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            await fleet.settle()
            home, host = list(fleet.engines)[:2]
            doomed = family(fleet.engines[host])
            rids = [new_rid("hosted") for _ in range(2)]
            moves = [await fleet.arm(rid, home, host, Hop(10)) for rid in rids]
            streams = [
                Endless(fleet, fleet.engines[home], rid, [200 + k] * 20, limit=LIMIT)
                for k, rid in enumerate(rids)
            ]
            for report in await fleet.reports(moves):
                assert report["outcome"] == "moved"
            kill(doomed)
            del fleet.engines[host], fleet.all_engines[host]

            async def reclaimed() -> bool:
                return bool((await fleet.status(home))["move_outcomes"].get("reclaimed") == 2)

            await until(reclaimed, "home reclaims both streams")
            for stream in streams:
                await stream.until(len(stream.tokens) + 50)
                await stream.leave()
            await fleet.settle()
            for stream in streams:
                await stream.equals_twin()
            await fleet.settle()

    asyncio.run(scenario())


def test_guests_of_a_dead_home_are_dropped(trio: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            alive = [n for n in fleet.engines if await is_up(fleet, fleet.engines[n])]
            assert len(alive) == 2
            home, host = alive
            request = body(1)
            request["rid"] = new_rid("orphan")
            request["sampling_params"]["max_new_tokens"] = LIMIT
            move = await fleet.arm(request["rid"], home, host, Hop(10))
            task = asyncio.create_task(stream(fleet, fleet.engines[home], request))
            for name in list(fleet.engines):
                if name not in alive:
                    del fleet.engines[name]
                    del fleet.all_engines[name]
            assert (await fleet.report(move))["outcome"] == "moved"
            kill(family(fleet.engines[home]))
            del fleet.engines[home], fleet.all_engines[home]
            with pytest.raises(aiohttp.ClientError):
                await task
            await fleet.settle()

    asyncio.run(scenario())


async def is_up(fleet: Fleet, url: str) -> bool:
    try:
        await fleet.get(url + "/star/status")
    except aiohttp.ClientError:
        return False
    return True


def family(url: str) -> list[psutil.Process]:
    """The process that listens at ``url`` and all its descendants."""
    port = int(url.rsplit(":", 1)[1])
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.AccessDenied, psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if (connection.status, connection.laddr.port) == (psutil.CONN_LISTEN, port):
                    return [process, *process.children(recursive=True)]
    raise AssertionError(f"nothing listens on {port}")


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL each; some end with their parent before it is their turn."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
