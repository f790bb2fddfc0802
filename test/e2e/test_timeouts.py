"""SGLang's own limit on a request's running time holds wherever the request runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from e2e.conftest import COMMON, PATIENT, PATIENT_ROUTER
from e2e.fleet import Fleet, Hop, new_rid
from sglang_star.cluster import Cluster
from sglang_star.cluster_layout import ClusterSpec, Place
from sglang_star.forkserver import ForkServer
from sglang_star.model import tiny_model

pytestmark = pytest.mark.e2e

LIMIT_S = 6
BODY = {
    "input_ids": [100, 200, 300],
    "sampling_params": {"max_new_tokens": 20_000, "temperature": 0, "ignore_eos": True},
}
"""Far more tokens than any machine makes within the limit."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer | None) -> Iterator[Cluster]:
    spec = ClusterSpec(
        model=str(tiny_model()),
        aggregated=2,
        predictor="off",
        rescheduler="off",
        max_total_tokens=24_576,
        engine_arguments=(*COMMON, *PATIENT),
        router_arguments=PATIENT_ROUTER,
        places=(Place(environment=(("SGLANG_REQ_RUNNING_TIMEOUT", str(LIMIT_S)),)),) * 3,
    )
    with Cluster(spec, tmp_path_factory.mktemp("timeouts"), forks=forks) as running:
        yield running


async def answered(fleet: Fleet, url: str, rid: str) -> tuple[int, str]:
    code, answer = await fleet.post(url + "/generate", {**BODY, "rid": rid})
    return code, str(answer)


def test_a_request_that_runs_elsewhere_times_out_like_one_at_home(pair: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(pair) as fleet:
            home, other = fleet.engines
            stayed = await answered(fleet, fleet.engines[home], new_rid("stays"))
            assert "running timeout" in stayed[1], stayed
            rid = new_rid("moves")
            move = await fleet.arm(rid, home, other, Hop(2))
            moved = await answered(fleet, fleet.engines[home], rid)
            assert (await fleet.report(move))["outcome"] == "moved"
            assert moved[0] == stayed[0]
            assert "running timeout" in moved[1], moved
            await fleet.settle()

    asyncio.run(scenario())
