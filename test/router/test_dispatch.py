"""Holding, refusing and spreading arrivals."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from router.fleet import FakeEngine, eventually, fleet
from router.test_proxy import run
from sglang_star_router.policy.snapshot import Placement


class Gatekeeper:
    """Holds everything until told otherwise; records the order of what it lets in."""

    name = "gatekeeper"

    def __init__(self) -> None:
        self.open = 0
        self.reject = False
        self.arrivals = []

    def place(self, snapshot, arrival, sequence):
        if self.reject:
            return Placement(None, "overload", reject=True)
        if self.open <= 0:
            return Placement(None, "no-room")
        self.open -= 1
        self.arrivals.append(arrival)
        (row, *_) = snapshot.instances.accepts.nonzero()[0]
        return Placement(snapshot.instances.ids[row], self.name)


def test_held_requests_leave_in_order():
    async def check():
        policy, engine = Gatekeeper(), FakeEngine()
        async with fleet(engine, policies={"dispatch_policy": policy}) as running:
            held = []
            for number in range(5):
                body = {"text": "a", "rid": f"r{number}"}
                held.append(asyncio.create_task(running.post("/generate", body)))
                await eventually(lambda n=number: running.router.dispatcher.holding == n + 1)
            for number in range(5):
                policy.open = 1
                running.router.fleet.changed()
                await eventually(lambda n=number: len(engine.requests) == n + 1)
            assert [request["rid"] for request in engine.requests] == [f"r{n}" for n in range(5)]
            assert [one[0] for one in await asyncio.gather(*held)] == [200] * 5
            assert running.router.dispatcher.holding == 0

    run(check())


def test_room_is_noticed_without_any_event():
    async def check():
        policy = Gatekeeper()
        async with fleet(FakeEngine(), policies={"dispatch_policy": policy}) as running:
            request = asyncio.create_task(running.post("/generate", {"text": "a"}))
            await eventually(lambda: running.router.dispatcher.holding == 1)
            policy.open = 1
            assert (await request)[0] == 200

    run(check())


def test_full_queue_and_expired_wait_are_honest():
    async def check():
        policy = Gatekeeper()
        policies = {"dispatch_policy": policy}
        async with fleet(FakeEngine(), policies=policies, queue_size=1) as running:
            waiting = asyncio.create_task(running.post("/generate", {"text": "a"}))
            await eventually(lambda: running.router.dispatcher.holding == 1)
            async with running.session.post(
                running.url + "/v1/completions", json={"prompt": "a"}
            ) as response:
                error = await response.json()
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert error["error"]["type"] == "rate_limit_exceeded"
            assert running.router.dispatcher.refused == {429: 1, 503: 0}
            policy.open = 1
            assert (await waiting)[0] == 200
        async with fleet(FakeEngine(), policies=policies, queue_timeout=0.2) as running:
            status, body = await running.post("/generate", {"text": "a"})
            assert status == 503
            assert "in time" in orjson.loads(body)["message"]
            assert running.router.dispatcher.refused == {429: 0, 503: 1}
            policy.reject = True
            assert (await running.post("/generate", {"text": "a"}))[0] == 429

    run(check())


def test_client_that_leaves_the_queue_does_not_block_it():
    async def check():
        policy, engine = Gatekeeper(), FakeEngine()
        async with fleet(engine, policies={"dispatch_policy": policy}) as running:
            first = asyncio.create_task(running.post("/generate", {"text": "a"}))
            await eventually(lambda: running.router.dispatcher.holding == 1)
            second = asyncio.create_task(running.post("/generate", {"text": "b"}))
            await eventually(lambda: running.router.dispatcher.holding == 2)
            first.cancel()
            await eventually(lambda: running.router.dispatcher.holding == 1)
            policy.open = 1
            assert (await second)[0] == 200
            assert [request["text"] for request in engine.requests] == ["b"]

    run(check())


@pytest.mark.parametrize("policy", ["round-robin", "least-requests", "least-tokens", "star"])
def test_a_burst_between_two_statuses_is_spread(policy):
    async def check():
        engines = [FakeEngine(gate=asyncio.Event()) for _ in range(4)]
        async with fleet(*engines, policy=policy) as running:
            for engine in engines:
                await running.publish(engine)
            body = {"text": "a" * 400, "stream": True, "sampling_params": {"max_new_tokens": 50}}
            requests = [asyncio.create_task(running.post("/generate", body)) for _ in range(16)]
            await eventually(lambda: sum(engine.active for engine in engines) == 16)
            assert [engine.active for engine in engines] == [4] * 4
            for engine in engines:
                engine.gate.set()
            assert [one[0] for one in await asyncio.gather(*requests)] == [200] * 16

    run(check())


def test_arrival_is_described_to_the_policy():
    async def check():
        policy = Gatekeeper()
        async with fleet(FakeEngine(), policies={"dispatch_policy": policy}) as running:
            policy.open = 10
            await running.post("/generate", {"input_ids": [1] * 300})
            await running.post("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 7}})
            await running.post("/v1/chat/completions", {"messages": [], "max_completion_tokens": 9})
            await running.post("/v1/completions", {"prompt": "x" * 398})
            await running.post("/v1/chat/completions", {"messages": [{"content": "x" * 4000}]})
            prompts = [arrival.prompt_tokens for arrival in policy.arrivals]
            limits = [arrival.max_new_tokens for arrival in policy.arrivals]
            assert prompts[0] == 300
            assert prompts[3] == 100
            assert limits[:4] == [128, 7, 9, 16]
            # No limit given: what the context leaves.
            assert limits[4] == 4000 - prompts[4]

    run(check())
