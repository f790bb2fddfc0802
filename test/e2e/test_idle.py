"""A cluster that has nothing to do uses next to no processor time.

Processor time is what is compared, not time on the clock, and with what waking up costs: on a slow
machine, or beside other work with its cold caches, that is all that an idle process does.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from e2e.conftest import in_one_layout
from e2e.fleet import Fleet
from sglang_star.cluster import Cluster
from sglang_star_bench.start import idle_shares

pytestmark = pytest.mark.e2e

WATCHED_S = 5.0
MOST_OF_A_CORE = 0.03
WAKING = 2.0
"""Times what a thread takes that wakes up a thousand times a second, where that is more."""


def waking() -> float:
    """Share of a core of a thread that does nothing but wake up every millisecond."""
    used, began = time.thread_time(), time.monotonic()
    while time.monotonic() < began + 1.0:
        time.sleep(0.001)
    return (time.thread_time() - used) / (time.monotonic() - began)


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
    shares = idle_shares(cluster, WATCHED_S)
    most = max(MOST_OF_A_CORE, WAKING * waking())
    assert len(shares) == 1 + 3 * len(cluster.engines), "server, scheduler, detokenizer of each"
    busy = {name: f"{share:.1%}" for name, share in shares.items() if share > most}
    assert not busy, "of a core, by processes with nothing to do"
