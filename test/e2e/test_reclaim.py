"""Requests that are taken back, or retracted by SGLang itself, say what they would have said.

Without overlap, every penalty is compared to the token. Under overlap SGLang accumulates a token
late or not, depending on what it prefilled in between, so that two runs of a penalised request
need not agree to begin with: there, only what is deterministic is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import psutil
import pytest

from e2e.conftest import COMMON, PATIENT_ROUTER
from e2e.fleet import Endless, Fleet, Hop, new_rid, until
from e2e.test_stress import family
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.model import tiny_model

pytestmark = pytest.mark.e2e

MINIMUM = 600
"""Output tokens before which a request may not end; all that is done to it is done before."""
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "greedy": {},
    # It would end at once if it might.
    "minimum": {"min_new_tokens": MINIMUM, "ignore_eos": False, "logit_bias": {"2": 60.0}},
}
CASES: dict[str, dict[str, Any]] = {
    **DETERMINISTIC,
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.3},
    "all": {"frequency_penalty": 0.3, "presence_penalty": -0.2, "repetition_penalty": 1.1},
}
POOL = 4096
SYNC = ("--disable-overlap-schedule", "--num-reserved-decode-tokens", "16")
LAYOUTS: dict[str, dict[str, int]] = {
    "aggregated": {"aggregated": 2},
    "disaggregated": {"prefill": 1, "decode": 2},
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    forks: ForkServer | None,
) -> Iterator[Cluster]:
    """Two engines that decode and wait for a silent peer as short as is safe."""
    spec = ClusterSpec(
        model=str(tiny_model()),
        predictor="off",
        rescheduler="off",
        max_total_tokens=POOL,
        engine_arguments=(*COMMON, *SYNC, "--star-peer-timeout-s", "5", "--star-max-moves", "16"),
        router_arguments=PATIENT_ROUTER,
        **LAYOUTS[request.param],
    )
    with Cluster(spec, tmp_path_factory.mktemp(request.param), forks=forks) as running:
        yield running


class Penalised(Endless):
    """An endless request with a penalty, or one that a minimum keeps from ending."""

    def __init__(self, fleet: Fleet, name: str, prompt: Sequence[int], **parameters: Any) -> None:
        self._parameters = parameters
        super().__init__(fleet, fleet.router, new_rid(name), list(prompt), limit=3000)

    async def enough(self) -> None:
        """Some more tokens than now, or its end where it has one."""
        if "min_new_tokens" in self._parameters:
            await self._reader
            assert len(self.tokens) == MINIMUM + 1
        else:
            await self.until(len(self.tokens) + self.REST)
            await self.leave()

    async def equals_twin(self) -> None:
        """To the token: a penalty counts what was said, which no shorter request has said."""
        assert self.tokens == await self._said(0, len(self.tokens)), self.rid

    def _body(self, tokens: int) -> dict[str, Any]:
        body = super()._body(tokens)
        body["sampling_params"].update(self._parameters)
        return body


def streams_of(fleet: Fleet, cases: dict[str, dict[str, Any]]) -> list[Penalised]:
    return [
        Penalised(fleet, name, [300 + 7 * number] * 12, **parameters)
        for number, (name, parameters) in enumerate(cases.items())
    ]


async def equal_their_twins(fleet: Fleet, streams: list[Penalised]) -> None:
    """Ends the streams after some more tokens, and compares each with an undisturbed run."""
    await asyncio.gather(*(stream.enough() for stream in streams))
    await fleet.settle()
    await asyncio.gather(*(stream.equals_twin() for stream in streams))
    await fleet.settle()


async def call(fleet: Fleet, name: str, path: str, **body: Any) -> None:
    async with fleet.session.post(fleet.engines[name] + path, json=body) as answer:
        assert answer.status < 300, await answer.text()


async def weights(fleet: Fleet, name: str, version: str) -> None:
    """SGLang takes the engine's weights for others from now on."""
    path = "/update_weight_version"
    await call(fleet, name, path, new_version=version, abort_all_requests=False)


@contextlib.asynccontextmanager
async def paused(fleet: Fleet, name: str, mode: str) -> AsyncIterator[None]:
    """SGLang's own pause; our step-boundary work goes on in it."""
    await call(fleet, name, "/pause_generation", mode=mode)
    try:
        yield
    finally:
        await call(fleet, name, "/continue_generation")


@contextlib.asynccontextmanager
async def everything_at(fleet: Fleet, home: str) -> AsyncIterator[None]:
    """The router sends what comes in this block to ``home``."""
    host = fleet.other(home)

    async def known(draining: bool) -> bool:
        shown = (await fleet.get(fleet.router + "/star/cluster"))["instances"]
        return bool(next(one for one in shown if one["name"] == host)["draining"] is draining)

    await call(fleet, host, "/star/drain")
    try:
        await until(lambda: known(True), "the router knows who drains")
        yield
    finally:
        await call(fleet, host, "/star/undrain")
    await until(lambda: known(False), "the router knows that nobody drains")


async def requests_at(fleet: Fleet, name: str, streams: Sequence[Endless]) -> list[dict[str, Any]]:
    rids = {stream.rid for stream in streams}
    return [one for one in (await fleet.status(name))["requests"] if one["rid"] in rids]


async def arrive(fleet: Fleet, name: str, streams: Sequence[Endless]) -> None:
    async def here() -> bool:
        return len(await requests_at(fleet, name, streams)) == len(streams)

    await until(here, f"{len(streams)} requests are at {name}")


