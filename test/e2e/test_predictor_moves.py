"""What the predictor remembers of a request moves with it: its estimates are as without moves."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from e2e.conftest import LAYOUTS
from e2e.fleet import Fleet, new_rid
from sglang_star.cluster import Cluster

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.parametrize("cluster", LAYOUTS, indirect=True, scope="session"),
]

TOKENS = 160
LIMIT = 4000
"""Far off, so that it does not cut the estimates."""


async def trail(fleet: Fleet, prompt: list[int], rid: str) -> dict[int, list[float]]:
    """P10, P50 and P90 by output tokens so far; leaves after :data:`TOKENS`."""
    params = {"temperature": 0, "max_new_tokens": LIMIT, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "stream": True, "rid": rid}
    seen: dict[int, list[float]] = {}
    async with fleet.session.post(fleet.router + "/generate", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                meta = json.loads(line[6:])["meta_info"]
                if estimate := meta.get("star_remaining"):
                    seen[meta["completion_tokens"]] = [estimate[k] for k in ("p10", "p50", "p90")]
                if meta["completion_tokens"] >= TOKENS:
                    break
    return seen


def test_estimates_go_on_across_moves(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            prompt = [random.Random(4).randrange(3, 49152) for _ in range(40)]
            await fleet.settle()
            still = await trail(fleet, prompt, new_rid("still"))
            await fleet.settle()
            rid = new_rid("moved")
            async with fleet.tour(rid, hops=fleet.hops(TOKENS)):
                moved = await trail(fleet, prompt, rid)
            await fleet.settle()
            # A prefilled token reaches the decode instance without an estimate; chunks may merge.
            both = sorted(set(still) & set(moved))
            assert len(both) > TOKENS / 2
            for tokens in both:
                assert moved[tokens] == pytest.approx(still[tokens], rel=1e-2), tokens
            assert len({tuple(still[tokens]) for tokens in both}) > TOKENS / 4

    asyncio.run(scenario())
