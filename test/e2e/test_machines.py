"""Router, prefill and two decode engines on machines of their own, with a network between them.

Each is in namespaces of its own, with a private /dev/shm and /tmp, so that whatever passes between
two of them has gone over a link. Needs root and the kernel's namespaces; skipped without.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from e2e.conftest import COMMON, EVERYTHING, PATIENT_ROUTER, TOOLS
from e2e.fleet import Endless, Fleet, new_rid, until
from e2e.test_identity import CASES, check
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.fleet_key import create
from sglang_star.model import tiny_model
from sglang_star_bench.machines import Machine, Network, unavailable
from unit.tiny_head import head_for

pytestmark = pytest.mark.e2e

CHOSEN = list(CASES)[:: 1 if EVERYTHING else 9]
"""All of them take minutes, and are the same protocol that the other layouts run them with."""
MOVES, FIRST = (20, 8) if EVERYTHING else (8, 3)
"""Of the moves, the first have arrived when the link breaks."""
PROMPT_TOKENS = 3000
SLOW = "20mbit"
"""Holds the other moves of such prompts on the link for seconds."""
ON_THEIR_WAY = {"reserving", "copying", "held", "parked"}


@dataclass(frozen=True)
class Site:
    """The cluster and what it runs on."""

    cluster: Cluster
    network: Network
    machines: dict[str, Machine]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("machines")
    key_file = folder / "fleet.key"
    create(key_file)
    locked = ("--star-fleet-key", str(key_file))
    with Network(4, keep=[folder]) as network:
        spec = ClusterSpec(
            model=str(tiny_model()),
            prefill=1,
            decode=2,
            predictor=str(head_for(tiny_model(), folder / "tiny.safetensors")),
            rescheduler="off",
            max_total_tokens=2 * MOVES * PROMPT_TOKENS,
            engine_arguments=(
                *COMMON,
                *TOOLS,
                *locked,
                *("--star-transport", "nixl"),
                *("--star-max-moves", str(MOVES), "--star-move-deadline-s", "240"),
                # A cut link is to be noticed, a busy machine is not.
                *("--star-peer-timeout-s", "20"),
            ),
            router_arguments=(*PATIENT_ROUTER, *locked),
            places=tuple(machine.place for machine in network.machines),
        )
        with Cluster(spec, folder) as cluster:
            names = (engine.name for engine in cluster.engines)
            machines = dict(zip(names, network.machines, strict=False))
            yield Site(cluster, network, machines)


def test_nothing_is_shared(site: Site) -> None:
    async def scenario() -> None:
        async with Fleet.connect(site.cluster) as fleet:
            told = [await fleet.get(url + "/server_info") for url in fleet.all_engines.values()]
            assert len({info["star"]["host_token"] for info in told}) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("case", CHOSEN)
def test_moved_stream_equals_its_twin(site: Site, case: str) -> None:
    asyncio.run(check(site.cluster, CASES[case]))


@contextlib.asynccontextmanager
async def streams(fleet: Fleet) -> AsyncIterator[list[Endless]]:
    """So many long requests that decode until the block is over; all equal their twins then."""
    made = [
        Endless(fleet, fleet.router, new_rid(f"far-{k}"), [1000 + k, *range(PROMPT_TOKENS)])
        for k in range(MOVES)
    ]
    try:
        yield made
        seen = [len(stream.tokens) for stream in made]
        for stream, tokens in zip(made, seen, strict=True):
            await stream.until(tokens + Endless.REST)
    finally:
        for stream in made:
            await stream.leave()
    await fleet.settle()
    await asyncio.gather(*(stream.equals_twin() for stream in made))
    await fleet.settle()


async def order(fleet: Fleet, stream: Endless) -> str:
    """Send a stream to the other engine, once it decodes."""
    source, _ = await fleet.found(stream.rid)
    code, answer = await fleet.order(stream.rid, source, fleet.other(source))
    assert code == 202, answer
    return str(answer["migration_id"])


async def arrives(fleet: Fleet, stream: Endless) -> bool:
    """Whether it arrives at the other engine this time."""
    report = await fleet.report(await order(fleet, stream))
    return bool(report["outcome"] == "moved")


async def half_way(fleet: Fleet, made: list[Endless]) -> list[str]:
    """Move the first requests, and begin to move the others over a slow link."""
    # Of a pair whose link was just mended the first reads may still fail.
    await asyncio.gather(*(until(partial(arrives, fleet, one), "it moves") for one in made[:FIRST]))
    for stream in made[FIRST:]:
        await fleet.found(stream.rid)
    return [await order(fleet, stream) for stream in made[FIRST:]]


async def on_its_way(fleet: Fleet) -> bool:
    """Whether some request is being copied now."""
    return any(
        request["state"] in ON_THEIR_WAY
        for status in (await fleet.statuses()).values()
        for request in status["requests"]
    )


def test_a_link_cut_in_the_middle_of_moves_costs_no_stream(site: Site) -> None:
    """The engines lose each other for good; everybody else still reaches both."""
    pair = [site.machines["decode-0"], site.machines["decode-1"]]

    async def scenario() -> None:
        async with Fleet.connect(site.cluster) as fleet:
            await fleet.settle()
            try:
                async with streams(fleet) as made:
                    for stream in made:
                        await stream.until(2)
                    site.network.hold(SLOW)
                    orders = await half_way(fleet, made)
                    assert await on_its_way(fleet), "the link is too fast for this test"
                    site.network.part(*pair)
                    outcomes = [report["outcome"] for report in await fleet.reports(orders)]
                    assert set(outcomes) - {"moved"}, "no move was under way when the link broke"

                    async def at_home() -> bool:
                        return all(
                            request["home"] == name
                            for name, status in (await fleet.statuses()).items()
                            for request in status["requests"]
                        )

                    await until(at_home, "every engine has its own requests back")
            finally:
                site.network.hold("")
                site.network.rejoin(*pair)

    asyncio.run(scenario())


def test_a_cable_pulled_and_plugged_in_again_costs_no_stream(site: Site) -> None:
    """Nobody is taken for dead meanwhile; a move may fail, and then its request stays."""

    async def scenario() -> None:
        async with Fleet.connect(site.cluster) as fleet:
            await fleet.settle()
            async with streams(fleet) as made:
                for stream in made:
                    await stream.until(2)
                site.network.hold(SLOW)
                orders = await half_way(fleet, made)
                site.network.cut(site.machines["decode-1"])
                await asyncio.sleep(2)
                site.network.mend(site.machines["decode-1"])
                site.network.hold("")
                await fleet.reports(orders)

                await until(partial(arrives, fleet, made[0]), "a request moves again")

    asyncio.run(scenario())
