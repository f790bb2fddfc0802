"""Whatever is asked wrongly is answered clearly, and no running request notices."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
import zmq

from e2e.fleet import Fleet
from e2e.test_identity import PROMPT
from sglang_star.cluster import Cluster
from sglang_star.protocol import PROTOCOL_VERSION, UndrainOrder, encode

pytestmark = pytest.mark.e2e

LONG = {"max_new_tokens": 500, "temperature": 0, "ignore_eos": True}


@contextlib.asynccontextmanager
async def running(fleet: Fleet, **fields: Any):  # type: ignore[no-untyped-def]
    """One long request in decode: yields (rid, engine name), checks that it ends undisturbed."""
    await fleet.settle()
    body = {"text": PROMPT, "sampling_params": LONG, **fields}
    _, alone = await fleet.post(fleet.router + "/generate", body)
    await fleet.settle()
    task = asyncio.create_task(fleet.post(fleet.router + "/generate", body))
    try:
        for _ in range(1000):
            found = [
                (request["rid"], name)
                for name, status in (await fleet.statuses()).items()
                for request in status["requests"]
                if request["output_tokens"] > 3 and not request["queued"]
            ]
            if found:
                break
            await asyncio.sleep(0.01)
        yield found[0]
        code, disturbed = await task
    finally:
        task.cancel()
    assert code == 200
    assert disturbed["output_ids"] == alone["output_ids"]
    await fleet.settle()


def other(fleet: Fleet, name: str) -> str:
    return next(engine for engine in fleet.engines if engine != name)


def test_wrong_orders_are_refused_with_a_remedy(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            url, target = fleet.engines[name], fleet.engines[other(fleet, name)]
            for body, code, kind in (
                ({"rid": "nobody", "target": target}, 404, "UnknownRequest"),
                ({"rid": rid, "target": url}, 409, "OrderRefused"),
                ({"rid": rid, "target": "http://127.0.0.1:9"}, 503, "PeerError"),
                ({"rid": rid, "target": "elsewhere"}, 400, "ConfigError"),
                ({"rid": rid}, 400, "MalformedMessage"),
                ({"rid": rid, "target": target, "tarqet": 1}, 400, "MalformedMessage"),
            ):
                status, answer = await fleet.post(url + "/star/migrate", body)
                assert (status, answer["error"]["type"]) == (code, kind), (body, answer)
                assert answer["error"]["message"]
                assert answer["error"]["hint"]
            async with fleet.session.post(url + "/star/migrate", data=b"{not json") as response:
                assert response.status == 400

    asyncio.run(scenario())


def test_a_draining_target_refuses_and_the_request_goes_on(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            target = other(fleet, name)
            await fleet.post(fleet.engines[target] + "/star/drain", {})
            try:
                code, answer = await fleet.order(rid, name, target)
                assert code == 202
                report = await outcome(fleet, name, answer["migration_id"])
                assert report["outcome"] == "refused"
                assert "draining" in report["detail"]
            finally:
                await fleet.post(fleet.engines[target] + "/star/undrain", {})

    asyncio.run(scenario())


def test_drain_moves_everything_away(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            target = other(fleet, name)
            url = fleet.engines[name]
            try:
                code, _ = await fleet.post(
                    url + "/star/drain", {"targets": [fleet.engines[target]]}
                )
                assert code == 202
                for _ in range(300):
                    there = (await fleet.statuses())[target]["requests"]
                    if any(r["rid"] == rid and r["home"] == name for r in there):
                        break
                    await asyncio.sleep(0.01)
                else:
                    raise AssertionError("drain moved nothing")
            finally:
                await fleet.post(url + "/star/undrain", {})

    asyncio.run(scenario())


def test_garbage_on_the_sockets_is_dropped(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with Fleet.connect(cluster) as fleet, running(fleet) as (rid, name):
            context = zmq.Context()
            good = encode(UndrainOrder(order_id=1))
            for url in fleet.engines.values():
                star = (await fleet.get(url + "/server_info"))["star"]
                push = context.socket(zmq.PUSH)
                push.setsockopt(zmq.LINGER, 200)
                push.connect(star["migration_address"])
                for data in (b"", b"\x00" * 1000, b"garbage", good[:-1], good):
                    push.send(data)
                push.send(bytes([0x92, PROTOCOL_VERSION + 1]) + good[2:])
                push.send_multipart([b"many", b"parts"])
                push.close()
            context.term()
            await asyncio.sleep(0.3)
            code, answer = await fleet.order(rid, name, other(fleet, name))
            assert code == 202, answer

    asyncio.run(scenario())


async def outcome(fleet: Fleet, name: str, migration_id: str) -> dict[str, Any]:
    for _ in range(500):
        for report in (await fleet.statuses())[name]["recent_moves"]:
            if report["migration_id"] == migration_id:
                return dict(report)
        await asyncio.sleep(0.02)
    raise AssertionError("the move never ended")
