"""A cluster that has nothing to do uses next to no processor time.

Processor time is what is compared, not time on the clock. Other work on the machine makes every
wake-up of an idle process begin with cold caches, which costs it half as much again.
"""

from __future__ import annotations

import asyncio

import psutil
import pytest

from e2e.conftest import in_one_layout
from e2e.fleet import Fleet
from sglang_star.cluster import Cluster
from sglang_star_bench.start import idle_shares

pytestmark = pytest.mark.e2e

WATCHED_S = 5.0
MOST_OF_A_CORE = 0.03
BESIDE_OTHER_WORK = 0.05
"""Still far from what a thread that never sleeps takes."""
BUSY = 25.0
"""Percent of the machine."""


@in_one_layout
def test_an_idle_cluster_is_idle(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            # A connection between prefill and decode comes with the first transfer, and stays.
            body = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
            code, _ = await fleet.post(fleet.router + "/generate", body)
            assert code == 200
            await fleet.settle()

    asyncio.run(scenario())
    psutil.cpu_percent()
    shares = idle_shares(cluster, WATCHED_S)
    most = BESIDE_OTHER_WORK if psutil.cpu_percent() > BUSY else MOST_OF_A_CORE
    assert len(shares) == 1 + 3 * len(cluster.engines), "server, scheduler, detokenizer of each"
    busy = {name: f"{share:.1%}" for name, share in shares.items() if share > most}
    assert not busy, "of a core, by processes with nothing to do"