@contextlib.contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_streams_survive_a_host_that_freezes(pair: Cluster) -> None:
    """The host waits until all guests are there, so that none is far when it freezes."""

    async def scenario() -> None:
        async with Fleet.connect(pair) as fleet:
            await fleet.settle()
            home, host = fleet.engines
            processes = family(fleet.engines[host])
            async with paused(fleet, host, "in_place"):
                async with everything_at(fleet, home):
                    streams = streams_of(fleet, CASES)
                    await arrive(fleet, home, streams)
                for stream in streams:
                    await fleet.arm(stream.rid, home, host, Hop(10))
                await arrive(fleet, host, streams)

                async def inserted() -> bool:
                    found = await requests_at(fleet, host, streams)
                    return all(one["state"] == "running" for one in found)

                await until(inserted, "the host would decode them")
                found = await requests_at(fleet, host, streams)
                moved_at = {one["rid"]: one["output_tokens"] for one in found}

            async def decoded() -> bool:
                found = await requests_at(fleet, host, streams)
                return all(one["output_tokens"] > moved_at[one["rid"]] + 3 for one in found)

            await until(decoded, "the host decodes them", pause_s=0.005)
            with frozen(processes):

                async def reclaimed() -> bool:
                    outcomes = (await fleet.status(home))["move_outcomes"]
                    return bool(outcomes.get("reclaimed", 0) >= len(streams))

                await until(reclaimed, "home takes them back")
            # The host goes on, finds that its guests are wanted no more and gives all pages back.
            await equal_their_twins(fleet, streams)

    asyncio.run(scenario())


def test_penalties_survive_a_retraction_into_host_memory(pair: Cluster) -> None:
    """A decode instance whose KV overflows puts requests aside, with their KV in host memory."""
    if pair.spec.aggregated:
        pytest.skip("an aggregated instance recomputes: see the test below")

    async def scenario() -> None:
        async with Fleet.connect(pair) as fleet:
            await fleet.settle()
            home = next(iter(fleet.engines))
            async with everything_at(fleet, home):
                # SGLang retracts who has said least: these have said more than the others.
                fillers = [Penalised(fleet, "filler", [50 + k] * 1000) for k in range(3)]
                for filler in fillers:
                    await filler.until(Endless.REST)
                streams = streams_of(fleet, CASES)
                await arrive(fleet, home, streams)
            retracted: set[str] = set()

            async def all_retracted() -> bool:
                for one in await requests_at(fleet, home, streams):
                    if one["queued"] and one["output_tokens"]:
                        retracted.add(one["rid"])
                return len(retracted) == len(streams)

            await until(all_retracted, "the pool overflows", pause_s=0.01)
            for filler in fillers:
                await filler.leave()
            await equal_their_twins(fleet, streams)

    asyncio.run(scenario())


async def told(fleet: Fleet, at: str, migration_id: str) -> dict[str, Any] | None:
    """What one engine says of how a move ended."""
    moves = (await fleet.status(at))["recent_moves"]
    return next((dict(move) for move in moves if move["migration_id"] == migration_id), None)


def test_a_pause_that_computes_again_leaves_no_move_with_the_kv_of_before(pair: Cluster) -> None:
    """As trainers do it: pause, change the weights, flush, go on; here while a request moves."""

    async def scenario() -> None:
        async with Fleet.connect(pair) as fleet:
            await fleet.settle()
            home, target = fleet.engines
            processes = family(fleet.engines[target])
            star = (await fleet.get(fleet.engines[target] + "/server_info"))["star"]
            peer = {name: star[name] for name in ("instance_id", "incarnation")}
            peer["address"] = star["migration_address"]
            async with everything_at(fleet, home):
                [stream] = streams_of(fleet, {"greedy": {}})
                await stream.until(Endless.REST)
            with frozen(processes):
                # It leaves the batch at once, and its target does not answer.
                code, order = await fleet.order(stream.rid, home, target, hold_after=0, peer=peer)
                assert code == 202, order
                async with paused(fleet, home, "retract"):
                    # The target cannot be asked.
                    move = await until(
                        lambda: told(fleet, home, order["migration_id"]), "the move ends"
                    )
                    assert move["outcome"] == "cancelled", move
                    # No KV is held any more: the next is that of the new weights.
                    await call(fleet, home, "/flush_cache")
                    await weights(fleet, home, "later")
            # Now their weights differ: KV of one is of no use to the other.
            await fleet.found(stream.rid)
            code, order = await fleet.order(stream.rid, home, target)
            assert code == 202, order
            outcome = await fleet.report(order["migration_id"])
            assert outcome["outcome"] == "refused", outcome
            assert "weights" in outcome["detail"]
            await weights(fleet, home, "default")
            await equal_their_twins(fleet, [stream])

    asyncio.run(scenario())


def test_penalties_survive_a_retraction(cluster: Cluster) -> None:
    """SGLang's own, of everything at once: KV is computed again, here or by the prefill side."""

    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            exact = "--disable-overlap-schedule" in cluster.spec.engine_arguments
            streams = streams_of(fleet, CASES if exact else DETERMINISTIC)
            for stream in streams:
                await stream.until(Endless.REST)
            for name in fleet.engines:
                async with paused(fleet, name, "retract"):
                    pass
            await equal_their_twins(fleet, streams)

    asyncio.run(scenario())
