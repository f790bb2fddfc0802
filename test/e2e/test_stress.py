"""Hundreds of requests, random moves, aborts and disconnects, and one engine that dies.

Every stream that finishes equals its twin, every one that was cut is a prefix of it, and all
pools return to their idle size. No penalties here: under overlap SGLang accumulates them a token
late or not depending on the prefills in between, so that even an unmoved request differs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from typing import Any

import aiohttp
import psutil
import pytest

from e2e.conftest import COMMON
from e2e.fleet import Fleet
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.model import tiny_model

pytestmark = pytest.mark.e2e

REQUESTS = 240
RESERVE = 96
CONCURRENT = 16
SEED = 5


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
                if not request["queued"] and chance.random() < 0.3:
                    target = chance.choice([n for n in names if n != name])
                    try:
                        await fleet.order(request["rid"], name, target)
                    except aiohttp.ClientError:
                        continue
        await asyncio.sleep(0.02)


async def storm(fleet: Fleet, urls: list[str], twins: dict[int, list[int]]) -> int:
    """Run all requests; returns how many were cut on purpose."""
    chance = random.Random(SEED)
    gate = asyncio.Semaphore(CONCURRENT)
    cuts = 0

    async def one(number: int) -> None:
        nonlocal cuts
        cut_after = chance.randrange(1, 30) if chance.random() < 0.2 else 0
        aborted = chance.random() < 0.1
        async with gate:
            request = body(number)
            url = urls[number % len(urls)]
            if aborted:
                request["rid"] = f"storm-{number}-{chance.random()}-"
                asyncio.get_running_loop().call_later(
                    chance.random(),
                    lambda: asyncio.ensure_future(
                        fleet.post(url + "/abort_request", {"rid": request["rid"]})
                    ),
                )
            tokens = await stream(fleet, url, request, cut_after)
        expected = twins[number % 40]
        if cut_after or aborted:
            cuts += 1
            assert tokens == expected[: len(tokens)], number
        else:
            assert tokens == expected, number

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    return cuts


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    spec = ClusterSpec(
        model=str(tiny_model()),
        aggregated=3,
        predictor="off",
        rescheduler="off",
        max_total_tokens=4096,
        engine_arguments=(
            *(*COMMON, "--star-max-moves", "8"),
            *("--num-reserved-decode-tokens", str(RESERVE)),
        ),
    )
    with Cluster(spec, tmp_path_factory.mktemp("storm")) as running:
        yield running


async def twins_of(fleet: Fleet) -> dict[int, list[int]]:
    url = next(iter(fleet.engines.values()))
    twins = {}
    for number in range(40):
        twins[number] = await stream(fleet, url, body(number))
    return twins


def test_the_router_reads_what_each_engine_keeps_free(trio: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            shown = (await fleet.get(fleet.router + "/star/cluster"))["instances"]
            assert [one["reserve_each"] for one in shown] == [RESERVE] * 3

    asyncio.run(scenario())


def test_storm_of_moves(trio: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            twins = await twins_of(fleet)
            mover = asyncio.create_task(random_moves(fleet, random.Random(SEED)))
            try:
                cuts = await storm(fleet, list(fleet.engines.values()), twins)
            finally:
                mover.cancel()
            assert cuts > 10
            await fleet.settle()
            statuses = (await fleet.statuses()).values()
            assert sum(status["move_outcomes"].get("moved", 0) for status in statuses) > 10

    asyncio.run(scenario())


def test_streams_survive_the_death_of_their_host(trio: Cluster) -> None:
    """Runs last in this module: it kills an engine."""

    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            await fleet.settle()
            home, host = list(fleet.engines)[:2]
            requests = [body(n) for n in range(8)]
            for request in requests:
                request["sampling_params"]["max_new_tokens"] = 500
            expected = await asyncio.gather(
                *(stream(fleet, fleet.engines[home], dict(r)) for r in requests)
            )
            await fleet.settle()
            tasks = [
                asyncio.create_task(stream(fleet, fleet.engines[home], dict(r))) for r in requests
            ]
            hosted = await move_some(fleet, home, host)
            assert hosted
            kill_engine(fleet.engines[host])
            del fleet.engines[host]
            finished = await asyncio.gather(*tasks)
            assert [len(tokens) for tokens in finished] == [500] * len(requests)
            assert finished == expected
            outcomes = (await fleet.statuses())[home]["move_outcomes"]
            assert outcomes.get("reclaimed", 0) > 0
            fleet.all_engines.pop(host)
            await fleet.settle()

    asyncio.run(scenario())


def test_guests_of_a_dead_home_are_dropped(trio: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(trio) as fleet:
            alive = [n for n in fleet.engines if await is_up(fleet, fleet.engines[n])]
            assert len(alive) == 2
            home, host = alive
            request = body(1)
            request["sampling_params"]["max_new_tokens"] = 3000
            task = asyncio.create_task(stream(fleet, fleet.engines[home], request))
            for name in list(fleet.engines):
                if name not in alive:
                    del fleet.engines[name]
                    del fleet.all_engines[name]
            assert await move_some(fleet, home, host)
            kill_engine(fleet.engines[home])
            for name in (home,):
                del fleet.engines[name]
                del fleet.all_engines[name]
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


async def move_some(fleet: Fleet, home: str, host: str) -> int:
    """Order everything at ``home`` to ``host`` until something decodes there."""
    for _ in range(300):
        status = await fleet.get(fleet.engines[home] + "/star/status")
        for request in status["requests"]:
            await fleet.order(request["rid"], home, host)
        there = await fleet.get(fleet.engines[host] + "/star/status")
        guests = [r for r in there["requests"] if r["home"] == home and r["output_tokens"] > 2]
        if guests:
            return len(guests)
        await asyncio.sleep(0.02)
    return 0


def kill_engine(url: str) -> None:
    """SIGKILL the engine that listens at ``url``, with its children."""
    port = int(url.rsplit(":", 1)[1])
    for process in psutil.process_iter():
        try:
            listens = any(
                c.status == psutil.CONN_LISTEN and c.laddr.port == port
                for c in process.net_connections("tcp")
            )
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        if listens:
            family = [process, *process.children(recursive=True)]
            for member in family:
                os.kill(member.pid, signal.SIGKILL)
            return
    raise AssertionError(f"nothing listens on {port}")
