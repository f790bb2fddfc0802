"""What the predictor remembers of a request moves with it: its estimates are as without moves."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

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
ENDS = 3
"""Places in the text at which an answer is made to end."""
LEVELS = ("p10", "p50", "p90")


def body(prompt: list[int], **sampling: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": LIMIT, "ignore_eos": True, **sampling}
    return {"input_ids": prompt, "sampling_params": params}


async def trail(fleet: Fleet, prompt: list[int], rid: str) -> dict[int, list[float]]:
    """Estimates by output tokens so far, of those that come one by one; leaves after TOKENS."""
    request = {**body(prompt), "stream": True, "rid": rid}
    seen: dict[int, list[float]] = {}
    async with fleet.session.post(fleet.router + "/generate", json=request) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                meta = json.loads(line[6:])["meta_info"]
                if estimate := meta.get("star_remaining"):
                    seen[meta["completion_tokens"]] = [estimate[level] for level in LEVELS]
                if meta["completion_tokens"] >= TOKENS:
                    break
    return seen


def test_estimates_go_on_across_moves(cluster: Cluster) -> None:
    """Chunks may merge, so that the two have few estimates in common, or all of them."""

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
            for tokens in still.keys() & moved.keys():
                assert moved[tokens] == pytest.approx(still[tokens], rel=1e-2), tokens

    asyncio.run(scenario())


def test_the_last_estimate_of_a_moved_answer_is_that_of_its_twin(cluster: Cluster) -> None:
    async def last(fleet: Fleet, request: dict[str, Any]) -> tuple[int, list[float]]:
        code, answer = await fleet.post(fleet.router + "/generate", request)
        assert code == 200, answer
        meta = answer["meta_info"]
        return meta["completion_tokens"], [meta["star_remaining"][level] for level in LEVELS]

    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet:
            prompt = [random.Random(4).randrange(3, 49152) for _ in range(40)]
            # SGLang stops at no token if it is to ignore the end of text.
            short = body(prompt, max_new_tokens=TOKENS, ignore_eos=False)
            _, text = await fleet.post(fleet.router + "/generate", short)
            found = set()
            for at, token in ends(text["output_ids"]):
                request = body(prompt, stop_token_ids=[token], ignore_eos=False)
                await fleet.settle()
                still = await last(fleet, request)
                await fleet.settle()
                rid = new_rid("moved")
                async with fleet.tour(rid, hops=fleet.hops(at)):
                    moved = await last(fleet, {**request, "rid": rid})
                assert moved[0] == still[0] == at
                assert moved[1] == pytest.approx(still[1], rel=1e-2), at
                found.add(tuple(still[1]))
            assert len(found) == ENDS
            await fleet.settle()

    asyncio.run(scenario())


def ends(text: list[int]) -> list[tuple[int, int]]:
    """The last places, counted from 1, whose token occurs there for the first time."""
    first = [(at, token) for at, token in enumerate(text, 1) if text.index(token) == at - 1]
    assert len(first) >= ENDS
    return first[-ENDS:]
