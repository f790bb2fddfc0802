"""Engines of two ranks each: what moves is every rank's share of the KV, in the same step.

The cases are those of which a rank could decide for itself: penalties, a grammar, what a token
entails at home, several moves at once; then whatever ends or holds up a move.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from e2e import test_identity, test_reclaim, test_refusals
from e2e.conftest import COMMON, EVERYTHING, PATIENT_ROUTER, TOOLS
from e2e.fleet import Endless, Fleet, Hop, new_rid, until
from e2e.test_identity import CASES
from e2e.test_stress import body, family, kill, random_moves, storm, stream
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec
from sglang_star.forkserver import ForkServer
from sglang_star.model import tiny_model
from unit.tiny_head import head_for

pytestmark = pytest.mark.e2e

RANKS = 2
STORM = 80 if EVERYTHING else 48
TWINS = 40
SEED = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer | None) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ranks")
    spec = ClusterSpec(
        model=str(tiny_model()),
        aggregated=2,
        predictor=str(head_for(tiny_model(), folder / "tiny.safetensors")),
        rescheduler="off",
        max_total_tokens=8192,
        router_arguments=PATIENT_ROUTER,
        engine_arguments=(
            *(*COMMON, *TOOLS, "--tp-size", str(RANKS), "--star-max-moves", "16"),
            *("--star-peer-timeout-s", "60", "--star-move-deadline-s", "240"),
        ),
    )
    with Cluster(spec, folder, forks=forks) as running:
        yield running


@pytest.mark.parametrize(
    "case", ["all-penalties", "json-schema-streamed", "logprobs-streamed", "batch"]
)
def test_moved_stream_equals_its_twin(pair: Cluster, case: str) -> None:
    asyncio.run(test_identity.check(pair, CASES[case]))


def test_moves_while_decoding(pair: Cluster) -> None:
    test_identity.test_moves_while_decoding(pair)


def test_drain_moves_everything_away(pair: Cluster) -> None:
    test_refusals.test_drain_moves_everything_away(pair)


def test_a_pause_that_computes_again_and_other_weights(pair: Cluster) -> None:
    test_reclaim.test_a_pause_that_computes_again_leaves_no_move_with_the_kv_of_before(pair)


def test_storm_of_moves(pair: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(pair) as fleet:
            await fleet.settle()
            urls = list(fleet.engines.values())
            found = await asyncio.gather(
                *(stream(fleet, urls[n % len(urls)], body(n)) for n in range(TWINS))
            )
            mover = asyncio.create_task(random_moves(fleet, random.Random(SEED)))
            try:
                cuts, armed = await storm(fleet, dict(enumerate(found)), STORM)
            finally:
                mover.cancel()
            await fleet.settle()
            assert cuts > STORM // 24
            assert armed > STORM // 8

    asyncio.run(scenario())


def test_a_stream_survives_its_host_of_which_one_rank_dies(pair: Cluster) -> None:
    """Runs last in this module: it ends an engine."""

    async def scenario() -> None:
        async with Fleet.connect(pair) as fleet:
            await fleet.settle()
            home, host = fleet.engines
            rid = new_rid("hosted")
            move = await fleet.arm(rid, home, host, Hop(10))
            request = Endless(fleet, fleet.engines[home], rid, [217] * 20, limit=1800)
            assert (await fleet.report(move))["outcome"] == "moved"
            members = family(fleet.engines[host])
            kill([one for one in members if f"TP{RANKS - 1}" in " ".join(one.cmdline())][:1])
            del fleet.engines[host], fleet.all_engines[host]

            async def reclaimed() -> bool:
                return bool((await fleet.status(home))["move_outcomes"].get("reclaimed") == 1)

            await until(reclaimed, "home reclaims the stream")
            await request.until(len(request.tokens) + 50)
            await request.leave()
            await fleet.settle()
            await request.equals_twin()

    asyncio.run(scenario())
