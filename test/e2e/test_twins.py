"""That a stream which is not its twin's is told from one that parts with it between equals."""

from __future__ import annotations

import asyncio

import pytest

from e2e.conftest import in_one_layout
from e2e.fleet import PROMPT_IDS, Endless, Fleet, new_rid
from sglang_star.cluster import Cluster

pytestmark = pytest.mark.e2e

CHANGED = 30


@in_one_layout
def test_another_token_is_noticed_and_placed(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            await fleet.settle()
            stream = Endless(fleet, fleet.router, new_rid("twin"), PROMPT_IDS)
            await stream.until(2 * CHANGED)
            await stream.leave()
            await fleet.settle()
            await stream.equals_twin()
            stream.tokens[CHANGED] += 1
            with pytest.raises(AssertionError, match=f"token {CHANGED} of"):
                await stream.equals_twin()
            await fleet.settle()

    asyncio.run(scenario())
